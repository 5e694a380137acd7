"""Grey of more than 8 bits as bytes.

Shapes: ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value
_ROWS = 256
"""Rows of deep grey that are converted at a time."""


def grey_to_bytes(grey: NDArray[Any], tags: Mapping[int, Any]) -> NDArray[np.uint8]:
    """Bring (H, W) grey of 16 bits (also kept in 32, or fewer of a TIFF) or floats to 0..255, some rows at a time."""
    levels = np.empty(grey.shape, np.uint8)
    convert = _floats(grey) if grey.dtype.kind == "f" else _integers(grey, tags)
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


def _floats(grey: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[np.generic]]:
    """Return what converts floats, which are fractions of white where none is above 1."""
    white = 1 if grey.max(where=np.isfinite(grey), initial=0) <= 1 else 255
    return lambda rows: np.round(np.nan_to_num(rows.astype(np.float32)).clip(0, white) * (255 / white))
