"""The end of a plan: class table, class statistics and, last of all, the run record.

All three are functions of the plan and the label table (the record's times aside), and are put if absent, so it does
not matter who finishes a plan, or how often.
"""

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.chunks import Work
from pipelines.tables import CLASS_STATS, CLASSES, SCHEMA_VERSION, to_parquet, utc_now
from pspnet_core import __version__
from pspnet_core.classes import ClassTable


def finish(work: Work, started: datetime.datetime, cpu: Mapping[str, float]) -> None:
    """Write what follows the last chunk; ``cpu`` holds CPU seconds by stage, for the record."""
    paths, store, plan = work.ledger.paths, work.output, work.plan
    store.put_if_absent(paths.classes, to_parquet(class_table(work.classes)))
    summary = Summary.of(work)
    store.put_if_absent(paths.class_stats(plan.date, plan.run_id), to_parquet(summary.table(work)))
    ended = utc_now()
    record = {
        "run_id": plan.run_id,
        "plan": plan.number,
        "date": plan.date,
        "planned_at": plan.made.isoformat(),
        "started_at": started.isoformat(),
        "ended_at": ended.isoformat(),
        "seconds": (ended - started).total_seconds(),
        "input": plan.order.input,
        "output": store.root,
        "model": work.model,
        "partition": paths.partition,
        "images": plan.images,
        "labelled": plan.images - sum(summary.errors.values()),
        "errors": dict(summary.errors),
        "chunks": plan.chunks,
        "mask": plan.order.mask,
        "cpu_seconds": {stage: round(seconds, 3) for stage, seconds in sorted(cpu.items())},
        "version": __version__,
        "schema": SCHEMA_VERSION,
    }
    store.put_if_absent(paths.run(plan.run_id), json.dumps(record, indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Class statistics and error kinds of one plan's rows.

    Attributes:
        images, pixels, confidence: ``(C,)`` per class: images with it, its pixels, its pixels times their confidence.
        errors: rows of each error kind.
    """

    images: np.ndarray[tuple[int], np.dtype[np.int64]]
    pixels: np.ndarray[tuple[int], np.dtype[np.int64]]
    confidence: np.ndarray[tuple[int], np.dtype[np.float64]]
    errors: Counter[str]

    @classmethod
    def of(cls, work: Work) -> "Summary":
        """Read the label table's rows of the plan, a batch at a time."""
        size = len(work.classes)
        images, pixels, confidence = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size)
        errors: Counter[str] = Counter()
        for batch in work.ledger.rows(work.plan, ["error", "class_stats"]):
            errors.update(text.partition(":")[0] for text in batch["error"].drop_null().to_pylist())
            statistics = batch["class_stats"].flatten()
            ids, counts, sure = (statistics.field(name).to_numpy() for name in ("class_id", "pixels", "confidence"))
            images += np.bincount(ids, minlength=size)
            np.add.at(pixels, ids, counts)
            confidence += np.bincount(ids, weights=counts * sure.astype(np.float64), minlength=size)
        return cls(images=images, pixels=pixels, confidence=confidence, errors=errors)

    def table(self, work: Work) -> pa.Table:
        """One row per class."""
        size, total = len(work.classes), max(1, int(self.pixels.sum()))
        absent = self.pixels == 0
        mean = self.confidence / np.maximum(1, self.pixels)
        columns = {
            "class_id": np.arange(size),
            "name": list(work.classes.names),
            "images": self.images,
            "pixels": self.pixels,
            "fraction": self.pixels / total,
            "confidence": pa.array(mean.astype(np.float32), mask=absent),
            "run_id": [work.plan.run_id] * size,
        }
        return pa.table(columns, schema=CLASS_STATS)


def class_table(classes: ClassTable) -> pa.Table:
    """The class table as Arrow."""
    red, green, blue = zip(*classes.colors, strict=True)
    columns = {"class_id": range(len(classes)), "name": classes.names, "r": red, "g": green, "b": blue}
    return pa.table({key: list(value) for key, value in columns.items()}, schema=CLASSES)
