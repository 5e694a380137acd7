"""The width of boundary regions that the paper's code takes; the regions are tested by what is counted of them."""

from __future__ import annotations

import pytest

from pspnet_core.metrics.boundaries import boundary_width


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, 1), (30, 40, 1), (60, 80, 2), (100, 75, 2), (360, 480, 12), (1024, 2048, 46)],  # 2.5 rounds to even: 2
)
def test_the_width_is_a_fiftieth_of_the_diagonal(height: int, width: int, expected: int) -> None:
    assert boundary_width(height, width) == expected
