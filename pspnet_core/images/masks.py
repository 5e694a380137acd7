"""Masks: what holds class ids, and masks as PNG files.

A mask is ``(H, W)`` of class ids, 0 to 65535, in any integer type.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.images.orientation import STORED, TAG

Ids = NDArray[np.integer]

_MAX_ID = 65535


def to_png(mask: Ids, palette: bytes | None = None, *, classes: int | None = None, orientation: int = 1) -> bytes:
    """Encode a mask as a single-channel PNG, compressed fast (level 1).

    Args:
        mask: (H, W) of any integer type, ids 0 to 65535; not empty.
        palette: RGB bytes of ids 0 to 255, as :meth:`ClassTable.palette` gives; 8-bit masks are then
            written with these colours, and grey otherwise. A 16-bit PNG has no palette.
        classes: how many classes there may be, so that masks of one model are all of one depth
            whatever they show: 16 bits above 256 classes. By default the mask's own ids decide.
        orientation: how the file is to hold the mask, which is upright, and what its EXIF then tells: 1 to 8.

    Returns:
        the file; 8 bits grey or palette, or 16 bits grey.

    Raises:
        ValueError: when the mask is not (H, W) of integers or is empty, or an id does not fit.
    """
    mask = check_mask(mask)
    if mask.size == 0:
        raise ValueError(f"a PNG cannot hold a mask of shape {mask.shape}")
    check_ids(mask)
    deep = int(mask.max()) > 255 if classes is None else classes > 256
    if not deep and mask.max() > 255:
        raise ValueError(f"id {mask.max()} in a mask of {classes} classes")
    mode, dtype = ("I;16", "<u2") if deep else ("L" if palette is None else "P", "u1")
    image = Image.frombytes(mode, (mask.shape[1], mask.shape[0]), mask.astype(dtype).tobytes())
    if palette is not None and not deep:
        # A short palette would make Pillow write fewer bits than the ids may need.
        image.putpalette(palette[:768].ljust(768, b"\0"))
    told: dict[str, Image.Exif] = {}
    if orientation != 1:
        image = image.transpose(STORED[orientation])
        told["exif"] = Image.Exif()
        told["exif"][TAG] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, **told)
    return buffer.getvalue()


def check_mask(mask: Ids) -> Ids:
    """Return the mask as an array; ValueError unless it is ``(H, W)`` of integers."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        raise ValueError(f"a mask is (H, W) of integers, not {mask.shape} of {mask.dtype}")
    return mask


def check_ids(ids: Ids) -> None:
    """Raise ValueError for ids that a mask cannot hold, which a cast would wrap round into another class."""
    # Eight bits and unsigned sixteen cannot be out of range, save for negative ones.
    if ids.size and ids.dtype not in (np.uint8, np.uint16) and (ids.min() < 0 or ids.max() > _MAX_ID):
        raise ValueError(f"class ids from {ids.min()} to {ids.max()}; they must be from 0 to {_MAX_ID}")
