"""Resizing and averaging as matrices, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.network.interpolation import interpolation_matrix, pooling_matrix

LENGTHS = st.integers(1, 90)


@given(LENGTHS, LENGTHS, st.booleans())
def test_interpolation_is_pytorchs(outputs: int, inputs: int, align_corners: bool) -> None:
    x = torch.randn(1, 1, inputs, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(inputs))
    expected = F.interpolate(x, size=(outputs, 1), mode="bilinear", align_corners=align_corners)
    matrix = interpolation_matrix(outputs, inputs, align_corners=align_corners, dtype=torch.float64)
    torch.testing.assert_close(matrix @ x[0, 0], expected[0, 0], rtol=1e-9, atol=1e-9)
    assert (matrix > 0).sum(1).max() <= 2


@given(LENGTHS, LENGTHS)
def test_pooling_is_pytorchs(outputs: int, inputs: int) -> None:
    x = torch.randn(1, 1, inputs, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(inputs))
    matrix = pooling_matrix(outputs, inputs, dtype=torch.float64)
    assert set(matrix.unique().tolist()) <= {0.0, 1.0}
    averages = matrix @ x[0, 0] / matrix.sum(1, keepdim=True)
    torch.testing.assert_close(averages, F.adaptive_avg_pool2d(x, (outputs, 1))[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
def test_float32_is_close_enough(align_corners: bool) -> None:
    exact = interpolation_matrix(4096, 512, align_corners=align_corners, dtype=torch.float64)
    rounded = interpolation_matrix(4096, 512, align_corners=align_corners)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 1e-4
