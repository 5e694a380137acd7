"""Segmentation metrics from counts of pixels: a confusion matrix, and the boundary regions of each class.

Counts of parts of a data set, or of workers, add up with ``+``; the metrics are of all pixels counted, not means over
images. Shapes: ``C`` classes, ``H W`` pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pspnet_core.images.masks import Ids
from pspnet_core.metrics.boundaries import boundary_region, boundary_width

CountsT = TypeVar("CountsT", bound="_Counts")


class _Counts(ABC):
    """Counts of pixels by class, the last axis of ``counts``; those of parts add up with ``+``.

    Args:
        classes: how many there are.
        counts: taken elsewhere, such as the sum over workers; by default none yet.

    Raises:
        ValueError: for counts of another shape.
    """

    rows: int | None = None
    """Rows of ``counts``; None for as many as classes."""

    def __init__(self, classes: int, counts: NDArray[np.int64] | None = None) -> None:
        shape = (self.rows or classes, classes)
        # Row by row in memory, so that update can count in a flat view.
        self.counts = np.zeros(shape, np.int64) if counts is None else np.array(counts, np.int64, order="C")
        if self.counts.shape != shape:
            raise ValueError(f"counts of shape {self.counts.shape} for {classes} classes")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.counts[0])

    def __add__(self: CountsT, other: CountsT) -> CountsT:
        if type(other) is not type(self):
            return NotImplemented
        if other.classes != self.classes:
            raise ValueError(f"cannot add counts of {self.classes} and {other.classes} classes")
        return type(self)(self.classes, self.counts + other.counts)

    @abstractmethod
    def iou(self) -> NDArray[np.float64]:
        """Return each class's intersection over union: (C,) float64, 0 to 1; NaN for a class in neither mask."""

    @property
    def miou(self) -> float:
        """Mean of :meth:`iou` over the classes that have one; NaN when none has."""
        return _mean(self.iou())


class ConfusionMatrix(_Counts):
    """Counts of pixels by target class (row) and predicted class (column).

    Attributes:
        counts: (C, C) int64.
    """

    def update(self, prediction: Ids, target: Ids, ignore: int) -> None:
        """Count the pixels of one or more masks.

        Args:
            prediction: class ids, 0 to C - 1, of any shape and integer type.
            target: class ids of the same shape, 0 to C - 1, or ``ignore``.
            ignore: the target id of pixels that are not counted.

        Raises:
            ValueError: when the shapes differ or an id that counts is out of range.
        """
        columns, rows, _ = _counted(prediction, target, ignore, self.classes)
        index = rows.astype(np.int64)
        index *= self.classes
        index += columns
        # In place: no array of C * C for each image, which with thousands of classes would cost most of the time.
        np.add.at(self.counts.reshape(-1), index, 1)

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

    def dice(self) -> NDArray[np.float64]:
        """Return each class's Dice coefficient, which is its F1 score: (C,) float64, 0 to 1.

        NaN where :meth:`iou` is.
        """
        return _ratio(2 * self.counts.diagonal(), self.counts.sum(axis=0) + self.counts.sum(axis=1))

    @property
    def mdice(self) -> float:
        """Mean of :meth:`dice` over the classes that have one; NaN when none has."""
        return _mean(self.dice())

    @property
    def macc(self) -> float:
        """Mean of :meth:`accuracy` over the classes in the targets; NaN when there is none."""
        return _mean(self.accuracy())

    @property
    def aacc(self) -> float:
        """Share of all counted pixels that are right, 0 to 1; NaN when none was counted."""
        return float(_ratio(self.counts.trace().reshape(1), self.counts.sum().reshape(1))[0])


class BoundaryCounts(_Counts):
    """Counts of pixels in the boundary regions of each class, for boundary IoU (see ``boundaries.py``).

    Attributes:
        counts: (2, C) int64, intersection and union of the regions in predictions and targets.
    """

    rows = 2

    def update(self, prediction: Ids, target: Ids, ignore: int) -> None:
        """Count the pixels of one image.

        Ignored pixels belong to no class in either mask, whatever was predicted there: the edge of an ignored area
        is a boundary of what lies beside it, in both masks alike.

        Args:
            prediction: (H, W) class ids, 0 to C - 1, of any integer type.
            target: (H, W) class ids, 0 to C - 1, or ``ignore``.
            ignore: the target id of pixels that are not counted.

        Raises:
            ValueError: when the shapes differ, are not of one image, or an id that counts is out of range.
        """
        if np.ndim(target) != 2:
            raise ValueError(f"target of shape {np.shape(target)}; the boundaries of one image are counted at a time")
        ids, truth, counted = _counted(prediction, target, ignore, self.classes)
        height, width = counted.shape
        guess, truth = self._labels(ids, counted), self._labels(truth, counted)
        distance = boundary_width(height, width)
        in_guess, in_truth = boundary_region(guess, distance), boundary_region(truth, distance)
        intersection = self._areas(guess[in_guess & in_truth & (guess == truth)])
        self.counts[0] += intersection
        self.counts[1] += self._areas(guess[in_guess]) + self._areas(truth[in_truth]) - intersection

    def _labels(self, ids: Ids, counted: NDArray[np.bool_]) -> Ids:
        """The counted ids in their places, (H, W), and C in all others."""
        labels = np.full(counted.shape, self.classes, np.min_scalar_type(self.classes))
        labels[counted] = ids
        return labels

    def _areas(self, labels: Ids) -> NDArray[np.int64]:
        return np.bincount(labels, minlength=self.classes + 1)[: self.classes]

    def iou(self) -> NDArray[np.float64]:
        """Return each class's boundary IoU: (C,) float64, 0 to 1.

        NaN for a class that is neither in the targets nor in the predictions.
        """
        return _ratio(self.counts[0], self.counts[1])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that is counted of a data set; adds up with ``+``."""

    confusion: ConfusionMatrix
    boundary: BoundaryCounts

    @classmethod
    def empty(cls, classes: int) -> Scores:
        """Start with nothing counted."""
        return cls(confusion=ConfusionMatrix(classes), boundary=BoundaryCounts(classes))

    def update(self, prediction: Ids, target: Ids, ignore: int) -> None:
        """Count the pixels of one image; arguments and errors as :meth:`BoundaryCounts.update`."""
        self.boundary.update(prediction, target, ignore)
        self.confusion.update(prediction, target, ignore)

    def __add__(self, other: Scores) -> Scores:
        return Scores(confusion=self.confusion + other.confusion, boundary=self.boundary + other.boundary)


def _counted(prediction: Ids, target: Ids, ignore: int, classes: int) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """The ids (N,) of prediction and target at the N pixels that count, checked, and where those are."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, target of shape {target.shape}")
    counted = target != ignore
    ids, truth = prediction[counted], target[counted]
    _check_ids("prediction", ids, classes)
    _check_ids("target", truth, classes)
    return ids, truth, counted


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
