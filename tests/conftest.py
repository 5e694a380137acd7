"""Fixtures for all rooms: a real S3 server and buckets on it, a Ray, a model, an MLflow store or server.

What only some tests need is imported where it is used: to import torch, Ray and MLflow takes longer than most files of
tests.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support.faultproxy import FaultProxy
from tests.support.s3server import S3Server, running_s3_server

if TYPE_CHECKING:
    from tests.support.mlflowserver import MlflowServer

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

GROUPS = {"ray_cluster": "ray", "started_mlflow_server": "mlflow"}
"""Fixtures that take long to start, and the group of the tests that share one; the first that fits counts."""
FIRST = ["ray", "mlflow", "tests/jobs", "tests/pipelines"]
"""Groups that take long begin early, so that two workers end together."""

WORKERS = {"checkpoints", "metrics-log", "mlflow-run", "sigterm", "system-metrics", "ticking"}
"""Names of the threads of ``pipelines.process.background``."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep this process, and all that it starts, away from the user's cluster, tracking server and home folder."""
    home = tempfile.TemporaryDirectory(prefix="home-")
    config.add_cleanup(home.cleanup)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ |= {"HOME": home.name, "RAY_ADDRESS": "local", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # Its list of the machine's fonts takes seconds to build.
    os.environ.setdefault("MPLCONFIGDIR", str(config.rootpath / ".pytest_cache" / "matplotlib"))


@pytest.hookimpl(tryfirst=True)  # before xdist, which looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests into groups, each of which stays on one worker; what shares no server goes by its file."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: next((rank for rank, name in enumerate(FIRST) if _group(item).startswith(name)), 99))


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    file = item.nodeid.partition("::")[0]
    return next((group for fixture, group in GROUPS.items() if fixture in fixtures), file)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Torch draws the same numbers in each test, on one thread: more only wait for one another in small models."""
    torch = sys.modules.get("torch")
    if torch:
        torch.manual_seed(0)
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """A test ends with its workers: the log of a late one would be read by the next test."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name in WORKERS:
            thread.join(60)
            assert not thread.is_alive(), f"the thread {thread.name} goes on after its test"


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
    import ray

    from pipelines.cluster.session import KEEP_IDLE

    os.environ.setdefault(*KEEP_IDLE)
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
    import torch

    from pipelines.demo.scenes import SCENE_CLASSES
    from pspnet_core.checkpoints.checkpoint import save_checkpoint
    from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

    torch.manual_seed(0)
    config = PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", output_stride=32)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(PSPNet(config), folder, name="scenes", classes=SCENE_CLASSES)
    return folder


@pytest.fixture(scope="session")
def empty_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an MLflow database without runs, to be copied: to make one takes seconds."""
    from pipelines.tracking.server import Server, local_tracking

    folder = tmp_path_factory.mktemp("empty-tracking")
    with local_tracking(folder):
        Server().client.search_experiments()
    return folder


@pytest.fixture
def tracking_home(tmp_path: Path, empty_tracking: Path) -> Iterator[Path]:
    """A fresh MLflow store in the test's own folder."""
    from pipelines.tracking.server import local_tracking

    folder = shutil.copytree(empty_tracking, tmp_path / "tracking")
    with local_tracking(folder):
        yield folder


@pytest.fixture(scope="session")
def started_mlflow_server(
    s3_server: S3Server, empty_tracking: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """A real MLflow server that keeps its files in a bucket, started by the first test that asks for it."""
    from tests.support.mlflowserver import running_mlflow_server

    s3_server.create_bucket("mlflow")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    folder = shutil.copytree(empty_tracking, tmp_path_factory.mktemp("mlflow") / "server")
    environment = inherited | s3_settings(s3_server)
    with running_mlflow_server(folder, artifacts="s3://mlflow", environment=environment) as server:
        yield server


@pytest.fixture
def mlflow_server(started_mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """The MLflow server, which the environment names; it runs again after a test that stopped it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started_mlflow_server.uri)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    started_mlflow_server.start()
    yield started_mlflow_server
    started_mlflow_server.start()
