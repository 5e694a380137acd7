"""Statistics of each class in one labelled image, taken from the run-length code.

Shapes: ``H W`` pixels, ``N`` runs, ``K`` classes present in the image.

To add a statistic, write a function of :class:`Runs` that gives one value per class present, and give
it a row in :data:`STATISTICS`; the row's key is the name of its column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_core.images.masks import Ids


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A mask as runs, with what the statistics share.

    Attributes:
        class_id: (K,) int32, the classes present, ascending.
        slot: (N,) int64, the position of each run's class in ``class_id``.
        starts: (N,) int64, the flat index of each run's first pixel.
        lengths: (N,) int64, at least 1 each.
        pixels: (K,) int64, the pixels of each class, at least 1 each.
        confidence: (H * W,) float32, the winning class's probability of each pixel, 0 to 1.
    """

    class_id: NDArray[np.int32]
    slot: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pixels: NDArray[np.int64]
    confidence: NDArray[np.float32]


def pixels(runs: Runs) -> NDArray[np.int64]:
    """Return the pixels of each class: (K,) int64, summing to H * W."""
    return runs.pixels


def fraction(runs: Runs) -> NDArray[np.float64]:
    """Return each class's share of the image: (K,) float64, summing to 1."""
    return runs.pixels / runs.confidence.size


def confidence(runs: Runs) -> NDArray[np.float32]:
    """Return the mean confidence over the pixels of each class: (K,) float32, 0 to 1."""
    # In float64: adding a million float32 values in a row loses the third decimal.
    sums = np.add.reduceat(runs.confidence, runs.starts, dtype=np.float64)
    return (np.bincount(runs.slot, weights=sums, minlength=runs.class_id.size) / runs.pixels).astype(np.float32)


STATISTICS: dict[str, Callable[[Runs], NDArray[np.generic]]] = {
    "pixels": pixels,
    "fraction": fraction,
    "confidence": confidence,
}
"""Column name -> function of the runs that gives one value per class present."""


@dataclass(frozen=True, kw_only=True)
class ClassStatistics:
    """One row per class present in an image, ascending by class id.

    Attributes:
        class_id: (K,) int32.
        columns: one (K,) array for each key of :data:`STATISTICS`, in its order.
    """

    class_id: NDArray[np.int32]
    columns: Mapping[str, NDArray[np.generic]]


def class_statistics(classes: Ids, lengths: Ids, confidence: NDArray[np.float32]) -> ClassStatistics:
    """Compute every statistic of :data:`STATISTICS` for one image.

    Args:
        classes: (N,) the class of each run, as ``run_lengths.encode`` gives.
        lengths: (N,) the pixels of each run, summing to H * W.
        confidence: (H, W) float32, the winning class's probability, 0 to 1.

    Raises:
        ValueError: when the runs do not cover the confidence map.
    """
    runs = _runs(np.asarray(classes), np.asarray(lengths), confidence)
    return ClassStatistics(
        class_id=runs.class_id, columns={name: statistic(runs) for name, statistic in STATISTICS.items()}
    )


def image_confidence(confidence: NDArray[np.float32]) -> float:
    """Return the mean of an (H, W) confidence map, 0 to 1."""
    return float(cv2.mean(confidence)[0])  # in float64, in a quarter of NumPy's time


def _runs(classes: Ids, lengths: Ids, confidence: NDArray[np.float32]) -> Runs:
    if classes.ndim != 1 or classes.shape != lengths.shape:
        raise ValueError(f"{classes.shape} classes and {lengths.shape} lengths: expected as many of each")
    if lengths.size == 0 or lengths.min() < 1:
        raise ValueError("expected one run or more, of one pixel or more each")
    ends = np.cumsum(lengths, dtype=np.int64)
    if ends[-1] != confidence.size:
        raise ValueError(f"the runs hold {ends[-1]} pixels, the confidence map {confidence.size}")
    sizes = lengths.astype(np.int64)
    counts = np.bincount(classes, weights=sizes)
    class_id = np.flatnonzero(counts)
    # From class id to position among the classes present.
    slots = np.zeros(counts.size, np.int64)
    slots[class_id] = np.arange(class_id.size)
    return Runs(
        class_id=class_id.astype(np.int32),
        slot=slots[classes],
        starts=ends - sizes,
        lengths=sizes,
        # Whole numbers below 2**53 are exact in float64.
        pixels=counts[class_id].astype(np.int64),
        confidence=np.ascontiguousarray(confidence).ravel(),
    )
