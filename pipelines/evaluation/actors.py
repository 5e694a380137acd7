"""The actors that score a split: each holds the model, labels chunks of pairs and counts; the driver adds up."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from pipelines.cluster.ray_data import quiet_ray_data, rows_of
from pipelines.cluster.resources import ActorConfig, ActorResources, Pool
from pipelines.cluster.session import ray_session
from pipelines.datasets.dataset import Dataset, Pair
from pipelines.evaluation.scoring import Compared, chunked, compare
from pipelines.evaluation.tables import IMAGE_SCORES, image_row, worst_first
from pipelines.models.loading import check_rgb
from pipelines.storage.arrow import from_ipc, to_ipc
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import BoundaryCounts, ConfusionMatrix, Scores
from pspnet_core.threads import map_ahead

TASK = 8
"""Most chunks of one task, across which an actor reads ahead."""


class Score:
    """Actor that scores chunks of a split."""

    def __init__(
        self,
        dataset: Dataset,
        pairs: Sequence[Pair],
        checkpoint: "ray.ObjectRef[Checkpoint]",
        config: ActorConfig,
        actor: ActorResources,
    ) -> None:
        resources = actor.here()
        self.threads = resources.threads
        torch.set_num_threads(self.threads)
        model: Checkpoint = ray.get(checkpoint)
        self.dataset, self.pairs = dataset, pairs
        memory = resources.pass_memory
        self.segmenter = Segmenter(
            model.model, model.settings, batch=config.batch, memory=memory, compile=config.compile
        )
        self.batched = True if config.compile else None  # what is compiled is for one thread at a time

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the pairs ``start..stop``.

        Returns:
            ``confusion`` (C, C) and ``boundary`` (2, C), the counts of all of them; ``images``, an ``IMAGE_SCORES``
            table as an Arrow stream.
        """
        pairs = self.pairs[row["start"] : row["stop"]]
        total, rows = Scores.empty(len(self.dataset.classes)), []
        with ThreadPoolExecutor(self.threads) as pool:
            compared = compare(self.segmenter, self.dataset, pairs, threads=self.threads, batched=self.batched)
            # Counting boundaries takes time as decoding does: beside the network, not after it.
            for scores, image in map_ahead(pool, self._measure, compared, depth=self.threads):
                total += scores
                rows.append(image)
        images = pa.Table.from_pylist(rows, schema=IMAGE_SCORES)
        return {
            "confusion": total.confusion.counts,
            "boundary": total.boundary.counts,
            "images": to_ipc(images),
        }

    def _measure(self, found: Compared) -> tuple[Scores, dict[str, Any]]:
        """An image's own counts, and its row."""
        scores = Scores.empty(len(self.dataset.classes))
        scores.update(found.mask, found.target, ignore=self.dataset.classes.ignore)
        return scores, image_row(found, scores, self.dataset)


def score_checkpoint(checkpoint: Checkpoint, dataset: Dataset, split: str, *, gpus: float | None = None) -> float:
    """The mIoU of a model on a split, measured as ``evaluate`` does by default; nothing is written or logged.

    Args:
        gpus: GPUs of each actor; by default 1 when the cluster has any.

    Raises:
        ConfigError: the model has other classes or bands than the data, or a pair cannot be read.
    """
    pairs = dataset.split(split)
    check_rgb(checkpoint, checkpoint.name)
    check_classes(checkpoint, dataset, uri=checkpoint.name)
    with ray_session():
        scores, _ = score_split(checkpoint, dataset, pairs, ActorConfig(gpus=gpus))
    return scores.confusion.miou


def score_split(
    checkpoint: Checkpoint, dataset: Dataset, pairs: Sequence[Pair], config: ActorConfig
) -> tuple[Scores, pa.Table]:
    """The split's counts and its images' rows, from actors over chunks of it."""
    pool = Pool.of(config, reserve=0.0)
    quiet_ray_data()
    tasks = _tasks(pairs, config.batch, workers=pool.high)
    answers = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        Score,  # type: ignore[arg-type]  # a class is built once per actor
        fn_constructor_args=(dataset, pairs, ray.put(checkpoint), config, pool.actor),
        compute=ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
        num_cpus=pool.actor.cpus,
        num_gpus=pool.actor.gpus or None,
    )
    classes = len(dataset.classes)
    total, images = Scores.empty(classes), []
    for answer in rows_of(answers):
        total += Scores(
            confusion=ConfusionMatrix(classes, answer["confusion"]),
            boundary=BoundaryCounts(classes, answer["boundary"]),
        )
        images.append(from_ipc(answer["images"]))
    return total, worst_first(pa.concat_tables(images))


def _tasks(pairs: Sequence[Pair], batch: int, *, workers: int) -> list[dict[str, int]]:
    """Ranges of pairs, whole chunks each: some for every worker, so that none waits long for the last."""
    sizes = [len(chunk) for chunk in chunked(pairs, batch=batch)]
    step = sizes[0] * max(1, min(TASK, len(sizes) // (4 * workers)))
    return [{"start": start, "stop": min(start + step, len(pairs))} for start in range(0, len(pairs), step)]


def check_classes(checkpoint: Checkpoint, dataset: Dataset, *, uri: str) -> None:
    """Raise a ConfigError for a model, named by its URI, whose classes are not those of the data."""
    if dataset.classes.names != checkpoint.classes.names:
        known, found = (", ".join(table.names[:4]) for table in (checkpoint.classes, dataset.classes))
        remedy = f"its {len(checkpoint.classes)} classes ({known}, ...) are not the {len(dataset.classes)} of the data"
        raise ConfigError("model", uri, f"{remedy} ({found}, ...); use a model of this data")
