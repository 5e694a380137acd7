"""Run-length code of masks, which SQL can read: a mask row by row, as the class and the length of each run.

A run may go on into the next row. Shapes: ``H W`` pixels, ``N`` runs. Class ids are 0 to 65535, of any integer type.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pspnet_core.images.masks import Ids, check_ids, check_mask


def encode(mask: Ids) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Encode a mask as runs of equal ids.

    Args:
        mask: (H, W) of any integer type, ids 0 to 65535.

    Returns:
        classes (N,) int32 and lengths (N,) int32, row-major; lengths are at least 1 and sum to H * W,
        and two runs side by side differ in class.

    Raises:
        ValueError: when the mask is not (H, W) of integers, or an id is out of range.
    """
    flat = check_mask(mask).ravel()
    if flat.size == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    # Where each run but the first starts, then the edges of all runs.
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.empty(changes.size + 2, np.int32)
    edges[0] = 0
    np.add(changes, 1, out=edges[1:-1], casting="same_kind")
    edges[-1] = flat.size
    classes = flat[edges[:-1]]
    check_ids(classes)
    return classes.astype(np.int32), np.diff(edges)


def decode(classes: Ids, lengths: Ids, height: int, width: int) -> Ids:
    """Decode what ``encode`` made.

    Args:
        classes: (N,) ids, 0 to 65535.
        lengths: (N,) run lengths, not negative.
        height: H.
        width: W.

    Returns:
        (H, W) uint8, or uint16 when an id is above 255.

    Raises:
        ValueError: when the lengths do not sum to H * W, or an id or a length is out of range.
    """
    classes, lengths = np.asarray(classes), np.asarray(lengths)
    if classes.ndim != 1 or classes.shape != lengths.shape:
        raise ValueError(f"{classes.shape} classes and {lengths.shape} lengths: expected as many of each")
    check_ids(classes)
    if lengths.size and lengths.min() < 0:
        raise ValueError(f"a run of {lengths.min()} pixels")
    total = int(lengths.sum(dtype=np.int64))
    if total != height * width:
        raise ValueError(f"the runs hold {total} pixels, the mask {height} x {width} = {height * width}")
    # Narrowed before it is spread: the runs are few, the pixels many.
    wide = classes.size and classes.max() > 255
    return np.repeat(classes.astype(np.uint16 if wide else np.uint8), lengths).reshape(height, width)
