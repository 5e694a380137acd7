"""The first worker's record of a run: metrics in MLflow and checkpoints. Training waits for neither."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipelines.evaluation.charts import confusion_picture, validation_sheet
from pipelines.evaluation.scoring import Compared
from pipelines.tracking.metrics_log import MetricsLog
from pipelines.tracking.runs import Run
from pipelines.tracking.system_metrics import log_system_metrics
from pipelines.training.checkpointing import CheckpointFolder, CheckpointWriter, Snapshot
from pspnet_core.images.classes import ClassTable
from pspnet_core.metrics.confusion import ConfusionMatrix

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Metrics of every step, scores and pictures of every epoch, checkpoints."""

    metrics: MetricsLog
    writer: CheckpointWriter

    @classmethod
    @contextlib.contextmanager
    def opened(cls, run: Run, folder: CheckpointFolder, newest: Snapshot | None, *, keep: int) -> Iterator["Record"]:
        """Open the record of a run that starts or resumes from its newest checkpoint; on leaving, write what waits."""
        with MetricsLog(run) as metrics, contextlib.closing(CheckpointWriter(folder, keep=keep)) as writer:
            if newest:
                metrics.restore(newest.progress.unsent)
            with log_system_metrics(metrics):
                yield cls(metrics, writer)

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics as ``step/<name>``; steps count from 1 over the whole run."""
        self.metrics.add(number, {f"step/{name}": value for name, value in metrics.items()})

    def epoch(
        self,
        metrics: Mapping[str, float],
        confusion: ConfusionMatrix,
        examples: Sequence[Compared],
        classes: ClassTable,
    ) -> None:
        """Log an epoch's metrics, by the number of the epoch, its confusion matrix and examples as pictures."""
        number = int(metrics["epoch"])
        self.metrics.add(number, metrics)
        self.metrics.add_file(f"confusion/epoch-{number:04d}.png", confusion_picture(confusion, classes))
        self.metrics.add_file(f"examples/epoch-{number:04d}.png", validation_sheet(examples, classes))

    def save(self, snapshot: Snapshot) -> None:
        """Queue a checkpoint; it carries what the tracking server has not taken yet."""
        progress = dataclasses.replace(snapshot.progress, unsent=self.metrics.pending())
        self.writer.submit(dataclasses.replace(snapshot, progress=progress))


class Clock:
    """Measures how long steps take and how long they wait for data.

    Attributes:
        batch: images per step over all workers.
        waited: seconds that the last batch took to come.
        took: seconds of the last step, waiting included.
        steps, seconds: of all steps so far.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.waited = self.took = self.seconds = 0.0
        self.steps = 0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on and measure how long each takes to come."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited = time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def tick(self) -> None:
        """Count a step that has ended."""
        now = time.perf_counter()
        self.took, self._since = now - self._since, now
        self.seconds += self.took
        self.steps += 1

    def restart(self) -> None:
        """Start counting again, after time that belongs to no step."""
        self.seconds, self.steps, self._since = 0.0, 0, time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Speed of all workers together, since the start or the last ``restart``."""
        return self.batch * self.steps / self.seconds if self.seconds else 0.0

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step: images per second, milliseconds of waiting for data, MB of this worker's memory."""
        return {
            "images_per_second": self.batch / self.took,
            "data_wait_ms": 1000 * self.waited,
            "memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """Peak memory of this process in MB: of the GPU where it has one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
