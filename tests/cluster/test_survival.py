"""Training on several nodes of which one goes, whose driver is killed, or that shrinks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.chaos.arena import NODE, Arena, running_cluster
from tests.cluster.conftest import SEED, STEPS, check_same, training_of
from tests.support.trainjob import Job, Trained, result
from tests.support.waiting import until

EPOCHS = 10_000  # more than the test waits for


def test_a_node_and_the_driver_are_killed_and_the_weights_are_the_same(
    arena: Arena, scenes: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    first, second = sorted(chance.sample(range(2, STEPS - 5), 2))
    job, log = training_of(arena, scenes, tmp_path), tmp_path / "log"
    with job.running(log) as process:
        until(lambda: job.step() >= first, process, log)
        struck = next(node for node in arena.cluster.worker_nodes if arena.processes("TrainWorker", [node]))
        arena.cluster.remove_node(struck, allow_graceful=False)
        arena.cluster.add_node(**NODE)
        until(lambda: job.step() >= second, process, log)
        process.kill()
    assert job.step() < STEPS
    resumed = training_of(arena, scenes, tmp_path, resume=True)
    with resumed.running(log) as process:
        found = result(process, log)
    check_same(resumed, found, undisturbed)


@pytest.fixture
def small_cluster() -> Iterator[Cluster]:
    """Two nodes with room for one worker each."""
    with running_cluster(num_cpus=1) as cluster:
        yield cluster


def test_a_range_of_workers_shrinks_and_grows(small_cluster: Cluster, scenes: Path, tmp_path: Path) -> None:
    log, tracking = tmp_path / "log", f"sqlite:///{tmp_path / 'mlflow.db'}"
    flags = {"workers": "1:2", "resize_interval": 1, "epochs": EPOCHS}
    job = Job(scenes, tmp_path / "runs", address=small_cluster.address, tracking=tracking, name="survivor", **flags)
    job.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    with job.running(log) as process:
        until(lambda: job.step() >= 4, process, log)
        assert job.folder.entries()[-1].progress.workers == 2
        small_cluster.remove_node(next(iter(small_cluster.worker_nodes)), allow_graceful=False)
        until(lambda: job.folder.entries()[-1].progress.workers == 1, process, log)
        small_cluster.add_node(num_cpus=1)
        until(lambda: job.folder.entries()[-1].progress.workers == 2, process, log)
    # Nobody began anew: steps that are before the first checkpoint were taken once.
    assert [point.step for point in job.points() if point.step <= 2] == [1, 2]
