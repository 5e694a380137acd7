"""The orientation of an image, as its EXIF or XMP tells it: 1 to 8, of which 1 is upright (CIPA DC-008, tag 274).

Read here and not by ``ImageOps.exif_transpose``: this reads one tag, costs nothing where there is neither, and never
fails or warns on damaged metadata of a sound image.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import Image

TAG = 0x0112

UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What to do with stored pixels of each orientation to see them upright; 1 is upright."""

STORED = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}
"""The other way round."""

# The whole numbers that a tag may be written as, by type: bytes, shorts and longs, without and with a sign.
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}

_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([0-9]+)")


def orientation_of(info: Mapping[Any, Any]) -> int:
    """Return the orientation that the EXIF of an image tells, or else its XMP; 1 where neither does.

    Args:
        info: a picture's, as Pillow gives it: bytes ``exif`` and ``xmp``.
    """
    exif, xmp = info.get("exif"), info.get("xmp")
    told = _of_exif(exif) if isinstance(exif, bytes) else None
    if told is None and isinstance(xmp, bytes):
        match = _XMP.search(xmp)
        told = int(match[1][:2]) if match else None
    return told if told and told <= 8 else 1


def _of_exif(exif: bytes) -> int | None:
    """Return the tag's first value, whatever it is; None where there is no such tag, or none that can be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == TAG:
                return _first(tiff, order, kind, count, entry + 8)
    except struct.error:
        pass  # The directory points out of the data: metadata is damaged, the pixels are not.
    return None


def _first(tiff: bytes, order: str, kind: int, count: int, place: int) -> int | None:
    """Return the first value of an entry; more than four bytes of values lie elsewhere."""
    if kind not in _NUMBERS or not count:
        return None
    number = order + _NUMBERS[kind]
    if count * struct.calcsize(number) > 4:
        (place,) = struct.unpack_from(order + "I", tiff, place)
    return max(0, int(struct.unpack_from(number, tiff, place)[0]))
