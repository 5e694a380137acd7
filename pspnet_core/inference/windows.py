"""Rectangles of pixels, and where the windows of a sliding window lie.

Shapes: ``h w`` pixels of a network input.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple


class Span(NamedTuple):
    """Pixels ``start`` to ``stop - 1`` along one axis; empty unless ``start < stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of pixels, at least 0."""
        return max(0, self.stop - self.start)

    def __and__(self, other: "Span") -> "Span":
        """Intersection."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))

    def seen_from(self, origin: int) -> "Span":
        """The same pixels, counted from ``origin``."""
        return Span(self.start - origin, self.stop - origin)


class Box(NamedTuple):
    """A rectangle of pixels."""

    rows: Span
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.length, self.columns.length

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index that cuts it out of the last two axes of an array."""
        return slice(*self.rows), slice(*self.columns)

    def __and__(self, other: "Box") -> "Box":
        """Intersection."""
        return Box(self.rows & other.rows, self.columns & other.columns)

    def seen_from(self, origin: "Box") -> "Box":
        """The same pixels, counted from the upper left corner of ``origin``."""
        return Box(self.rows.seen_from(origin.rows.start), self.columns.seen_from(origin.columns.start))


def windows(height: int, width: int, side: int) -> list[Box]:
    """List the windows that cover a network input of ``h w`` pixels, from top to bottom, in rows from left to right.

    They lie as in the paper's evaluation code (hszhao/semseg, ``tool/test.py``): neighbours overlap by a third, and the
    last of a row or column is moved inwards, to end where the input ends. That code pads what is smaller than a window;
    here windows are as short as the input, since padding costs time and shows the network what no image holds.

    Args:
        side: of a window in pixels; 0 for one window over everything.
    """
    rows, columns = (_spans(length, min(length, side or length)) for length in (height, width))
    return [Box(down, across) for down in rows for across in columns]


@lru_cache(maxsize=1024)
def most_windows(sizes: Iterable[tuple[int, ...]], side: int) -> int:
    """Windows of the input that has most, of inputs of these shapes ``(h, w, N)``; cached, so give a tuple."""
    return max(len(windows(height, width, side)) for height, width, _ in sizes)


def most_pixels(sizes: Iterable[tuple[int, ...]], side: int) -> int:
    """Pixels of the largest window of inputs of these shapes ``(h, w, N)``."""
    return max(min(height, side or height) * min(width, side or width) for height, width, _ in sizes)


def _spans(length: int, side: int) -> list[Span]:
    stride = -(-side * 2 // 3)
    steps = -(-(length - side) // stride)
    starts = [*range(0, steps * stride, stride), length - side]
    return [Span(start, start + side) for start in starts]
