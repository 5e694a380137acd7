"""The tables of an evaluation: classes, confusion matrix and images, worst first; described in ``docs/evaluation.md``.

They lie in one folder per model and split, ``model=<partition>/split=<split>/``. ``classes.parquet`` is written last: a
folder that has it is complete, and is read instead of scoring the same once more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.datasets.dataset import Dataset
from pipelines.evaluation.scoring import Compared
from pipelines.process.redaction import redacted
from pipelines.storage import Store
from pipelines.storage.arrow import metadata_of, to_parquet
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.metrics.confusion import BoundaryCounts, ConfusionMatrix, Scores

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1

CLASS_SCORES = pa.schema(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("iou", pa.float64()),
        pa.field("accuracy", pa.float64()),
        pa.field("dice", pa.float64()),
        pa.field("boundary_iou", pa.float64()),
        pa.field("pixels", pa.int64(), nullable=False),
        pa.field("predicted", pa.int64(), nullable=False),
        pa.field("hits", pa.int64(), nullable=False),
        pa.field("boundary_hits", pa.int64(), nullable=False),
        pa.field("boundary_union", pa.int64(), nullable=False),
    ]
)

CONFUSION = pa.schema(
    [
        pa.field("target_id", pa.int32(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("predicted_id", pa.int32(), nullable=False),
        pa.field("predicted", pa.string(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
    ]
)

IMAGE_SCORES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("mask", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
        pa.field("hits", pa.int64(), nullable=False),
        pa.field("miou", pa.float64()),
        pa.field("accuracy", pa.float64()),
        pa.field("boundary_iou", pa.float64()),
        pa.field("confused", pa.list_(pa.struct(list(CONFUSION))), nullable=False),
        pa.field("bytes", pa.int64()),
    ]
)

CONFUSED = 3
"""Most entries of an image's ``confused``."""

SAME = ("schema", "layout", "content", "classes", "batch")
"""Facts that must be equal for two evaluations of a model and split to be the same."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a model on a split.

    Attributes:
        scores: the counts of all images together.
        images: ``IMAGE_SCORES``, the worst first.
        facts: model, settings and data, in plain JSON types; each file's metadata.
    """

    scores: Scores
    images: pa.Table
    facts: Mapping[str, Any]

    def files(self) -> dict[str, bytes]:
        """File name to Parquet file, in the order in which they are written."""
        classes = ClassTable.from_json(self.facts["classes"])
        tables = {
            "images.parquet": self.images,
            "confusion.parquet": confusion_table(self.scores.confusion, classes),
            "classes.parquet": class_table(self.scores, classes),
        }
        return {name: to_parquet(table, metadata=self.facts) for name, table in tables.items()}


@dataclass(frozen=True, kw_only=True)
class EvaluationFolder:
    """Where the evaluation of one model on one split is kept."""

    store: Store
    path: str

    @property
    def uri(self) -> str:
        """The folder's URI."""
        return self.store.uri_of(self.path)

    def find(self, facts: Mapping[str, Any]) -> Evaluation | None:
        """The evaluation that is there, if it is complete.

        Raises:
            ConfigError: it is one with other facts.
        """
        if not self.store.exists(f"{self.path}/classes.parquet"):
            return None
        files = {name: self._read(name) for name in ("classes.parquet", "confusion.parquet", "images.parquet")}
        before = metadata_of(files["classes.parquet"])
        for name in SAME:
            if before.get(name) != facts[name]:
                found = f"{name} {_brief(before.get(name))}, not {_brief(facts[name])}"
                remedy = f"holds an evaluation of this model and split with {found}; choose another folder"
                raise ConfigError("output", self.uri, remedy)
        tables = {name: file.read() for name, file in files.items()}
        scores = scores_of(tables["classes.parquet"], tables["confusion.parquet"])
        log.info("%s holds this evaluation already: nothing to score", self.uri)
        return Evaluation(scores=scores, images=tables["images.parquet"], facts=before)

    def write(self, evaluation: Evaluation) -> None:
        """Put the files that are not there yet; what another run with the same result has put is left alone.

        Raises:
            ConfigError: a file is there that holds something else.
        """
        for name, data in evaluation.files().items():
            if not self.store.put_if_absent(f"{self.path}/{name}", data):
                before, own = self._read(name).read(), pq.read_table(BytesIO(data))
                if not before.equals(own):
                    remedy = "holds other numbers, of a run that broke off; delete it or choose another folder"
                    raise ConfigError("output", self.store.uri_of(f"{self.path}/{name}"), remedy)

    def _read(self, name: str) -> pq.ParquetFile:
        return pq.ParquetFile(BytesIO(self.store.read(f"{self.path}/{name}")))


def class_table(scores: Scores, classes: ClassTable) -> pa.Table:
    """``CLASS_SCORES``: one row per class, by ascending id."""
    confusion, boundary = scores.confusion, scores.boundary
    columns = {
        "class_id": np.arange(len(classes)),
        "name": list(classes.names),
        "iou": _nullable(confusion.iou()),
        "accuracy": _nullable(confusion.accuracy()),
        "dice": _nullable(confusion.dice()),
        "boundary_iou": _nullable(boundary.iou()),
        "pixels": confusion.counts.sum(axis=1),
        "predicted": confusion.counts.sum(axis=0),
        "hits": confusion.counts.diagonal(),
        "boundary_hits": boundary.counts[0],
        "boundary_union": boundary.counts[1],
    }
    return pa.table(columns, schema=CLASS_SCORES)


def confusion_table(confusion: ConfusionMatrix, classes: ClassTable) -> pa.Table:
    """``CONFUSION``: one row per pair of classes that has pixels, by ascending ids."""
    targets, predicted = np.nonzero(confusion.counts)
    names = pa.array(classes.names)
    columns = {
        "target_id": targets,
        "target": names.take(pa.array(targets)),
        "predicted_id": predicted,
        "predicted": names.take(pa.array(predicted)),
        "pixels": confusion.counts[targets, predicted],
    }
    return pa.table(columns, schema=CONFUSION)


def image_row(found: Compared, scores: Scores, dataset: Dataset) -> dict[str, Any]:
    """One row of ``IMAGE_SCORES`` from an image's own counts; the table is logged, so its URIs hold no credentials."""
    height, width = found.target.shape
    confusion = scores.confusion
    return {
        "key": found.pair.key,
        "image": redacted(dataset.uri_of(found.pair.image)),
        "mask": redacted(dataset.uri_of(found.pair.mask)),
        "width": width,
        "height": height,
        "pixels": int(confusion.counts.sum()),
        "hits": int(confusion.counts.trace()),
        "miou": _known(confusion.miou),
        "accuracy": _known(confusion.aacc),
        "boundary_iou": _known(scores.boundary.miou),
        "confused": _confused(confusion, dataset.classes),
        "bytes": found.pair.bytes or None,
    }


def worst_first(images: pa.Table) -> pa.Table:
    """Rows of ``IMAGE_SCORES`` by ascending mIoU, then by key; images without a pixel that counts come last."""
    return images.sort_by([("miou", "ascending"), ("key", "ascending")])


def scores_of(classes: pa.Table, confusion: pa.Table) -> Scores:
    """The counts that ``class_table`` and ``confusion_table`` were made of."""
    size = len(classes)
    counts = ConfusionMatrix(size)
    counts.counts[confusion["target_id"].to_numpy(), confusion["predicted_id"].to_numpy()] = confusion["pixels"]
    regions = np.stack([classes["boundary_hits"].to_numpy(), classes["boundary_union"].to_numpy()])
    return Scores(confusion=counts, boundary=BoundaryCounts(size, regions))


def _confused(confusion: ConfusionMatrix, classes: ClassTable) -> list[dict[str, Any]]:
    """The wrong pairs of classes with the most pixels, those first."""
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    pairs = confusion_table(ConfusionMatrix(len(classes), wrong), classes)
    most: list[dict[str, Any]] = pairs.sort_by([("pixels", "descending")]).slice(0, CONFUSED).to_pylist()
    return most


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
