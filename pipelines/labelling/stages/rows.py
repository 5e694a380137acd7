"""Rows of the label table: from predictions to an Arrow table, in the order of the plan.

Shapes: ``H W`` pixels of the original image.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.label_table.schema import CLASS_STATISTIC, LISTING, MASKS, RowProvenance
from pspnet_core.errors import ImageError
from pspnet_core.images import run_lengths
from pspnet_core.images.classes import ClassTable
from pspnet_core.images.masks import to_png
from pspnet_core.images.statistics import ClassStatistics, class_statistics, image_confidence
from pspnet_core.inference.segmenter import Prediction


class Labelled(NamedTuple):
    """One image's share of its row; ``shape`` is ``H, W``."""

    shape: tuple[int, int]
    classes: NDArray[np.int32]
    lengths: NDArray[np.int32]
    png: bytes | None
    confidence: float
    statistics: ClassStatistics


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes the rows of one run."""

    provenance: RowProvenance
    classes: ClassTable

    def label(self, prediction: Prediction) -> Labelled:
        """Run lengths, PNG where wanted, and statistics of one image; called in threads."""
        mask, confidence = prediction
        classes, lengths = run_lengths.encode(mask)
        return Labelled(
            (mask.shape[0], mask.shape[1]),
            classes,
            lengths,
            to_png(mask, self.classes.palette(), classes=len(self.classes)) if self._wants("png") else None,
            image_confidence(confidence),
            class_statistics(classes, lengths, confidence),
        )

    def table(self, encoded: pa.Table, results: Mapping[int, Labelled | ImageError]) -> pa.Table:
        """A ``MASKS`` table of the images of an ``ENCODED`` one, in its order.

        Args:
            results: by index of the image.
        """
        count = len(encoded)
        ordered = [results[index] for index in range(count)]
        rows = [None if isinstance(result, ImageError) else result for result in ordered]
        columns = {name: encoded[name] for name in LISTING.names} | {
            "width": [row and row.shape[1] for row in rows],
            "height": [row and row.shape[0] for row in rows],
            "status": ["ok" if row else "error" for row in rows],
            "error": [str(result) if isinstance(result, ImageError) else None for result in ordered],
            "mask_classes": self._run_lengths([row and row.classes for row in rows]),
            "mask_lengths": self._run_lengths([row and row.lengths for row in rows]),
            "mask_png": [row and row.png for row in rows],
            "confidence": [row and row.confidence for row in rows],
            "class_stats": self._statistics([row and row.statistics for row in rows]),
            "run_id": [self.provenance.run_id] * count,
            "labelled_at": [self.provenance.made] * count,
        }
        return pa.table(columns, schema=MASKS)

    def _wants(self, mask: str) -> bool:
        return self.provenance.mask in (mask, "both")

    def _run_lengths(self, rows: Sequence[NDArray[np.int32] | None]) -> pa.ListArray:
        if not self._wants("rle"):
            return pa.nulls(len(rows), pa.list_(pa.int32()))
        present = [row for row in rows if row is not None]
        values = pa.array(np.concatenate(present) if present else [], pa.int32())
        return _list_array([None if row is None else len(row) for row in rows], values)

    def _statistics(self, rows: Sequence[ClassStatistics | None]) -> pa.ListArray:
        present = [{"class_id": row.class_id} | dict(row.columns) for row in rows if row is not None]

        def joined(name: str, dtype: pa.DataType) -> pa.Array:
            return pa.array(np.concatenate([values[name] for values in present]) if present else [], dtype)

        ids = joined("class_id", pa.int32())
        fields = [ids, pa.array(self.classes.names).take(ids)]
        fields += [joined(field.name, field.type) for field in list(CLASS_STATISTIC)[len(fields) :]]
        values = pa.StructArray.from_arrays(fields, fields=list(CLASS_STATISTIC))
        return _list_array([None if row is None else len(row.class_id) for row in rows], values)


def _list_array(lengths: Sequence[int | None], values: pa.Array) -> pa.ListArray:
    """``values`` cut into lists of the given lengths; None makes a null."""
    offsets = [0, *itertools.accumulate(length or 0 for length in lengths)]
    missing = pa.array([length is None for length in lengths], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=missing)
