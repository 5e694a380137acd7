"""Evaluation: the ``Segmenter`` of labelling over labelled pairs, spread over the cluster as Ray Data.

pairs -> chunks of pairs -> actors that label and count -> confusion matrices added up on the driver.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from pipelines import tracking
from pipelines.cluster import Pool, Share, WorkerRange, own_errors, quiet_ray_data, ray_session
from pipelines.datasets import Dataset, Pair, open_dataset
from pipelines.scoring import score
from pspnet_core.checkpoints import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.inference import Segmenter
from pspnet_core.metrics import ConfusionMatrix

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on labelled images at their own size."""

    data: str
    """Labelled images: a local folder or a URI (s3://...)."""
    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    layout: str = "folder"
    """How the data is laid out; a row of LAYOUTS."""
    split: str = "val"
    """Split to score."""
    workers: str | None = None
    """Model actors: N or MIN:MAX; by default up to one per GPU, or one on CPUs."""
    gpus: float | None = None
    """GPUs per actor; by default 1 when the cluster has any."""
    batch: int = 8
    """Most images in one forward pass."""
    scales: tuple[float, ...] | None = None
    """Input scales to average over; by default the checkpoint's."""
    flip: bool | None = None
    """Whether to average with the mirrored image; by default the checkpoint's setting."""
    window: int | None = None
    """Side of the sliding window in pixels, 0 for whole images; by default the checkpoint's."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError("batch", self.batch, "give a positive number")
        if self.workers is not None:
            WorkerRange.parse(self.workers)


CHUNK = 64  # pairs per task; large enough for full batches


class Score:
    """Actor that scores chunks of a split."""

    def __init__(
        self,
        dataset: Dataset,
        pairs: Sequence[Pair],
        checkpoint: "ray.ObjectRef[Checkpoint]",
        batch: int,
        share: Share,
    ) -> None:
        torch.set_num_threads(share.threads_here())
        model: Checkpoint = ray.get(checkpoint)
        self.dataset, self.pairs = dataset, pairs
        self.segmenter = Segmenter(model.model, model.inference, batch=batch)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The confusion matrix ``(C, C)`` of the pairs ``start..stop``."""
        pairs = self.pairs[row["start"] : row["stop"]]
        return {"images": len(pairs), "counts": score(self.segmenter, self.dataset, pairs).counts}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the split.

    Returns:
        ``miou``, ``macc``, ``aacc``, ``iou`` (class name -> value, NaN for a class that neither masks nor predictions
        hold) and ``images``.

    Raises:
        ConfigError: a mistake in the config or in the data.
    """
    checkpoint = tracking.load_model(config.model)
    checkpoint = checkpoint.with_inference(scales=config.scales, flip=config.flip, window=config.window)
    dataset = open_dataset(config.data, config.layout)
    pairs = dataset.split(config.split)
    if dataset.classes.names != checkpoint.classes.names:
        known, found = (", ".join(table.names[:4]) for table in (checkpoint.classes, dataset.classes))
        remedy = f"its {len(checkpoint.classes)} classes ({known}, ...) are not the {len(dataset.classes)} of the data"
        raise ConfigError("model", config.model, f"{remedy} ({found}, ...); use a model of this data")
    with ray_session():
        confusion = _confusion(config, checkpoint, dataset, pairs)
    return {
        "miou": confusion.miou,
        "macc": confusion.macc,
        "aacc": confusion.aacc,
        "iou": dict(zip(checkpoint.classes.names, confusion.iou().tolist(), strict=True)),
        "images": len(pairs),
        "model": checkpoint.partition,
    }


def _confusion(
    config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset, pairs: Sequence[Pair]
) -> ConfusionMatrix:
    """The split's confusion matrix, from actors over chunks of it."""
    pool = Pool.of(config.workers, config.gpus, reserve=0.0)
    quiet_ray_data()
    chunks = [{"start": start, "stop": start + CHUNK} for start in range(0, len(pairs), CHUNK)]
    rows = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map(
        Score,  # type: ignore[arg-type]  # a class is built once per actor
        fn_constructor_args=(dataset, pairs, ray.put(checkpoint), config.batch, pool.share),
        compute=ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
        num_cpus=pool.share.cpus,
        num_gpus=pool.share.gpus or None,
    )
    total = ConfusionMatrix(len(dataset.classes))
    for row in own_errors(rows.iter_rows()):
        part = ConfusionMatrix(len(dataset.classes))
        part.counts[:] = np.asarray(row["counts"])
        total = total + part
    return total
