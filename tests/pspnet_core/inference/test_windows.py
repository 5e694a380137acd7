"""Geometry of windows, against sets of pixels and the loop of the paper's evaluation code."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.inference.windows import Box, Span, windows

spans = st.builds(Span, st.integers(-20, 20), st.integers(-20, 20))
boxes = st.builds(Box, spans, spans)


def _pixels(box: Box) -> set[tuple[int, int]]:
    return set(itertools.product(range(*box.rows), range(*box.columns)))


@given(boxes, boxes)
def test_boxes_are_sets_of_pixels(one: Box, other: Box) -> None:
    assert _pixels(one & other) == _pixels(one) & _pixels(other)
    assert math.prod(one.shape) == len(_pixels(one))
    moved = one.seen_from(other)
    assert {(y + other.rows.start, x + other.columns.start) for y, x in _pixels(moved)} == _pixels(one)


def test_a_box_cuts_rows_and_columns() -> None:
    image = [[10 * y + x for x in range(5)] for y in range(4)]
    rows, columns = Box(Span(1, 3), Span(2, 5)).slices
    assert [row[columns] for row in image[rows]] == [[12, 13, 14], [22, 23, 24]]


@given(st.integers(1, 900), st.integers(1, 900), st.integers(32, 300))
def test_windows_lie_as_in_the_papers_code(height: int, width: int, side: int) -> None:
    expected = []
    tall, wide = min(side, height), min(side, width)
    for row in range(math.ceil((height - tall) / math.ceil(tall * 2 / 3)) + 1):
        for column in range(math.ceil((width - wide) / math.ceil(wide * 2 / 3)) + 1):
            bottom = min(row * math.ceil(tall * 2 / 3) + tall, height)
            right = min(column * math.ceil(wide * 2 / 3) + wide, width)
            expected.append(Box(Span(bottom - tall, bottom), Span(right - wide, right)))
    assert windows(height, width, side) == expected


@pytest.mark.parametrize("side", [0, 64, 65])
def test_one_window_is_enough_for_a_small_input(side: int) -> None:
    assert windows(48, 64, side) == [Box(Span(0, 48), Span(0, 64))]
