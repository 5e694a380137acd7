"""Grey of more than 8 bits as bytes.

Shapes: ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value
_NO_DATA = 42113  # GDAL's tag: the value of pixels that show nothing, as text
_ROWS = 256
"""Rows of deep grey that are converted at a time."""


def grey_to_bytes(grey: NDArray[Any], tags: Mapping[int, Any]) -> NDArray[np.uint8]:
    """Bring (H, W) grey of 16 bits (also kept in 32, or fewer of a TIFF) or floats to 0..255, some rows at a time."""
    levels = np.empty(grey.shape, np.uint8)
    convert = _floats(grey, tags) if grey.dtype.kind == "f" else _integers(grey, tags)
    for top in range(0, len(grey), _ROWS):
        levels[top : top + _ROWS] = convert(grey[top : top + _ROWS])
    return levels


def _integers(grey: NDArray[Any], tags: Mapping[int, Any]) -> Callable[[NDArray[Any]], NDArray[np.generic]]:
    """Return what converts whole numbers of as many bits as the tags tell."""
    is_short = grey.dtype.itemsize == 2
    most = 2 ** (tags.get(_BITS, (16,))[0] if is_short else 16) - 1
    is_inverted = is_short and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def convert(rows: NDArray[Any]) -> NDArray[np.generic]:
        values: NDArray[np.int32] = rows.astype(np.int32).clip(0, most)  # in 32 bits, where no step overflows
        return ((most - values if is_inverted else values) * 255 + most // 2) // most

    return convert


def _floats(grey: NDArray[Any], tags: Mapping[int, Any]) -> Callable[[NDArray[Any]], NDArray[np.generic]]:
    """Return what converts floats: fractions of white, or up to 255; pixels without data become 0."""
    nothing = _no_data(tags)
    white = 1 if _are_fractions(grey, nothing) else 255

    def convert(rows: NDArray[Any]) -> NDArray[np.generic]:
        values = np.nan_to_num(np.where(rows == nothing, 0, rows).astype(np.float32))
        return np.round(values.clip(0, white) * (255 / white))

    return convert


def _are_fractions(grey: NDArray[Any], nothing: np.float32) -> bool:
    """Return whether floats are fractions of white: no more than 1 % of them are above 2.

    Fractions may be above 1 where something shines. What is beyond 0 to 255 is no level in either sense, only a value
    for missing data, and zeros are the same in both.
    """
    levels = higher = 0
    for top in range(0, len(grey), _ROWS):
        rows = grey[top : top + _ROWS]
        shown = rows[(rows > 0) & (rows <= 255) & (rows != nothing)]
        levels += shown.size
        higher += int(np.count_nonzero(shown > 2))
    return higher * 100 <= levels


def _no_data(tags: Mapping[int, Any]) -> np.float32:
    """Return the value of pixels that show nothing; NaN, which equals no value, where the tags tell none."""
    try:
        with np.errstate(over="ignore"):
            return np.float32(float(str(tags.get(_NO_DATA, "nan")).strip("\0 ")))
    except ValueError:
        return np.float32(np.nan)
