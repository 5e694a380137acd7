"""Decoding of images and masks to arrays; damaged data raises :class:`ImageError`.

Shapes: ``H W`` pixels, after the EXIF orientation is applied.

Kinds of error: ``Empty`` (no bytes), ``Unreadable`` (not an image that this package reads, or of a sort that its
codecs do not know), ``Truncated`` (begins like an image, but the file ends early or its codec fails), ``TooLarge``
(more pixels than allowed, or than memory holds) and ``NotAMask`` (an image, but not one of class ids).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pspnet_core.errors import ImageError
from pspnet_core.images import deep_grey, jpeg_scans, png_chunks
from pspnet_core.images.orientation import TAG, UPRIGHT, orientation_of

# Pillow's own guard against decompression bombs warns at a fixed size and raises at twice that. The
# `max_pixels` of the functions below replaces it: it is checked for every image, from the
# header, and may be raised by the caller. Switched off once, here, since the switch is a global and
# changing it per call would not be thread safe.
Image.MAX_IMAGE_PIXELS = None

# TIFFs that are not compressed are read by libtiff, too: Pillow's own way mixes up planes of 16 bits, and knows no
# subsampled colours. A switch of the same sort.
TiffImagePlugin.READ_LIBTIFF = True

_TILE = (322, 323)  # tags of a TIFF: width and height of its tiles

T = TypeVar("T")

IMAGE_SUFFIXES: frozenset[str] = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
"""The file name endings, in lower case, that are taken for images."""

MAX_PIXELS = 100_000_000
"""The largest image decoded by default, in pixels (300 MB as an array)."""

_MOST_SCANNED = 4_000_000_000
"""Scans of a progressive JPEG times its pixels: each takes the time of a whole image."""

_PIXEL_BYTES, _CONVERTED_BYTES, _WEBP_BYTES, _OTHER_BYTES = 11, 15, 21, 4
"""Bytes per pixel while an image is decoded: 4 in Pillow and twice 3 of the array; 4 more where it is converted; WebP's
decoder hands over two copies of 4, and keeps 2 of its own; a JPEG without an end is compared with another picture."""

_TILE_BYTES = 8
"""Bytes per pixel of a TIFF's tile: four bands of 16 bits."""

_ROWS = 256
"""Rows of pictures that are compared at a time."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

# How files of these formats begin. BMP's "BM" is left out: too short to tell from text.
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(re.escape(png_chunks.SIGNATURE)),
    "WEBP": re.compile(rb"RIFF(.{4}WEBP|(.{0,3}|.{4}W?E?B?)\Z)", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0\*"),
    "GIF": re.compile(rb"GIF8[79]a"),
}

# What Pillow says of files that are whole, but of a sort that it does not know, such as 12-bit JPEGs.
_UNKNOWN_SORT = re.compile("cannot handle|unknown (pixel mode|data organi)|[Uu]nsupported|not (yet )?supported")

# Numbers of a TIFF as they lie in the file, and as libtiff gives them: in the machine's own order.
_NATIVE = {"F;32BF": "F;32NF", "F;32F": "F;32NF", "I;32BS": "I;32NS", "I;32S": "I;32NS"}
_NATIVE |= {"I;16BS": "I;16NS", "I;16S": "I;16NS"}

# Premultiplied alpha, which Pillow converts to RGB only by way of the plain kind.
_PLAIN_ALPHA = {"RGBa": "RGBA", "La": "LA"}

# Pillow spreads grey of 2 and 4 bits over 0 to 255; in a mask the ids are wanted as they were written.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


class ImageFile(NamedTuple):
    """An image file of which the header has been read: see ``open_image``; ``orientation`` is to be applied yet."""

    data: bytes
    header: Image.Image
    orientation: int

    @property
    def told_orientation(self) -> int:
        """The orientation that the file tells, also of a TIFF, whose pixels Pillow turns as it decodes them."""
        told = _tags(self.header).get(TAG)
        return (
            told
            if isinstance(told, int) and 1 <= told <= 8
            else max(self.orientation, orientation_of(self.header.info))
        )

    @property
    def nbytes(self) -> int:
        """Most bytes that decoding it takes at a time: the codec's, the picture's and the array's."""
        width, height = self.header.size
        per_pixel = _PIXEL_BYTES if self.header.mode in ("1", "L", "P", "RGB") else _CONVERTED_BYTES
        per_pixel += _OTHER_BYTES * _has_no_end(self)
        pixels = (_WEBP_BYTES if self.header.format == "WEBP" else per_pixel) * width * height
        return pixels + _TILE_BYTES * _tile_pixels(self.header)


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
    data, image = _header(data)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("Unreadable", f"an image of {width} x {height} pixels")
    if max(width * height, _tile_pixels(image)) > max_pixels:
        tile = f" in tiles of {_tile_pixels(image)}" * bool(_tile_pixels(image))
        raise ImageError("TooLarge", f"{width} x {height} pixels{tile}; at most {max_pixels} are decoded")
    if "progressive" in image.info:
        scans = data.count(jpeg_scans.SCAN)
        if scans > min(jpeg_scans.MOST_SCANS, max(16, _MOST_SCANNED // (width * height))):
            raise ImageError("TooLarge", f"{scans} scans of {width} x {height} pixels")
    return ImageFile(data, image, _orientation(image))


def decode_image(file: bytes | ImageFile, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG, WebP, TIFF, BMP or GIF file.

    Whatever the file holds becomes RGB: palettes and CMYK are converted, grey is repeated, alpha is
    dropped, 16-bit grey is scaled by 1/257, and of an animation the first frame is taken. Floats are
    fractions of white where no more than 1 % are above 2, and else clipped to 0 to 255. The orientation
    that EXIF or XMP tells is applied. Thread safe; the codecs release the GIL.

    Args:
        file: the whole file, or what ``open_image`` made of it.
        max_pixels: larger images are refused from their header, before any pixel is decoded; those that are open
            already have passed.

    Returns:
        (H, W, 3) uint8, RGB, writeable and contiguous.

    Raises:
        ImageError: ``Empty``, ``Unreadable``, ``Truncated`` or ``TooLarge``.
    """
    return _even_without_end(_decoded, _opened(file, max_pixels))


def _decoded(file: ImageFile) -> NDArray[np.uint8]:
    pixels = _plain_jpeg(file)
    if pixels is not None:
        return pixels
    _load(file.header)
    return _upright(_to_rgb(file.header), file.orientation)


def picture_to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a PIL picture as ``decode_image`` converts a file of it: to (H, W, 3) uint8 RGB, upright.

    Raises:
        ImageError: ``Truncated`` or ``Unreadable``, for a picture whose file is damaged or has no conversion to RGB.
    """
    _load(picture)
    # After the pixels, since a PNG may carry its EXIF data behind them; a TIFF is upright by now.
    return _upright(_to_rgb(picture), _orientation(picture))


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
    return _even_without_end(lambda opened: _viewed(opened, sizes), _opened(file, max_pixels))


def _viewed(file: ImageFile, sizes: Callable[[int, int], Sequence[tuple[int, int]]]) -> Views:
    size, box = _load_for(file, sizes)
    height, width = _swapped(size, file.orientation)
    rgb = _to_rgb(file.header)
    views = [
        _upright(
            rgb.resize(_swapped(view, file.orientation)[::-1], Image.Resampling.BILINEAR, box=box), file.orientation
        )
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
    file = open_image(data, max_pixels=max_pixels)
    image = file.header
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I;16", "I"):
        raise ImageError("NotAMask", f"{image.format} of mode {image.mode}; a mask is a single-channel PNG")
    step = _GREY_STEPS.get(_raw_mode(image), 1)
    _load(image)
    ids: NDArray[np.generic] = _upright(image, file.orientation)
    if ids.dtype.itemsize > 1:
        return ids.astype(np.uint16, copy=False)
    small = ids.astype(np.uint8, copy=False)
    return small // np.uint8(step) if step > 1 else small


def _opened(file: bytes | ImageFile, max_pixels: int) -> ImageFile:
    return file if isinstance(file, ImageFile) else open_image(file, max_pixels=max_pixels)


def _header(data: bytes) -> tuple[bytes, Image.Image]:
    """Read the header of an image file; of a PNG what its pixels do not need is left out."""
    found = next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)
    extra: dict[str, bytes] = {}
    if found == "PNG":
        data, extra = png_chunks.without_extras(data)
    if found == "JPEG":
        jpeg_scans.check_segments(data)
    # A file that begins like an image is one, only damaged; anything else is something else.
    with _codec("Truncated" if found else "Unreadable", "the header cannot be read"):
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            if found:
                Image.OPEN[found][0](io.BytesIO(data), "")  # says what is wrong
            raise
    image.info.update(extra)
    return data, image


def _even_without_end(decode: Callable[[ImageFile], T], file: ImageFile) -> T:
    """Decode a file; of a JPEG the mark of its end may be missing."""
    return decode(_ended(file) if _has_no_end(file) else file)


def _has_no_end(file: ImageFile) -> bool:
    return file.header.format in jpeg_scans.FORMATS and not jpeg_scans.has_end(file.header, file.data)


def _ended(file: ImageFile) -> ImageFile:
    """Load a JPEG without the mark of its end, of which no pixel may be missing."""
    ended, noisy = (_header(data)[1] for data in jpeg_scans.with_ends(file.data.removesuffix(jpeg_scans.END[:1])))
    is_whole = jpeg_scans.has_all_scans(ended, file.data)
    if is_whole:
        _load(ended)
        _load(noisy)
    if not is_whole or not _are_same(ended, noisy):
        raise ImageError("Truncated", "the pixels cannot be decoded: the file ends early")
    return file._replace(header=ended)


def _are_same(one: Image.Image, other: Image.Image) -> bool:
    """Return whether the pixels of two pictures are the same, some rows at a time, the last ones first."""
    boxes = [(0, top, one.width, min(top + _ROWS, one.height)) for top in range(0, one.height, _ROWS)]
    return all(one.crop(box).tobytes() == other.crop(box).tobytes() for box in reversed(boxes))


def _plain_jpeg(file: ImageFile) -> NDArray[np.uint8] | None:
    """Decode the commonest sort of file, an upright, whole RGB JPEG, to Pillow's pixels in less time.

    Returns:
        None for all others, and where the codec fails, since Pillow's errors say what is wrong.
    """
    data, image, orientation = file
    upright_rgb = image.format in jpeg_scans.FORMATS and image.mode == "RGB" and orientation == 1
    if not upright_rgb or "progressive" in image.info or not jpeg_scans.is_one_whole_scan(image, data):
        return None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # such as one of its own limits on size
        return None
    return None if pixels is None else pixels.astype(np.uint8, copy=False)


def _load(image: Image.Image) -> None:
    """Decode the pixels, in place."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.tile = [tile._replace(args=_in_native_order(tile.args)) for tile in image.tile]
    with _codec("Truncated", "the pixels cannot be decoded"):
        image.load()


def _in_native_order(arguments: Any) -> Any:
    """Return the arguments of libtiff's decoder, of which the first says how the numbers lie."""
    return (_NATIVE.get(arguments[0], arguments[0]), *arguments[1:])


def _load_for(
    file: ImageFile, sizes: Callable[[int, int], Sequence[tuple[int, int]]]
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Decode the pixels, in place; of a JPEG no more than ``decode_views`` needs.

    Returns:
        Height and width of the whole image as it is stored, and the box of it in the pixels that were decoded, whose
        last row and column may stand for fewer rows and columns of the image than the others.
    """
    image, box = file.header, None
    size = image.size[::-1]
    if image.format in jpeg_scans.FORMATS:
        views = sizes(*_swapped(size, file.orientation))
        height, width = _swapped((max(view[0] for view in views), max(view[1] for view in views)), file.orientation)
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
        # Pillow looks up in tables what a TIFF may be.
        is_known = not (_UNKNOWN_SORT.search(detail) or isinstance(error.__cause__, KeyError))
        kind = kind if is_known else "Unreadable"
        # Pillow's words here are the address of our buffer.
        if detail.startswith(("cannot identify image file", "not identified by this driver")):
            detail = f"not one of {', '.join(_FORMATS)}" if kind == "Unreadable" else "cut off or damaged"
        raise ImageError(kind, f"{what}: {detail}") from error


def _swapped(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return height and width of an upright image from those of the stored one, and the other way round."""
    return size[::-1] if orientation >= 5 else size


def _upright(image: Image.Image, orientation: int) -> NDArray[Any]:
    turn = UPRIGHT.get(orientation)
    return np.array(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB; an RGB image is returned as it is."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(deep_grey.grey_to_bytes(np.asarray(image), _tags(image))).convert("RGB")
    # Transparency is dropped anyway; left in place, Pillow would convert it and warn.
    image = image.copy() if "transparency" in image.info else image
    image.info.pop("transparency", None)
    with _codec("Unreadable", f"mode {image.mode} has no conversion to RGB"):
        return image.convert(_PLAIN_ALPHA.get(image.mode, "RGB")).convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels lie in a file that is open but not loaded, such as ``L;4``."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else None
    return arguments if isinstance(arguments, str) else ""


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF; none of another picture."""
    return getattr(image, "tag_v2", {})


def _tile_pixels(image: Image.Image) -> int:
    """Return how many pixels a tile of a TIFF has, each of which is decoded whole; 0 where there are none."""
    width, height = (_tags(image).get(tag) for tag in _TILE)
    return max(0, width * height) if isinstance(width, int) and isinstance(height, int) else 0


def _orientation(image: Image.Image) -> int:
    """Return the orientation that is to be applied; a TIFF's Pillow applies with its pixels, unless it is a byte."""
    if image.format != "TIFF":
        return orientation_of(image.info)
    told = _tags(image).get(TAG)
    return told[0] if isinstance(told, bytes) and told[:1] in bytes(range(1, 9)) else 1
