"""``jobs/train.py`` as a process of its own, and what can be seen of its run from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from pipelines.storage import open_store
from pipelines.training.checkpointing import CheckpointFolder
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE_S

FLAGS = {"backbone": "resnet18", "output_stride": 32, "bins": "1,2", "crop": 48, "image_scale": 0.5, "batch": 4}
FLAGS |= {"epochs": 5, "checkpoint_every": 1, "ema": 0.5, "deterministic": True}


class Job:
    """A training run.

    Args:
        address: of the Ray cluster.
        tracking: of MLflow.
        flags: beside, or in place of, ``FLAGS``.
    """

    def __init__(
        self, data: Path | str, output: Path | str, *, address: str, tracking: str, name: str, **flags: Any
    ) -> None:
        self.output, self.name, self.tracking = output, name, tracking
        given = FLAGS | {"data": data, "output": output, "name": name} | flags
        arguments = [f"--{key}={value}" for key, value in given.items()]
        self.command = [sys.executable, str(ROOT / "jobs/train.py"), *arguments]
        self.folder = CheckpointFolder(open_store(str(output), field="output"), name)
        servers = {"RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": tracking}
        self.environment = os.environ | servers | {"OMP_NUM_THREADS": "1"}

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        pipe = subprocess.PIPE
        with (
            log.open("ab") as errors,
            subprocess.Popen(self.command, env=self.environment, stdout=pipe, stderr=errors) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def step(self) -> int:
        """The newest step that was saved."""
        if isinstance(self.output, Path) and not self.output.is_dir():
            return 0
        return max((entry.progress.step for entry in self.folder.entries()), default=0)

    @functools.cached_property
    def run_id(self) -> str:
        """Of the run in MLflow, once it has begun."""
        record: dict[str, str] = json.loads(self.folder.store.read(f"{self.name}/config.json"))
        return record["run_id"]

    def points(self) -> list[Metric]:
        """What MLflow knows of the steps' losses."""
        found: list[Metric] = list(MlflowClient(self.tracking).get_metric_history(self.run_id, "step/loss"))
        return found

    def losses(self) -> dict[int, float]:
        """The loss of each step that MLflow knows of; a step that was taken twice gave the same both times."""
        found = {(point.step, point.value) for point in self.points()}
        losses = dict(found)
        assert len(losses) == len(found), sorted(found)
        return losses

    def fingerprint(self, step: int) -> str:
        """Of the newest checkpoint, which is that of this step."""
        newest = self.folder.newest()
        assert newest is not None
        assert newest.progress.step == step
        return newest.model.fingerprint


def result(process: subprocess.Popen[bytes], log: Path) -> Any:
    """The job's JSON line, once it has ended well."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, log.read_text()[-3000:]
    return json.loads(output.splitlines()[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that is done, and its JSON line."""

    job: Job
    result: dict[str, Any]


def completed(job: Job, log: Path) -> Trained:
    """Run a job that nothing happens to."""
    with job.running(log) as process:
        return Trained(job=job, result=result(process, log))
