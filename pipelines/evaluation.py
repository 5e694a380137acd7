"""Evaluation: the ``Segmenter`` of labelling over labelled pairs, spread over the cluster as Ray Data.

pairs -> chunks of pairs -> actors that label and count -> scores added up on the driver, which holds one sum.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import torch

from pipelines import tracking
from pipelines.cluster import Pool, Share, WorkerRange, own_errors, quiet_ray_data, ray_session
from pipelines.datasets import Dataset, Pair, open_dataset
from pipelines.scoring import tally
from pspnet_core.checkpoints import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.inference import Segmenter
from pspnet_core.metrics import BoundaryCounts, ConfusionMatrix, Scores

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
    compile: bool = False
    """Whether the network is compiled (CUDA graphs on GPUs): for many images of one size."""

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
        compile: bool,
        share: Share,
    ) -> None:
        torch.set_num_threads(share.threads_here())
        model: Checkpoint = ray.get(checkpoint)
        self.dataset, self.pairs = dataset, pairs
        self.segmenter = Segmenter(model.model, model.inference, batch=batch, compile=compile)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The counts of the pairs ``start..stop``: ``confusion (C, C)`` and ``boundary (2, C)``."""
        pairs = self.pairs[row["start"] : row["stop"]]
        scores = tally(self.segmenter, self.dataset, pairs, Scores.empty(len(self.dataset.classes)))
        return {"confusion": scores.confusion.counts, "boundary": scores.boundary.counts}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the split.

    Returns:
        ``miou``, ``macc``, ``aacc``, ``dice`` and ``boundary_iou`` (means over the classes), ``iou`` (class name ->
        value, NaN for a class that neither masks nor predictions hold), ``images`` and ``model``.

    Raises:
        ConfigError: a mistake in the config or in the data.
    """
    checkpoint = tracking.load_rgb_model(config.model)
    checkpoint = checkpoint.with_inference(scales=config.scales, flip=config.flip, window=config.window)
    dataset = open_dataset(config.data, config.layout)
    pairs = dataset.split(config.split)
    if dataset.classes.names != checkpoint.classes.names:
        known, found = (", ".join(table.names[:4]) for table in (checkpoint.classes, dataset.classes))
        remedy = f"its {len(checkpoint.classes)} classes ({known}, ...) are not the {len(dataset.classes)} of the data"
        raise ConfigError("model", config.model, f"{remedy} ({found}, ...); use a model of this data")
    with ray_session():
        scores = _scores(config, checkpoint, dataset, pairs)
    confusion = scores.confusion
    return {
        "miou": confusion.miou,
        "macc": confusion.macc,
        "aacc": confusion.aacc,
        "dice": confusion.mdice,
        "boundary_iou": scores.boundary.miou,
        "iou": dict(zip(checkpoint.classes.names, confusion.iou().tolist(), strict=True)),
        "images": len(pairs),
        "model": checkpoint.partition,
    }


def _scores(config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset, pairs: Sequence[Pair]) -> Scores:
    """The split's counts, from actors over chunks of it."""
    pool = Pool.of(config.workers, config.gpus, reserve=0.0)
    quiet_ray_data()
    chunks = [{"start": start, "stop": start + CHUNK} for start in range(0, len(pairs), CHUNK)]
    rows = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map(
        Score,  # type: ignore[arg-type]  # a class is built once per actor
        fn_constructor_args=(dataset, pairs, ray.put(checkpoint), config.batch, config.compile, pool.share),
        compute=ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
        num_cpus=pool.share.cpus,
        num_gpus=pool.share.gpus or None,
    )
    classes = len(dataset.classes)
    total = Scores.empty(classes)
    for row in own_errors(rows.iter_rows()):
        total += Scores(
            confusion=ConfusionMatrix(classes, row["confusion"]),
            boundary=BoundaryCounts(classes, row["boundary"]),
        )
    return total
