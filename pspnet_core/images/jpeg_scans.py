"""The segments and scans of a JPEG file: how many there are, and whether all of its pixels are there (ITU-T T.81)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pspnet_core.errors import ImageError

FORMATS = ("JPEG", "MPO")
SCAN, END = b"\xff\xda", b"\xff\xd9"
MOST_SCANS = 1000

_MOST_SEGMENTS, _LONG_JPEG = 2**16, 2**20
"""Segments of a JPEG, each of which Pillow keeps, and bytes of one that has room for too many of them."""

# Markers of a JPEG after which no length follows: restarts, begin and end, and those of its extensions.
_WITHOUT_LENGTH = frozenset({*range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)})

# What goes into the scan of a JPEG that lacks its end, also where one with restarts waits for the next of these.
_NOISE = b"".join(b"\x5a\xa5\x36" * 40 + bytes([0xFF, 0xD0 + number]) for number in range(8)) + b"\x5a\xa5\x36" * 40


def check_segments(data: bytes) -> None:
    """Raise an ImageError for a JPEG with too many segments before its scan; Pillow reads them in the same way."""
    at = 0 if len(data) > _LONG_JPEG else len(data)
    for _ in range(_MOST_SEGMENTS):
        at = data.find(b"\xff", at)
        marker = data[at + 1] if 0 <= at < len(data) - 1 else SCAN[1]
        if marker == SCAN[1]:
            return
        if marker in (0x00, 0xFF):
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    raise ImageError("TooLarge", f"a JPEG with more than {_MOST_SEGMENTS} segments")


def start_of_scan(header: Image.Image) -> int:
    """Return at which byte the scan of a JPEG begins, of which no more than the header has been read."""
    stream = getattr(header, "fp", None)
    return stream.tell() if stream else 0


def has_all_scans(header: Image.Image, data: bytes) -> bool:
    """Return whether the scans of a JPEG hold each component to its last bit, as far as their headers tell."""
    left: dict[int, set[int]] = {}  # by component, the coefficients that are missing
    for *selectors, first, last, bits in itertools.islice(_scan_headers(header, data), MOST_SCANS):
        for component in selectors[::2] if bits & 15 == 0 else ():
            left.setdefault(component, set(range(64))).difference_update(range(first, last + 1))
    return len(left) == len(header.getbands()) and not any(left.values())


def _scan_headers(header: Image.Image, data: bytes) -> Iterator[bytes]:
    """Yield what the headers of scans say (T.81, B.2.3): two bytes per component, and then three for all of them."""
    at = data.rfind(SCAN, 0, start_of_scan(header))
    while at >= 0:
        said = data[at + 5 : at + 8 + 2 * data[at + 4]] if at + 4 < len(data) else b""
        if len(said) >= 3:
            yield said
        at = data.find(SCAN, at + 2)


def has_end(header: Image.Image, data: bytes) -> bool:
    """Return whether the mark of an end is anywhere behind the start of a JPEG's scan."""
    return data.endswith(END) or data.rfind(END) >= start_of_scan(header)


def with_ends(data: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG with an end, and with noise before it; the pixels of both are the same where none is missing."""
    return data + END, data + _NOISE + END


def is_one_whole_scan(header: Image.Image, data: bytes) -> bool:
    """Return whether a JPEG's scan goes up to its end with no marker in between; OpenCV passes over damage there.

    In a scan a byte 0xff is followed by a zero (ITU-T T.81, B.1.1.5), or else it begins a marker.
    """
    if not data.endswith(END):
        return False
    scan = np.frombuffer(data, np.uint8)[start_of_scan(header) :]
    followed = np.flatnonzero(scan[: -len(END)] == 0xFF)
    return not scan[followed + 1].any()
