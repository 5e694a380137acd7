"""One cluster of several nodes for all who kill something on it, and a training run there that nothing disturbs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.demo import draw_dataset
from tests.cluster.chaos.arena import Arena, open_arena
from tests.support.s3server import S3Server
from tests.support.trainjob import Job, Trained, completed

SEED = int(os.environ.get("SURVIVAL_SEED", "0"))
"""Draws when things happen and whom they hit; ``make test-all`` takes another one each time."""
TRAINING: dict[str, Any] = {"workers": 3, "batch": 6, "checkpoint_every": 2, "epochs": 3, "gpus": 0}
"""Numbers that two workers add up have the same sum in either order; with three a change of order shows."""
STEPS = 12  # 3 epochs of 24 images, 6 a step


def pytest_report_header() -> str:
    """The seed, by which a failure can be repeated."""
    return f"SURVIVAL_SEED={SEED}"


@pytest.fixture(scope="session")
def arena(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A cluster, a bucket behind a proxy, and a plan that was labelled undisturbed."""
    with open_arena(tmp_path_factory.mktemp("arena"), s3_server, workers=1) as arena:
        yield arena


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks to train on."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, train=24, val=2, seed=0)
    return folder


def training_of(arena: Arena, scenes: Path, home: Path, **flags: Any) -> Job:
    """A run on the arena's nodes, with its files and its MLflow store in ``home``."""
    tracking = f"sqlite:///{home / 'mlflow.db'}"
    given = TRAINING | {"output": home / "runs"} | flags
    return Job(scenes, given.pop("output"), address=arena.cluster.address, tracking=tracking, name="survivor", **given)


@pytest.fixture(scope="session")
def undisturbed(arena: Arena, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What a run comes to that nobody disturbs."""
    home = tmp_path_factory.mktemp("undisturbed")
    return completed(training_of(arena, scenes, home), home / "log")


def check_same(job: Job, result: dict[str, Any], undisturbed: Trained) -> None:
    """The same weights, metrics and losses, and one run in MLflow with every step."""
    assert job.fingerprint(STEPS) == undisturbed.job.fingerprint(STEPS)
    assert result["metrics"] == undisturbed.result["metrics"]
    assert result["epoch"] == undisturbed.result["epoch"]
    assert result["run_id"] == job.run_id
    assert job.losses() == undisturbed.job.losses()
    assert sorted(job.losses()) == list(range(1, STEPS + 1))
