"""Codecs for masks: run lengths, which SQL can read, and PNG.

Shapes: ``H W`` pixels, ``N`` runs. A mask is (H, W) of class ids, 0 to 65535, in any integer type.
The run-length code goes through the mask row by row, and a run may go on into the next row.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.images.decoding import decode_mask

Ids = NDArray[np.integer]

_MAX_ID = 65535


def run_lengths(mask: Ids) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Encode a mask as runs of equal ids.

    Args:
        mask: (H, W) of any integer type, ids 0 to 65535.

    Returns:
        classes (N,) int32 and lengths (N,) int32, row-major; lengths are at least 1 and sum to H * W,
        and two runs side by side differ in class.

    Raises:
        ValueError: when the mask is not (H, W) of integers, or an id is out of range.
    """
    flat = _checked(mask).ravel()
    if flat.size == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    # Where each run but the first starts, then the edges of all runs.
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.empty(changes.size + 2, np.int32)
    edges[0] = 0
    np.add(changes, 1, out=edges[1:-1], casting="same_kind")
    edges[-1] = flat.size
    classes = flat[edges[:-1]]
    _check_range(classes)
    return classes.astype(np.int32), np.diff(edges)


def from_run_lengths(classes: Ids, lengths: Ids, height: int, width: int) -> Ids:
    """Decode what :func:`run_lengths` encodes.

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
    _check_range(classes)
    if lengths.size and lengths.min() < 0:
        raise ValueError(f"a run of {lengths.min()} pixels")
    total = int(lengths.sum(dtype=np.int64))
    if total != height * width:
        raise ValueError(f"the runs hold {total} pixels, the mask {height} x {width} = {height * width}")
    # Narrowed before it is spread: the runs are few, the pixels many.
    return np.repeat(classes.astype(_dtype(classes)), lengths).reshape(height, width)


def to_png(mask: Ids, palette: bytes | None = None, *, classes: int | None = None) -> bytes:
    """Encode a mask as a single-channel PNG, compressed fast (level 1).

    Args:
        mask: (H, W) of any integer type, ids 0 to 65535; not empty.
        palette: RGB bytes of ids 0 to 255, as :meth:`ClassTable.palette` gives; 8-bit masks are then
            written with these colours, and grey otherwise. A 16-bit PNG has no palette.
        classes: how many classes there may be, so that masks of one model are all of one depth
            whatever they show: 16 bits above 256 classes. By default the mask's own ids decide.

    Returns:
        the file; 8 bits grey or palette, or 16 bits grey.

    Raises:
        ValueError: when the mask is not (H, W) of integers or is empty, or an id does not fit.
    """
    mask = _checked(mask)
    if mask.size == 0:
        raise ValueError(f"a PNG cannot hold a mask of shape {mask.shape}")
    _check_range(mask)
    deep = int(mask.max()) > 255 if classes is None else classes > 256
    if deep:
        image = _image("I;16", mask.astype("<u2"))
    else:
        if mask.max() > 255:
            raise ValueError(f"id {mask.max()} in a mask of {classes} classes")
        image = _image("L" if palette is None else "P", mask.astype(np.uint8))
        if palette is not None:
            # A short palette would make Pillow write fewer bits than the ids may need.
            image.putpalette(palette[:768].ljust(768, b"\0"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def from_png(data: bytes) -> Ids:
    """Decode what :func:`to_png` encodes, or any single-channel PNG.

    Returns:
        (H, W) uint8, or uint16 for a PNG of 16 bits.

    Raises:
        ImageError: as :func:`pspnet_core.images.decoding.decode_mask`.
    """
    return decode_mask(data)


def _image(mode: str, ids: Ids) -> Image.Image:
    height, width = ids.shape
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(ids).tobytes())


def _checked(mask: Ids) -> Ids:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        raise ValueError(f"a mask is (H, W) of integers, not {mask.shape} of {mask.dtype}")
    return mask


def _check_range(ids: Ids) -> None:
    """Refuse what a mask cannot hold, rather than wrap it round into another class."""
    # Eight bits and unsigned sixteen cannot be out of range, save for negative ones.
    if ids.size and ids.dtype not in (np.uint8, np.uint16) and (ids.min() < 0 or ids.max() > _MAX_ID):
        raise ValueError(f"class ids from {ids.min()} to {ids.max()}; they must be from 0 to {_MAX_ID}")


def _dtype(classes: Ids) -> type[np.uint8] | type[np.uint16]:
    return np.uint16 if classes.size and classes.max() > 255 else np.uint8
