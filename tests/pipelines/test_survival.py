"""Training on several Ray nodes, of which workers, a node and the driver are killed: it ends with the same bits."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from pipelines.checkpointing import CheckpointFolder
from pipelines.demo import draw_dataset
from pipelines.storage import open_store
from tests.faultproxy import FaultProxy

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
FLAGS = {
    "backbone": "resnet18",
    "stride": 32,
    "bins": "1,2",
    "crop": 48,
    "resize": 0.5,
    "batch": 4,
    "epochs": 5,
    "every": 1,
    "ema": 0.5,
    "deterministic": True,
}
STEPS = 30  # 5 epochs of 24 images
EPOCHS = 10_000  # more than the test waits for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, train=24, val=2, seed=0)
    return folder


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that has no room for workers; the tests add nodes."""
    # A node that is gone is noticed soon.
    health = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
    # Although there is no dashboard, Ray looks at its usual port, and leaks a socket where somebody else has that.
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": 0, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


class Job:
    """``jobs/train.py`` as a process of its own."""

    def __init__(self, cluster: Cluster, data: Path, output: Path | str, home: Path, **flags: Any) -> None:
        self.cluster, self.output = cluster, output
        given = FLAGS | {"data": data, "output": output, "name": "survivor"} | flags
        self.command = [
            sys.executable,
            str(ROOT / "jobs/train.py"),
            *(f"--{key}={value}" for key, value in given.items()),
        ]
        self.folder = CheckpointFolder(open_store(str(output), field="output"), "survivor")
        self.tracking = f"sqlite:///{home / 'mlflow.db'}"
        self.environment = os.environ | {
            "RAY_ADDRESS": cluster.address,
            "MLFLOW_TRACKING_URI": self.tracking,
            "OMP_NUM_THREADS": "1",
        }

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        with log.open("ab") as errors, self._started(errors) as process:
            try:
                yield process
            finally:
                process.kill()

    def _started(self, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, env=self.environment, stdout=subprocess.PIPE, stderr=errors)

    def step(self) -> int:
        """The newest step that was saved."""
        if isinstance(self.output, Path) and not self.output.is_dir():
            return 0
        return max((entry.progress.step for entry in self.folder.entries()), default=0)

    @functools.cached_property
    def run_id(self) -> str:
        """Of the run in MLflow, once it has begun."""
        record: dict[str, str] = json.loads(self.folder.store.read("survivor/config.json"))
        return record["run_id"]

    def losses(self) -> dict[int, float]:
        """The loss of each step that MLflow knows of."""
        points = MlflowClient(self.tracking).get_metric_history(self.run_id, "step/loss")
        return {point.step: point.value for point in points}

    def fingerprint(self) -> str:
        newest = self.folder.newest()
        assert newest is not None
        assert newest.progress.step == STEPS
        return newest.model.fingerprint


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a condition while the job runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def result(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, log.read_text()[-3000:]
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def workers_of(node: Any) -> list[int]:
    """Process ids of the training workers that a node has started."""
    (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            parent = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid:"))
            title = status.with_name("cmdline").read_text()
            if int(parent) == raylet and "TrainWorker" in title:
                found.append(int(status.parent.name))
    return found


def test_whatever_is_killed_the_weights_are_the_same(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A worker, then a whole node, then the driver; after each the run goes on, from where it was."""
    first, second = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    log = tmp_path / "log"
    undisturbed = Job(cluster, data, tmp_path / "undisturbed", tmp_path, workers=2)
    with undisturbed.running(log) as process:
        expected = result(process, log)

    job = Job(cluster, data, tmp_path / "disturbed", tmp_path, workers=2)
    with job.running(log) as process:
        until(lambda: job.step() >= 4, process, log)
        (worker,) = workers_of(first)
        os.kill(worker, signal.SIGKILL)
        until(lambda: job.step() >= 11, process, log)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        until(lambda: job.step() >= 19, process, log)
        process.kill()
    assert job.step() < STEPS
    resumed = Job(cluster, data, tmp_path / "disturbed", tmp_path, workers=2, resume=True)
    with resumed.running(log) as process:
        found = result(process, log)
    assert resumed.fingerprint() == undisturbed.fingerprint()
    assert found["metrics"] == expected["metrics"]
    assert found["epoch"] == expected["epoch"]
    # One run in MLflow, every step logged, the losses those of the undisturbed run.
    assert found["run_id"] == job.run_id
    assert job.losses() == undisturbed.losses()
    assert sorted(job.losses()) == list(range(1, STEPS + 1))


def test_a_range_of_workers_shrinks_and_grows(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    log = tmp_path / "log"
    job = Job(cluster, data, tmp_path / "runs", tmp_path, workers="1:2", grow=1, epochs=EPOCHS)
    job.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    with job.running(log) as process:
        until(lambda: job.step() >= 4, process, log)
        assert job.folder.entries()[-1].progress.workers == 2
        cluster.remove_node(second, allow_graceful=False)
        until(lambda: job.folder.entries()[-1].progress.workers == 1, process, log)
        cluster.add_node(num_cpus=1)
        until(lambda: job.folder.entries()[-1].progress.workers == 2, process, log)
    # Each went on from where the one before was.
    assert 4 < job.step() < 6 * EPOCHS


def test_a_bucket_that_goes_away_loses_nothing(
    s3_proxy: FaultProxy, s3_bucket: str, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """The bucket for checkpoints goes after some steps, and comes back when all the others are taken."""
    log = tmp_path / "log"
    cluster.add_node(num_cpus=1)
    job = Job(cluster, data, f"{s3_bucket}/runs", tmp_path, workers=1)
    with job.running(log) as process:
        until(lambda: job.step() >= 2, process, log)
        assert job.run_id  # kept from now on, as the bucket will not tell
        with s3_proxy.unreachable():
            until(lambda: len(job.losses()) == STEPS, process, log)
        found = result(process, log)
    (best,) = (entry for entry in job.folder.entries() if job.folder.store.uri_of(entry.model) == found["checkpoint"])
    assert best.progress.metrics["miou"] == found["metrics"]["miou"]
    assert job.fingerprint()
