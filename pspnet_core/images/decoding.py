"""Decoding of images and masks to arrays; damaged data raises :class:`ImageError`.

Shapes: ``H W`` pixels, after the EXIF orientation is applied.

Kinds of error: ``Empty`` (no bytes), ``Unreadable`` (not an image that this package reads),
``Truncated`` (begins like an image, but the file ends early or its codec fails), ``TooLarge`` (more
pixels than allowed, or than memory holds) and ``NotAMask`` (an image, but not one of class ids).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.errors import ImageError

# Pillow's own guard against decompression bombs warns at a fixed size and raises at twice that. The
# `max_pixels` of the functions below replaces it: it is checked for every image, from the
# header, and may be raised by the caller. Switched off once, here, since the switch is a global and
# changing it per call would not be thread safe.
Image.MAX_IMAGE_PIXELS = None

IMAGE_SUFFIXES: frozenset[str] = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
"""The file name endings, in lower case, that are taken for images."""

MAX_PIXELS = 100_000_000
"""The largest image decoded by default, in pixels (300 MB as an array)."""

_MOST_SCANS, _MOST_SCANNED = 1000, 4_000_000_000
"""Scans of a progressive JPEG, and their number times its pixels: each takes the time of a whole image."""

_PIXEL_BYTES, _WEBP_BYTES = 11, 21
"""Bytes per pixel while an image is decoded: 4 in Pillow, 4 more where it is converted, 3 of the array; WebP's decoder
hands over two copies of 4 more, and keeps 2 of its own."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

_JPEGS = ("JPEG", "MPO")

_SCAN_OF_JPEG, _END_OF_JPEG = b"\xff\xda", b"\xff\xd9"

# How files of these formats begin. BMP's "BM" is left out: too short to tell from text.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a")

_EXIF_ORIENTATION = 0x0112

# What to do with the pixels for each EXIF orientation; 1 is upright (CIPA DC-008, tag 274).
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Premultiplied alpha, which Pillow converts to RGB only by way of the plain kind.
_PLAIN_ALPHA = {"RGBa": "RGBA", "La": "LA"}

# Pillow spreads grey of 2 and 4 bits over 0 to 255; in a mask the ids are wanted as they were written.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


class ImageFile(NamedTuple):
    """An image file of which the header has been read: see ``open_image``."""

    data: bytes
    header: Image.Image

    @property
    def nbytes(self) -> int:
        """Most bytes that decoding it takes at a time: the codec's, the picture's and the array's."""
        width, height = self.header.size
        return (_WEBP_BYTES if self.header.format == "WEBP" else _PIXEL_BYTES) * width * height


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read the header of an image file. It can be decoded later, once, in any thread.

    Args:
        data: the whole file.
        max_pixels: larger images are refused.

    Raises:
        ImageError: ``Empty``, ``Unreadable``, ``Truncated`` or ``TooLarge``.
    """
    if not data:
        raise ImageError("Empty", "the file has no bytes")
    # A file that begins like an image is one, only damaged; anything else is something else.
    kind = "Truncated" if data.startswith(_SIGNATURES) else "Unreadable"
    with _codec(kind, "the header cannot be read"):
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("Unreadable", f"an image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError("TooLarge", f"{width} x {height} pixels; at most {max_pixels} are decoded")
    if "progressive" in image.info:
        scans = data.count(_SCAN_OF_JPEG)
        if scans > min(_MOST_SCANS, max(16, _MOST_SCANNED // (width * height))):
            raise ImageError("TooLarge", f"{scans} scans of {width} x {height} pixels")
    return ImageFile(data, image)


def decode_image(file: bytes | ImageFile, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG, WebP, TIFF, BMP or GIF file.

    Whatever the file holds becomes RGB: palettes and CMYK are converted, grey is repeated, alpha is
    dropped, 16-bit grey is scaled by 1/257, floats are clipped to 0 to 255, and of an animation the
    first frame is taken. The EXIF orientation is applied. Thread safe; the codecs release the GIL.

    Args:
        file: the whole file, or what ``open_image`` made of it.
        max_pixels: larger images are refused from their header, before any pixel is decoded; those that are open
            already have passed.

    Returns:
        (H, W, 3) uint8, RGB, writeable and contiguous.

    Raises:
        ImageError: ``Empty``, ``Unreadable``, ``Truncated`` or ``TooLarge``.
    """
    data, image = _opened(file, max_pixels)
    pixels = _plain_jpeg(image, data)
    if pixels is not None:
        return pixels
    _load(image)
    # After the pixels, since a PNG may carry its EXIF data behind them.
    return _upright(_to_rgb(image), _orientation(image))


def picture_to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a PIL picture as ``decode_image`` converts a file of it: to (H, W, 3) uint8 RGB, upright.

    Raises:
        ImageError: ``Truncated`` or ``Unreadable``, for a picture whose file is damaged or has no conversion to RGB.
    """
    _load(picture)
    return _upright(_to_rgb(picture.copy()), _orientation(picture))


class Views(NamedTuple):
    """An image in several sizes, upright.

    Attributes:
        height, width: ``H W`` of the image itself.
        views: ``(h, w, 3)`` uint8 RGB each, writeable and contiguous.
    """

    height: int
    width: int
    views: tuple[NDArray[np.uint8], ...]


def decode_views(
    file: bytes | ImageFile, sizes: Callable[[int, int], Sequence[tuple[int, int]]], *, max_pixels: int = MAX_PIXELS
) -> Views:
    """Decode as ``decode_image`` does, but no more of a JPEG than some smaller views of it need.

    A JPEG holds cosines of blocks of 8 x 8 pixels, from which half, a quarter or an eighth of its rows and columns come
    out directly, at a fraction of the time. It is decoded to the fewest that are no fewer than the largest view's.

    Args:
        file: the whole file, or what ``open_image`` made of it.
        sizes: from ``H W`` of the upright image to height and width of each view; resized bilinearly.
        max_pixels: as for ``decode_image``.

    Raises:
        ImageError: as ``decode_image``.
    """
    _, image = _opened(file, max_pixels)
    size, box = _load_for(image, sizes)
    orientation = _orientation(image)
    height, width = _swapped(size, orientation)
    rgb = _to_rgb(image)
    views = [
        _upright(rgb.resize(_swapped(view, orientation)[::-1], Image.Resampling.BILINEAR, box=box), orientation)
        for view in sizes(height, width)
    ]
    return Views(height, width, tuple(views))


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.unsignedinteger]:
    """Decode the class ids of a single-channel PNG: grey or palette of 1 to 16 bits.

    Of a palette PNG the raw indices are returned, whatever their colours; grey of fewer than 8 bits
    is returned as written, not scaled. The EXIF orientation is applied, as it is to the mask's image.

    Args:
        data: the whole file.
        max_pixels: larger masks are refused from their header.

    Returns:
        (H, W) uint8, or uint16 for a PNG of 16 bits; class ids, writeable and contiguous.

    Raises:
        ImageError: as :func:`decode_image`, and ``NotAMask`` for another format or several channels.
    """
    image = open_image(data, max_pixels=max_pixels).header
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I;16", "I"):
        raise ImageError("NotAMask", f"{image.format} of mode {image.mode}; a mask is a single-channel PNG")
    step = _GREY_STEPS.get(_raw_mode(image), 1)
    _load(image)
    ids: NDArray[np.generic] = _upright(image, _orientation(image))
    if ids.dtype.itemsize > 1:
        return ids.astype(np.uint16, copy=False)
    small = ids.astype(np.uint8, copy=False)
    return small // np.uint8(step) if step > 1 else small


def orientation_of(data: bytes) -> int:
    """Return the EXIF orientation in a file's header, 1 to 8; 1 is upright. Raises as :func:`open_image`."""
    return _orientation(open_image(data).header)


def _opened(file: bytes | ImageFile, max_pixels: int) -> ImageFile:
    return file if isinstance(file, ImageFile) else open_image(file, max_pixels=max_pixels)


def _plain_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Decode the commonest sort of file, an upright, whole RGB JPEG, to Pillow's pixels in less time.

    Returns:
        None for all others, and where the codec fails, since Pillow's errors say what is wrong.
    """
    upright_rgb = image.format in _JPEGS and image.mode == "RGB" and _orientation(image) == 1
    if not upright_rgb or "progressive" in image.info or not _is_one_whole_scan(data):
        return None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # such as one of its own limits on size
        return None
    return None if pixels is None else pixels.astype(np.uint8, copy=False)


def _is_one_whole_scan(data: bytes) -> bool:
    """Return whether a JPEG has one scan up to its end with no marker in between; OpenCV passes over damage there.

    In a scan a byte 0xff is followed by a zero (ITU-T T.81, B.1.1.5), or else it begins a marker.
    """
    if not data.endswith(_END_OF_JPEG):
        return False
    scan = np.frombuffer(data, np.uint8)[data.find(_SCAN_OF_JPEG) + len(_SCAN_OF_JPEG) :]
    followed = np.flatnonzero(scan[: -len(_END_OF_JPEG)] == 0xFF)
    return not scan[followed + 1].any()


def _load(image: Image.Image) -> None:
    """Decode the pixels, in place."""
    with _codec("Truncated", "the pixels cannot be decoded"):
        image.load()


def _load_for(
    image: Image.Image, sizes: Callable[[int, int], Sequence[tuple[int, int]]]
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Decode the pixels, in place; of a JPEG no more than ``decode_views`` needs.

    Returns:
        Height and width of the whole image as it is stored, and the box of it in the pixels that were decoded, whose
        last row and column may stand for fewer rows and columns of the image than the others.
    """
    box: tuple[float, float, float, float] | None = None
    size = image.size[::-1]
    if image.format in _JPEGS:
        orientation = _orientation(image)  # in a JPEG it comes before the pixels
        views = sizes(*_swapped(size, orientation))
        height, width = _swapped((max(view[0] for view in views), max(view[1] for view in views)), orientation)
        drafted = image.draft(image.mode, (width, height))
        box = drafted[1] if drafted else None
    _load(image)
    # Where Pillow turns an image while it is loaded, only now is its size what it is.
    return (size, box) if box else (image.size[::-1], (0, 0, *image.size))


@contextmanager
def _codec(kind: str, what: str) -> Iterator[None]:
    """Turn whatever Pillow raises on bad data into an ImageError.

    Pillow parses in Python, so that bad data surfaces as almost any exception: OSError, SyntaxError,
    ValueError, EOFError, struct.error, zlib.error, KeyError, TypeError, AssertionError, Warning (where
    warnings are errors) and so on. All of them are caught, and therefore only a bare call into Pillow
    may stand inside: our own code stays outside, where its errors show.
    """
    try:
        yield
    except MemoryError as error:
        raise ImageError("TooLarge", f"{what}: out of memory") from error
    except Exception as error:
        detail = str(error) if isinstance(error, OSError | SyntaxError | ValueError) else repr(error)
        # Pillow's words here are the address of our buffer.
        if detail.startswith("cannot identify image file"):
            detail = f"not one of {', '.join(_FORMATS)}" if kind == "Unreadable" else "cut off or damaged"
        raise ImageError(kind, f"{what}: {detail}") from error


def _swapped(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return height and width of an upright image from those of the stored one, and the other way round."""
    return size[::-1] if orientation >= 5 else size


def _upright(image: Image.Image, orientation: int) -> NDArray[Any]:
    turn = _UPRIGHT.get(orientation)
    return np.array(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB; an RGB image is returned as it is."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey_to_bytes(np.asarray(image))).convert("RGB")
    # Transparency is dropped anyway; left in place, Pillow would convert it and warn.
    image.info.pop("transparency", None)
    with _codec("Unreadable", f"mode {image.mode} has no conversion to RGB"):
        return image.convert(_PLAIN_ALPHA.get(image.mode, "RGB")).convert("RGB")


def _grey_to_bytes(grey: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring (H, W) grey of 16 bits (also kept in 32) to 0..255 by 1/257, and floats by clipping."""
    if grey.dtype.kind == "f":
        return np.nan_to_num(grey.astype(np.float32), nan=0.0).clip(0, 255).round().astype(np.uint8)
    # 257 = 65535 / 255; half of it is added to round. In 32 bits, where neither step overflows.
    return ((grey.astype(np.int32).clip(0, 65535) + 128) // 257).astype(np.uint8)


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels lie in a file that is open but not loaded, such as ``L;4``."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else None
    return arguments if isinstance(arguments, str) else ""


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none, or none that can be read.

    Read here and not by ``ImageOps.exif_transpose``: this reads one tag, costs nothing where there is
    no EXIF, and never fails or warns on damaged metadata of a sound image. A TIFF's orientation is a
    tag of its own, which Pillow has applied by the time the pixels are loaded.
    """
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _EXIF_ORIENTATION:
                return int(value) if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass  # The directory points out of the data: metadata is damaged, the pixels are not.
    return 1
