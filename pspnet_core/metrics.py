"""Segmentation metrics from a confusion matrix.

Shapes: ``C`` classes. Matrices of parts of a data set, or of workers, add up with ``+``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pspnet_core.masks import Ids


class ConfusionMatrix:
    """Counts of pixels by target class (row) and predicted class (column).

    Attributes:
        counts: (C, C) int64.
    """

    def __init__(self, classes: int, counts: NDArray[np.int64] | None = None) -> None:
        """Start empty, or from counts taken elsewhere, such as the sum over workers.

        Raises:
            ValueError: when the counts are not (C, C).
        """
        shape = (classes, classes)
        self.counts = np.zeros(shape, np.int64) if counts is None else np.array(counts, np.int64)
        if self.counts.shape != shape:
            raise ValueError(f"counts of shape {self.counts.shape} for {classes} classes")

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.counts)

    def update(self, prediction: Ids, target: Ids, ignore: int) -> None:
        """Count the pixels of one or more masks.

        Args:
            prediction: class ids, 0 to C - 1, of any shape and integer type.
            target: class ids of the same shape, 0 to C - 1, or ``ignore``.
            ignore: the target id of pixels that are not counted.

        Raises:
            ValueError: when the shapes differ or an id that counts is out of range.
        """
        prediction, target = np.asarray(prediction), np.asarray(target)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction of shape {prediction.shape}, target of shape {target.shape}")
        counted = target != ignore
        columns, rows = prediction[counted], target[counted]
        _check_ids("prediction", columns, self.classes)
        _check_ids("target", rows, self.classes)
        index = rows.astype(np.int64)
        index *= self.classes
        index += columns
        self.counts += np.bincount(index, minlength=self.counts.size).reshape(self.counts.shape)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if other.classes != self.classes:
            raise ValueError(f"cannot add matrices of {self.classes} and {other.classes} classes")
        return ConfusionMatrix(self.classes, self.counts + other.counts)

    def iou(self) -> NDArray[np.float64]:
        """Return each class's intersection over union: (C,) float64, 0 to 1.

        NaN for a class that is neither in the targets nor in the predictions.
        """
        hits = self.counts.diagonal()
        return _ratio(hits, self.counts.sum(axis=0) + self.counts.sum(axis=1) - hits)

    def accuracy(self) -> NDArray[np.float64]:
        """Return the share of each class's target pixels that were found: (C,) float64, 0 to 1.

        NaN for a class that is not in the targets.
        """
        return _ratio(self.counts.diagonal(), self.counts.sum(axis=1))

    @property
    def miou(self) -> float:
        """Mean of :meth:`iou` over the classes that have one; NaN when none has."""
        return _mean(self.iou())

    @property
    def macc(self) -> float:
        """Mean of :meth:`accuracy` over the classes in the targets; NaN when there is none."""
        return _mean(self.accuracy())

    @property
    def aacc(self) -> float:
        """Share of all counted pixels that are right, 0 to 1; NaN when none was counted."""
        return float(_ratio(self.counts.trace().reshape(1), self.counts.sum().reshape(1))[0])


def _check_ids(name: str, ids: Ids, classes: int) -> None:
    if ids.size and (ids.max() >= classes or ids.min() < 0):
        wrong = ids.max() if ids.max() >= classes else ids.min()
        raise ValueError(f"{name} holds class id {wrong}, but there are {classes} classes")


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide, with NaN where there is nothing to divide by, and no warning."""
    ratio = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
