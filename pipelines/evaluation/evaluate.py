"""Evaluation: the ``Segmenter`` of labelling over labelled pairs, spread over the cluster as Ray Data.

pairs -> chunks of pairs -> actors that label and count -> scores added up on the driver, which holds one sum and one
small row per image -> Parquet below ``--output`` and a run in MLflow.
"""

import contextlib
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pipelines.cluster.resources import ActorConfig
from pipelines.cluster.session import ray_session
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.layouts import DataConfig
from pipelines.evaluation.actors import check_classes, score_split
from pipelines.evaluation.charts import confusion_picture, iou_picture
from pipelines.evaluation.tables import (
    SCHEMA_VERSION,
    Evaluation,
    EvaluationFolder,
)
from pipelines.models.loading import InferenceOverrides, load_rgb_model
from pipelines.process.config_tree import flatten
from pipelines.process.redaction import redacted
from pipelines.storage import open_store
from pipelines.tracking.metric_names import class_metric_names
from pipelines.tracking.model_uris import Origin
from pipelines.tracking.runs import Run, TrackingConfig, start_run
from pspnet_core import __version__
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import check
from pspnet_core.images.classes import ClassTable

EXPERIMENT = "pspnet-evaluation"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on labelled images at their own size."""

    dataset: DataConfig
    split: str = "val"
    """Split to score."""
    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    inference: InferenceOverrides = field(default_factory=InferenceOverrides)
    actors: ActorConfig = field(default_factory=ActorConfig)
    output: str | None = None
    """Where tables of classes, confusions and images go: a local folder or a URI; by default nowhere."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


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
    checkpoint, origin = load_rgb_model(config.model, config.inference)
    dataset = config.dataset.open()
    pairs = dataset.split(config.split)
    check_classes(checkpoint, dataset, uri=config.model)
    facts = _facts(config, checkpoint, dataset)
    folder = _folder(config, checkpoint)
    evaluation = folder.find(facts) if folder else None
    run = None
    if config.tracking.wanted(config.model):
        run = start_run(config.tracking.experiment or EXPERIMENT, f"{checkpoint.partition} {config.split}")
    with run or contextlib.nullcontext():  # begun before the work, so that it fails early without a server
        if evaluation is None:
            with ray_session():
                scores, images = score_split(checkpoint, dataset, pairs, config.actors)
            nothing = f"none of its {len(pairs)} masks holds a labelled pixel; give a split with labels"
            check(bool(scores.confusion.counts.any()), "split", config.split, nothing)
            evaluation = Evaluation(scores=scores, images=images, facts=facts)
            if folder:
                folder.write(evaluation)
        if run:
            _log(run, config, evaluation, origin)
    places = {"output": folder.uri if folder else None, "run_id": run.run_id if run else None}
    return _result(evaluation) | places


def _facts(config: EvaluateConfig, checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """What the scores follow from; kept with them."""
    facts = {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "model": redacted(config.model),
        "partition": checkpoint.partition,
        "fingerprint": checkpoint.fingerprint,
        "inference": dataclasses.asdict(checkpoint.settings),
        "batch": config.actors.batch,
        "data": redacted(dataset.store.root),
        "layout": config.dataset.layout,
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
    return EvaluationFolder(store=store, path=f"model={checkpoint.partition}/split={config.split}")


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


def _log(run: Run, config: EvaluateConfig, evaluation: Evaluation, origin: Origin) -> None:
    """Log settings, metrics, tables and pictures, and tie them to the model's version."""
    facts, confusion = evaluation.facts, evaluation.scores.confusion
    run.log_setting(flatten(config) | {key: facts[key] for key in ("fingerprint", "inference", "content")})
    metrics = {name: value for name, value in _result(evaluation).items() if isinstance(value, float)}
    classes = ClassTable.from_json(facts["classes"])
    metrics |= dict(zip(class_metric_names("iou", classes.names), confusion.iou().tolist(), strict=True))
    run.log_metrics({name: value for name, value in metrics.items() if not math.isnan(value)}, step=0)
    for name, data in evaluation.files().items():
        run.log_file(f"evaluation/{name}", data)
    run.log_file("evaluation/confusion.png", confusion_picture(confusion, classes))
    run.log_file("evaluation/iou.png", iou_picture(confusion, classes))
    tag = re.sub(r"[^-\w .]", "_", f"evaluation {config.split}")  # what MLflow allows
    run.log_origin(origin, tag=tag)
