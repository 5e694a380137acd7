"""Boundary regions against a loop over squares of pixels, and the width that the paper's code takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspnet_core.metrics.boundaries import boundary_region, boundary_width


@given(st.integers(0, 2**32), st.integers(1, 14), st.integers(1, 14), st.integers(1, 4))
@settings(deadline=None, derandomize=True)
def test_a_pixel_is_inside_when_its_square_holds_its_class_alone(seed: int, height: int, width: int, d: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    labels[: random.integers(0, height + 1), : random.integers(0, width + 1)] = 200
    labels[random.random(labels.shape) < 0.02] = 7
    region = boundary_region(labels, d)
    for y in range(height):
        for x in range(width):
            square = labels[max(0, y - d) : y + d + 1, max(0, x - d) : x + d + 1]
            whole = square.size == (2 * d + 1) ** 2
            assert region[y, x] != (whole and bool((square == labels[y, x]).all()))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, 1), (30, 40, 1), (60, 80, 2), (100, 75, 2), (360, 480, 12), (1024, 2048, 46)],  # 2.5 rounds to even: 2
)
def test_the_width_is_a_fiftieth_of_the_diagonal(height: int, width: int, expected: int) -> None:
    assert boundary_width(height, width) == expected
