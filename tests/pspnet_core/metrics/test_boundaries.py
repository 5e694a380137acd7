"""The width of boundary regions that the paper's code takes, and the regions of tiny images."""

from __future__ import annotations

import numpy as np
import pytest

from pspnet_core.metrics.boundaries import boundary_region, boundary_width


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, 1), (30, 40, 1), (60, 80, 2), (100, 75, 2), (360, 480, 12), (1024, 2048, 46)],  # 2.5 rounds to even: 2
)
def test_the_width_is_a_fiftieth_of_the_diagonal(height: int, width: int, expected: int) -> None:
    assert boundary_width(height, width) == expected


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (9, 4)])
def test_an_image_that_no_square_fits_into_is_all_boundary(size: tuple[int, int]) -> None:
    assert boundary_region(np.zeros(size, np.uint8), 2).all()
