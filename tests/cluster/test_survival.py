"""Training on several Ray nodes, of which workers, a node and the driver are killed: it ends with the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipelines.demo.demo import draw_dataset
from tests.support.faultproxy import FaultProxy
from tests.support.trainjob import Job, result
from tests.support.waiting import until

STEPS = 30  # 5 epochs of 24 images, 4 a step
WORKERS = 3
"""Numbers that two workers add up have the same sum in either order; with three a change of order shows."""
THREE = {"workers": WORKERS, "batch": 6, "checkpoint_every": 2}
THREE_STEPS = 20
SEED = int(os.environ.get("SURVIVAL_SEED", random.SystemRandom().randrange(2**32)))
EPOCHS = 10_000  # more than the test waits for
BEFORE = 8
"""Steps that are taken before a node goes."""


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


def job_of(cluster: Cluster, data: Path, output: Path | str, home: Path, **flags: Any) -> Job:
    tracking = f"sqlite:///{home / 'mlflow.db'}"
    return Job(data, output, address=cluster.address, tracking=tracking, name="survivor", **flags)


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


@pytest.mark.parametrize("seed", [SEED])  # in the name of the test, so that a failure shows it
def test_whatever_is_killed_the_weights_are_the_same(cluster: Cluster, data: Path, tmp_path: Path, seed: int) -> None:
    """A worker, then a whole node, then the driver; after each the run goes on, from a checkpoint before."""
    chance = random.Random(seed)
    first, second, third = sorted(chance.sample(range(2, THREE_STEPS - 5), 3))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
    struck, lost = chance.sample(nodes, 2)
    log = tmp_path / "log"
    undisturbed = job_of(cluster, data, tmp_path / "undisturbed", tmp_path, **THREE)
    with undisturbed.running(log) as process:
        expected = result(process, log)

    job = job_of(cluster, data, tmp_path / "disturbed", tmp_path, **THREE)
    with job.running(log) as process:
        until(lambda: job.step() >= first, process, log)
        (worker,) = workers_of(struck)
        os.kill(worker, signal.SIGKILL)
        until(lambda: job.step() >= second, process, log)
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        until(lambda: job.step() >= third, process, log)
        process.kill()
    assert job.step() < THREE_STEPS
    resumed = job_of(cluster, data, tmp_path / "disturbed", tmp_path, **THREE, resume=True)
    with resumed.running(log) as process:
        found = result(process, log)
    assert resumed.fingerprint(THREE_STEPS) == undisturbed.fingerprint(THREE_STEPS)
    assert found["metrics"] == expected["metrics"]
    assert found["epoch"] == expected["epoch"]
    # One run in MLflow, every step logged, the losses those of the undisturbed run.
    assert found["run_id"] == job.run_id
    assert job.losses() == undisturbed.losses()
    assert sorted(job.losses()) == list(range(1, THREE_STEPS + 1))


def test_a_range_of_workers_shrinks_and_grows(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    log = tmp_path / "log"
    job = job_of(cluster, data, tmp_path / "runs", tmp_path, workers="1:2", resize_interval=1, epochs=EPOCHS)
    job.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    with job.running(log) as process:
        until(lambda: job.step() >= BEFORE, process, log)
        assert job.folder.entries()[-1].progress.workers == 2
        cluster.remove_node(second, allow_graceful=False)
        until(lambda: job.folder.entries()[-1].progress.workers == 1, process, log)
        cluster.add_node(num_cpus=1)
        until(lambda: job.folder.entries()[-1].progress.workers == 2, process, log)
    # Each went on from where the one before was: from the start again, all of the first steps would be there twice.
    early = {(point.step, point.timestamp) for point in job.points() if point.step <= BEFORE}
    assert sorted(step for step, _ in early) == list(range(1, BEFORE + 1))


def test_a_bucket_that_goes_away_loses_nothing(
    s3_proxy: FaultProxy, s3_bucket: str, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """The bucket for checkpoints goes after some steps, and comes back when all the others are taken."""
    log = tmp_path / "log"
    cluster.add_node(num_cpus=1)
    job = job_of(cluster, data, f"{s3_bucket}/runs", tmp_path, workers=1)
    with job.running(log) as process:
        until(lambda: job.step() >= 2, process, log)
        assert job.run_id  # kept from now on, as the bucket will not tell
        with s3_proxy.unreachable():
            until(lambda: len(job.losses()) == STEPS, process, log)
        found = result(process, log)
    (best,) = (entry for entry in job.folder.entries() if job.folder.store.uri_of(entry.model) == found["checkpoint"])
    assert best.progress.metrics["miou"] == found["metrics"]["miou"]
    assert job.fingerprint(STEPS)
