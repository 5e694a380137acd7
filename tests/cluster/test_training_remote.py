"""Training far from its data: shards in a bucket, every loader; MLflow goes away, or the place for checkpoints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipelines.demo.demo import draw_dataset
from tests.cluster.chaos.arena import Arena
from tests.support.faultproxy import Rule, hang, reset
from tests.support.mlflowserver import MlflowServer
from tests.support.paths import ROOT
from tests.support.s3server import S3Server
from tests.support.trainjob import Job, Trained, result
from tests.support.waiting import PATIENCE_S, until

EPOCHS, STEPS = 2, 8  # of 16 images, 4 a step
HELD = 60
"""The request for a shard that nobody answers for a while: checking the data takes 56, the first two steps three more,
the whole run about 100."""
PREDICT = """
import os
import sys
import mlflow.pyfunc
import numpy as np

print(mlflow.pyfunc.load_model(sys.argv[1], dst_path=os.getcwd()).predict(np.zeros((2, 40, 56, 3), np.uint8)).shape)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A cluster, a bucket behind its proxy, and an MLflow server."""

    arena: Arena
    mlflow: MlflowServer
    bucket: str

    def job(self, loader: str) -> Job:
        """Trains on the bucket's shards with this loader."""
        return Job(
            f"{self.bucket}/data",
            f"{self.bucket}/runs",
            address=self.arena.cluster.address,
            tracking=self.mlflow.uri,
            name=f"remote-{loader}",
            layout="shards",
            loader=loader,
            workers=2,
            gpus=0,
            epochs=EPOCHS,
        )


@pytest.fixture(scope="module")
def place(
    arena: Arena, s3_server: S3Server, started_mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    started_mlflow_server.start()
    bucket = f"remote-{uuid.uuid4().hex}"
    s3_server.create_bucket(bucket)
    place = Place(arena=arena, mlflow=started_mlflow_server, bucket=f"s3://{bucket}")
    prepare(place, tmp_path_factory.mktemp("scenes"))
    return place


def prepare(place: Place, folder: Path) -> None:
    """Pack scenes into the bucket."""
    draw_dataset(folder, train=16, val=2, seed=0)
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), f"--data={folder}", f"--output={place.bucket}/data"]
    environment = os.environ | {"RAY_ADDRESS": place.arena.cluster.address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def by_threads(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The server goes when it has some steps, and comes back when all are taken."""
    log, job = tmp_path_factory.mktemp("threads") / "log", place.job("threads")
    rule = place.arena.proxy.add(Rule(hang, method="GET", path="/data/shards/", first=HELD))
    with job.running(log) as process:
        until(lambda: bool(rule.hits), process, log)  # from here on no step is made until the rule lets go
        until(lambda: bool(job.points()), process, log)
        taken = len(job.points())
        place.mlflow.stop()
        place.arena.proxy.clear()
        until(lambda: job.step() == STEPS, process, log)
        assert process.poll() is None  # it waits
        place.mlflow.start()
        assert 0 < taken < STEPS
        return Trained(job=job, result=result(process, log))


@pytest.fixture(scope="module")
def by_ray(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The place for checkpoints goes after the first of them, and comes back when all the other steps are taken."""
    log, job = tmp_path_factory.mktemp("ray") / "log", place.job("ray")
    with job.running(log) as process:
        until(lambda: job.step() >= 1, process, log)
        assert job.run_id  # kept from now on, as the bucket will not tell
        away = place.arena.proxy.add(Rule(reset, path="[/=]runs/"))
        until(lambda: len(job.losses()) == STEPS, process, log)
        place.arena.proxy.clear()
        assert away.hits
        return Trained(job=job, result=result(process, log))


def test_the_loaders_make_the_same_weights_of_a_bucket(by_threads: Trained, by_ray: Trained) -> None:
    assert by_threads.job.fingerprint(STEPS) == by_ray.job.fingerprint(STEPS)
    assert by_threads.result["metrics"] == by_ray.result["metrics"]


def test_a_bucket_that_goes_away_loses_no_checkpoint(by_ray: Trained) -> None:
    folder = by_ray.job.folder
    (best,) = (entry for entry in folder.entries() if folder.store.uri_of(entry.model) == by_ray.result["checkpoint"])
    assert best.progress.metrics["miou"] == by_ray.result["metrics"]["miou"]


def test_a_server_that_goes_away_in_training_misses_nothing(by_threads: Trained, by_ray: Trained) -> None:
    run_id, client = by_threads.job.run_id, MlflowClient(by_threads.job.tracking)
    assert by_threads.result["run_id"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert sorted(point.step for point in by_threads.job.points()) == list(range(1, STEPS + 1))
    assert by_threads.job.losses() == by_ray.job.losses()
    assert sorted(point.step for point in client.get_metric_history(run_id, "miou")) == list(range(1, EPOCHS + 1))
    for kind in ("confusion", "examples"):
        found = {entry.path for entry in client.list_artifacts(run_id, kind)}
        assert found == {f"{kind}/epoch-{number:04d}.png" for number in range(1, EPOCHS + 1)}


def test_its_model_is_registered_and_predicts(by_threads: Trained, tmp_path: Path) -> None:
    version = MlflowClient(by_threads.job.tracking).get_model_version_by_alias("remote-threads", "champion")
    assert by_threads.result["champion"]
    assert f"models:/remote-threads/{version.version}" == by_threads.result["model"]
    assert version.run_id == by_threads.job.run_id
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHONPATH"))}
    said = subprocess.run(
        [sys.executable, "-c", PREDICT, "models:/remote-threads@champion"],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": by_threads.job.tracking, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split("\n")[-2] == "(2, 40, 56)"
