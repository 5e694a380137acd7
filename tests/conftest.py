"""Fixtures for all rooms: a real S3 server and buckets on it, a Ray, a model, an MLflow store or server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.tracking.server import local_tracking
from pspnet_core.checkpoints.checkpoint import save_checkpoint
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.faultproxy import FaultProxy
from tests.support.mlflowserver import MlflowServer, running_mlflow_server
from tests.support.s3server import S3Server, running_s3_server

# The models of the tests are small: more threads would only wait for one another on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback, started by the first test that asks for it."""
    with running_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def s3_settings(server: S3Server) -> dict[str, str]:
    """Variables that lead every S3 client to the server, and to nothing else."""
    return {
        **server.environment(),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://NAME`` of a fresh bucket; the environment leads every S3 client to it, and to nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_settings(s3_server).items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex}"
    s3_server.create_bucket(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3_proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands between the S3 server and whatever is started from now on, and fails on command."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for all tests that need one; logical CPUs, more than a small machine has, so that stages overlap."""
    # A cluster that happens to run on this machine must not see the tests, nor the jobs that they start.
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=512 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def scene_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small checkpoint for the scene classes, with random weights of a fixed seed."""
    torch.manual_seed(0)
    config = PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", output_stride=32)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(PSPNet(config), folder, name="scenes", classes=SCENE_CLASSES)
    return folder


@pytest.fixture
def tracking_home(tmp_path: Path) -> Iterator[Path]:
    """A fresh MLflow store in the test's own folder."""
    with local_tracking(tmp_path / "tracking"):
        yield tmp_path / "tracking"


@pytest.fixture(scope="session")
def started_mlflow_server(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server that keeps its files in a bucket, started by the first test that asks for it."""
    s3_server.create_bucket("mlflow")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    with running_mlflow_server(
        tmp_path_factory.mktemp("mlflow"), artifacts="s3://mlflow", environment=inherited | s3_settings(s3_server)
    ) as server:
        yield server


@pytest.fixture
def mlflow_server(started_mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """The MLflow server, which the environment names; it runs again after a test that stopped it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started_mlflow_server.uri)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    started_mlflow_server.start()
    yield started_mlflow_server
    started_mlflow_server.start()
