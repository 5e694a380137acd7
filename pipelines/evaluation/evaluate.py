"""Evaluation: the ``Segmenter`` of labelling over labelled pairs, spread over the cluster as Ray Data.

pairs -> chunks of pairs -> actors that label and count -> scores added up on the driver, which holds one sum and one
small row per image -> Parquet below ``--output`` and a run in MLflow.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from pipelines.cluster.ray_data import quiet_ray_data, rows_of
from pipelines.cluster.resources import Pool, Share, WorkerRange
from pipelines.cluster.session import ray_session
from pipelines.datasets.dataset import Dataset, LayoutOptions, Pair
from pipelines.datasets.layouts import open_dataset
from pipelines.evaluation.charts import confusion_picture, iou_picture
from pipelines.evaluation.scoring import BATCH, Compared, chunked, compare
from pipelines.evaluation.tables import (
    IMAGE_SCORES,
    SCHEMA_VERSION,
    Evaluation,
    EvaluationFolder,
    image_row,
    worst_first,
)
from pipelines.models.loading import MLFLOW_SCHEMES, load_rgb_model
from pipelines.process.redaction import redacted
from pipelines.storage import open_store
from pipelines.storage.arrow import from_ipc, to_ipc
from pipelines.tracking.runs import Run, start_run
from pipelines.tracking.server import patiently
from pspnet_core import __version__
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import BoundaryCounts, ConfusionMatrix, Scores
from pspnet_core.threads import map_ahead

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
    output: str | None = None
    """Where tables of classes, confusions and images go: a local folder or a URI; by default nowhere."""
    track: bool | None = None
    """Whether the result is logged to MLflow; by default if MLFLOW_TRACKING_URI is set or the model is from there."""
    experiment: str = "pspnet-evaluation"
    """MLflow experiment of the result."""
    workers: str | None = None
    """Model actors: N or MIN:MAX; by default up to one per GPU, or one on CPUs."""
    gpus: float | None = None
    """GPUs per actor; by default 1 when the cluster has any."""
    batch: int = BATCH
    """Most images in one forward pass, or on CPUs at a time; by default that of training's validation."""
    scales: tuple[float, ...] | None = None
    """Input scales to average over; by default the checkpoint's."""
    flip: bool | None = None
    """Whether to average with the mirrored image; by default the checkpoint's setting."""
    window: int | None = None
    """Side of the sliding window in pixels, 0 for whole images; by default the checkpoint's."""
    reduced: bool | None = None
    """Whether JPEGs larger than the network's input are decoded to fewer pixels; by default the checkpoint's."""
    compile: bool = False
    """Whether the network is compiled (CUDA graphs on GPUs): for many images of one size."""
    confidence: float = 0.9
    """Layout labels: pixels of a class whose mean confidence in an image is lower are ignored."""
    holdout: float = 0.1
    """Layout labels: share of the images that make the split val."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError("batch", self.batch, "give a positive number")
        if self.workers is not None:
            WorkerRange.parse(self.workers)

    @property
    def tracked(self) -> bool:
        """Whether the result is logged to MLflow."""
        if self.track is not None:
            return self.track
        return bool(os.environ.get("MLFLOW_TRACKING_URI")) or self.model.startswith(MLFLOW_SCHEMES)


TASK = 8  # most chunks of one task, which an actor reads ahead across


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
        self.threads = share.threads_here()
        torch.set_num_threads(self.threads)
        model: Checkpoint = ray.get(checkpoint)
        self.dataset, self.pairs = dataset, pairs
        memory = share.pass_memory_here()
        self.segmenter = Segmenter(model.model, model.settings, batch=batch, memory=memory, compile=compile)
        self.batched = True if compile else None  # what is compiled is for one thread at a time

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


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the split.

    An evaluation that ``--output`` holds already is read instead: it would be the same.

    Returns:
        ``miou``, ``macc``, ``aacc``, ``dice`` and ``boundary_iou`` (means over the classes), ``iou`` (class name ->
        value, NaN for a class that neither masks nor predictions hold), ``images``, ``model``, ``output`` (URI of the
        tables' folder, or None) and ``run_id`` (of the MLflow run, or None).

    Raises:
        ConfigError: a mistake in the config or in the data.
        TrackingError: the MLflow server cannot be used.
    """
    checkpoint = load_rgb_model(config.model)
    checkpoint = checkpoint.with_settings(
        scales=config.scales, flip=config.flip, window=config.window, reduced=config.reduced
    )
    dataset = open_dataset(
        config.data, config.layout, LayoutOptions(confidence=config.confidence, holdout=config.holdout)
    )
    pairs = dataset.split(config.split)
    _check_classes(config, checkpoint, dataset)
    facts = _facts(config, checkpoint, dataset)
    folder = _folder(config, checkpoint)
    evaluation = folder.find(facts) if folder else None
    with _tracked_run(config, checkpoint) as run:
        if evaluation is None:
            with ray_session():
                scores, images = _scores(config, checkpoint, dataset, pairs)
            evaluation = Evaluation(scores=scores, images=images, facts=facts)
            if folder:
                folder.write(evaluation)
        if run:
            _log(run, config, evaluation)
    places = {"output": folder.uri if folder else None, "run_id": run.run_id if run else None}
    return _result(evaluation) | places


def _check_classes(config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset) -> None:
    if dataset.classes.names != checkpoint.classes.names:
        known, found = (", ".join(table.names[:4]) for table in (checkpoint.classes, dataset.classes))
        remedy = f"its {len(checkpoint.classes)} classes ({known}, ...) are not the {len(dataset.classes)} of the data"
        raise ConfigError("model", config.model, f"{remedy} ({found}, ...); use a model of this data")


def _facts(config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """What the scores follow from; kept with them."""
    facts = {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "model": redacted(config.model),
        "partition": checkpoint.partition,
        "fingerprint": checkpoint.fingerprint,
        "inference": dataclasses.asdict(checkpoint.settings),
        "batch": config.batch,
        "data": redacted(dataset.store.root),
        "layout": config.layout,
        "split": config.split,
        "content": dataset.fingerprint(config.split),
        "classes": dataset.classes.to_json(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))  # as they are read again: lists, no tuples
    return plain


def _folder(config: EvaluateConfig, checkpoint: Checkpoint) -> EvaluationFolder | None:
    """Where the tables go, proved to be writable before any work is done."""
    if config.output is None:
        return None
    store = open_store(config.output, field="output")
    store.check_writable_atomically()
    return EvaluationFolder.of(store, partition=checkpoint.partition, split=config.split)


def _scores(
    config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset, pairs: Sequence[Pair]
) -> tuple[Scores, pa.Table]:
    """The split's counts and its images' rows, from actors over chunks of it."""
    pool = Pool.of(config.workers, config.gpus, reserve=0.0)
    quiet_ray_data()
    tasks = _tasks(pairs, config.batch, workers=pool.high)
    answers = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        Score,  # type: ignore[arg-type]  # a class is built once per actor
        fn_constructor_args=(dataset, pairs, ray.put(checkpoint), config.batch, config.compile, pool.share),
        compute=ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
        num_cpus=pool.share.cpus,
        num_gpus=pool.share.gpus or None,
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


def _result(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of the result line."""
    confusion = evaluation.scores.confusion
    return {
        "miou": confusion.miou,
        "macc": confusion.macc,
        "aacc": confusion.aacc,
        "dice": confusion.mdice,
        "boundary_iou": evaluation.scores.boundary.miou,
        "iou": dict(zip(evaluation.facts["classes"]["names"], confusion.iou().tolist(), strict=True)),
        "images": len(evaluation.images),
        "model": evaluation.facts["partition"],
    }


@contextlib.contextmanager
def _tracked_run(config: EvaluateConfig, checkpoint: Checkpoint) -> Iterator[Run | None]:
    """An MLflow run, begun before the work so that a server that is not there is told at once; None if not wanted."""
    if not config.tracked:
        yield None
        return
    run = start_run(config.experiment, f"{checkpoint.partition} {config.split}")
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def _log(run: Run, config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Log settings, metrics, tables and pictures, and tie them to the model's version."""
    facts, confusion = evaluation.facts, evaluation.scores.confusion
    run.log_setting(dataclasses.asdict(config) | {key: facts[key] for key in ("fingerprint", "inference", "content")})
    metrics = {name: value for name, value in _result(evaluation).items() if isinstance(value, float)}
    metrics |= {f"iou_{index}": value for index, value in enumerate(confusion.iou().tolist())}  # named as in training
    known = {name: value for name, value in metrics.items() if not math.isnan(value)}
    patiently(run.uri, lambda: run.log_metrics(known, step=0), seconds=run.patience)
    for name, data in evaluation.files().items():
        run.log_file(f"evaluation/{name}", data)
    classes = ClassTable.from_json(facts["classes"])
    run.log_picture("evaluation/confusion.png", confusion_picture(confusion, classes))
    run.log_picture("evaluation/iou.png", iou_picture(confusion, classes))
    if found := _REGISTERED.fullmatch(config.model):
        patiently(run.uri, lambda: _link(run, found, config.split), seconds=run.patience)


_REGISTERED = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")


def _link(run: Run, registered: re.Match[str], split: str) -> None:
    """Name the model's version in the run, and the run in the version."""
    name, version, alias = registered.groups()
    if version is None:
        version = str(run.client.get_model_version_by_alias(name, alias).version)
    run.log_tags({"model_version": f"models:/{name}/{version}"})
    key = re.sub(r"[^-\w .]", "_", f"evaluation {split}")  # what MLflow allows
    run.client.set_model_version_tag(name, version, key, run.run_id)
