"""The end of a plan: class table, class statistics and, last of all, the run record.

All three are functions of the plan and the label table (the record's times aside) and are put if absent, so any run may
finish a plan, and several may. Each label file holds what its chunk took, so the record covers the whole plan, also
where several runs have executed parts of it.
"""

import datetime
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.label_table.ledger import Ledger, Plan
from pipelines.label_table.schema import CLASS_STATS, CLASSES, SCHEMA_VERSION, utc_now
from pipelines.labelling.report.totals import Prices, Totals, spent
from pipelines.process.reading_back import read_back
from pipelines.process.redaction import redacted, redacted_values
from pipelines.storage.arrow import metadata_json, to_parquet
from pspnet_core import __version__
from pspnet_core.images.classes import ClassTable

log = logging.getLogger(__name__)


def write_run_record(
    ledger: Ledger,
    plan: Plan,
    classes: ClassTable,
    *,
    started: datetime.datetime,
    totals: Totals,
    prices: Prices,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write class table, class statistics and run record of a plan whose chunks are all written; returns the record.

    Args:
        started: when this invocation began with the plan.
        totals: of the chunks that this invocation executed. Only the seconds of the write stage are used; the label
            files hold the rest.
        about: further keys of the record: the code and the model, whose ``model`` is a URI.
    """
    paths, store = ledger.paths, ledger.store
    store.put_if_absent(paths.classes, to_parquet(class_table(classes)))
    summary = Summary.of(ledger, plan, classes)
    store.put_if_absent(paths.class_stats(plan.date, plan.run_id), to_parquet(summary.table(classes, plan.run_id)))
    ended, taken = utc_now(), summary.totals + totals.of_stage("write")
    record = {
        "run_id": plan.run_id,
        "plan": plan.number,
        "date": plan.date,
        "planned_at": plan.made.isoformat(),
        "started_at": started.isoformat(),
        "ended_at": ended.isoformat(),
        "seconds": (ended - started).total_seconds(),
        "input": redacted_values(plan.spec.input),
        "source": plan.spec.source,
        "output": redacted(store.root),
        "partition": paths.partition,
        "fingerprint": paths.fingerprint,
        "images": plan.images,
        "labelled": plan.images - summary.errors.total(),
        "errors": dict(summary.errors),
        "chunks": plan.chunks,
        "mask": plan.spec.mask,
        "cpu_seconds": _rounded(taken.cpu),
        "wall_seconds": _rounded(taken.wall),
        "spent": spent(taken, prices),
        "version": __version__,
        "schema": SCHEMA_VERSION,
        **redacted_values(about),
    }
    store.put_if_absent(paths.run(plan.run_id), json.dumps(record, indent=1).encode())
    return record


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in sorted(seconds.items())}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Class statistics and error kinds of one plan's rows, and the totals of its chunks.

    Attributes:
        images, pixels, confidence: ``(C,)`` per class: images with it, its pixels, its pixels times their confidence.
        errors: rows of each error kind.
        totals: of the chunks, as their files hold them.
    """

    images: np.ndarray[tuple[int], np.dtype[np.int64]]
    pixels: np.ndarray[tuple[int], np.dtype[np.int64]]
    confidence: np.ndarray[tuple[int], np.dtype[np.float64]]
    errors: Counter[str]
    totals: Totals

    @classmethod
    def of(cls, ledger: Ledger, plan: Plan, classes: ClassTable) -> "Summary":
        """Read the label table's rows of the plan, a batch at a time."""
        size = len(classes)
        images, pixels, confidence = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size)
        errors: Counter[str] = Counter()
        totals = Totals()
        for batch in ledger.rows(plan, ["error", "class_stats"]):
            totals += _taken(batch.schema)
            errors.update(text.partition(":")[0] for text in batch["error"].drop_null().to_pylist())
            statistics = batch["class_stats"].flatten()
            ids, counts, sure = (statistics.field(name).to_numpy() for name in ("class_id", "pixels", "confidence"))
            images += np.bincount(ids, minlength=size)
            np.add.at(pixels, ids, counts)
            confidence += np.bincount(ids, weights=counts * sure.astype(np.float64), minlength=size)
        return cls(images=images, pixels=pixels, confidence=confidence, errors=errors, totals=totals)

    def table(self, classes: ClassTable, run_id: str) -> pa.Table:
        """One row per class."""
        size, total = len(classes), max(1, int(self.pixels.sum()))
        absent = self.pixels == 0
        mean = self.confidence / np.maximum(1, self.pixels)
        columns = {
            "class_id": np.arange(size),
            "name": list(classes.names),
            "images": self.images,
            "pixels": self.pixels,
            "fraction": self.pixels / total,
            "confidence": pa.array(mean.astype(np.float32), mask=absent),
            "run_id": [run_id] * size,
        }
        return pa.table(columns, schema=CLASS_STATS)


def class_table(classes: ClassTable) -> pa.Table:
    """The class table as Arrow."""
    red, green, blue = zip(*classes.colors, strict=True)
    columns = {"class_id": range(len(classes)), "name": classes.names, "r": red, "g": green, "b": blue}
    return pa.table({key: list(value) for key, value in columns.items()}, schema=CLASSES)


def _taken(schema: pa.Schema) -> Totals:
    """The totals in a label file's metadata; none of a file that somebody else wrote."""
    try:
        return Totals() + Totals.from_json(read_back(_FileHeader, metadata_json(schema)).totals)
    except (ValueError, TypeError, AttributeError) as error:  # where totals are not called, or not made, so
        log.warning("what a chunk took is not known: its label file has other metadata (%s)", error)
        return Totals()


@dataclass(frozen=True, kw_only=True)
class _FileHeader:
    """What is read back of a label file's metadata."""

    totals: dict[str, int | dict[str, int | float]]
