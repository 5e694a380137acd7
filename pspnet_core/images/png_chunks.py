"""The chunks of a PNG file: what it needs for its pixels, and what it says of its orientation.

Text, profiles and animations are left out before a codec sees them: they may be compressed, damaged, or of any size,
and say nothing of the pixels. Of a chunk that is needed, the checksum has to be right (PNG specification, 13.2), or of
the pixels the one within them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from pspnet_core.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MOST_CHUNKS = 2**18

_NEEDED = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_END = b"IEND"
_AROUND = 12  # bytes of a chunk's length, name and checksum
_XMP = b"XML:com.adobe.xmp\0"
_LONGEST_XMP = 2**20  # bytes, inflated; what goes on is cut off
_MOST_INFLATED = 2**32
"""Bytes of pixels that are inflated to find out whether they are damaged."""


class Png(NamedTuple):
    """A PNG file without what its pixels do not need.

    Attributes:
        data: the file.
        info: its EXIF and XMP, as ``exif`` and ``xmp``, where there are such.
    """

    data: bytes
    info: dict[str, bytes]


def without_extras(data: bytes) -> Png:
    """Leave out of a PNG file all chunks that its pixels do not need. What follows damage is kept for the codec.

    Raises:
        ImageError: ``Truncated`` for a wrong checksum, ``Unreadable`` for a needed chunk that nobody knows,
            ``TooLarge`` for more than ``MOST_CHUNKS``.
    """
    view, kept, info = memoryview(data), io.BytesIO(), dict[str, bytes]()
    start, at, name = 0, len(SIGNATURE), b""  # from `start` on all is kept
    pixels, is_doubtful = list[memoryview](), False
    for _ in range(MOST_CHUNKS):
        if name == _END or at + _AROUND > len(data):
            break
        size, name = struct.unpack_from(">I4s", data, at)
        after = at + _AROUND + size
        if not name.isalpha() or after > len(data):
            at = at if name[:1].islower() else len(data)
            break
        if name == b"IDAT":
            pixels.append(view[at + 8 : after - 4])
            is_doubtful = is_doubtful or not _is_right(view[at:after])
        elif name[:1].isupper():
            _check(name, view[at:after])
        else:
            info |= _told(name, view[at + 8 : after - 4])
            kept.write(view[start:at])
            start = after
        at = after
    else:
        raise ImageError("TooLarge", f"more than {MOST_CHUNKS} chunks")
    if is_doubtful:
        _check_pixels(pixels)
    if start == 0 and at == len(data):
        return Png(data, info)
    kept.write(view[start:at])
    return Png(kept.getvalue(), info)


def _check(name: bytes, chunk: memoryview) -> None:
    if name != _END and not _is_right(chunk):
        raise ImageError("Truncated", f"a wrong checksum of the chunk {name.decode()}")
    if name not in _NEEDED:
        raise ImageError("Unreadable", f"a PNG with a chunk {name.decode()}, which is not known")


def _is_right(chunk: memoryview) -> bool:
    """Return whether the checksum of a chunk is right."""
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _check_pixels(parts: Sequence[memoryview]) -> None:
    """Raise an ImageError unless the checksum within the pixels is right; Pillow does not always get as far as that."""
    inflating, left = zlib.decompressobj(), _MOST_INFLATED
    pieces = (part[at : at + 2**12] for part in parts for at in range(0, len(part), 2**12))  # of 4 MB at most
    try:
        while left > 0 and not inflating.eof:
            left -= len(inflating.decompress(next(pieces)))
    except (zlib.error, StopIteration) as error:
        raise ImageError("Truncated", "the pixels are damaged: their checksum is wrong") from error
    if not inflating.eof:
        raise ImageError("TooLarge", f"pixels of more than {_MOST_INFLATED} bytes, and a wrong checksum")


def _told(name: bytes, content: memoryview) -> dict[str, bytes]:
    """What a chunk says of the orientation."""
    if name == b"eXIf":
        return {"exif": bytes(content)}
    if name == b"iTXt" and content[: len(_XMP)] == _XMP:
        return {"xmp": _xmp(bytes(content[len(_XMP) :]))}
    return {}


def _xmp(content: bytes) -> bytes:
    """The text behind a keyword, whether and how it is compressed, its language, and the keyword in that."""
    text = content[2:].split(b"\0", 2)[-1]
    if not content.startswith(b"\1"):
        return text
    try:
        return zlib.decompressobj().decompress(text, _LONGEST_XMP)
    except zlib.error:
        return b""
