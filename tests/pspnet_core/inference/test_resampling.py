"""Pieces of a bilinear resize, cut out of PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.inference.resampling import blend, resample
from pspnet_core.inference.windows import Span

lengths = st.integers(1, 60)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, Span]:
    """Inputs, outputs, and a span of the outputs."""
    inputs, outputs = draw(lengths), draw(lengths)
    start = draw(st.integers(0, outputs - 1))
    return inputs, outputs, Span(start, draw(st.integers(start + 1, outputs)))


@given(axes(), axes(), st.booleans(), st.booleans())
def test_a_piece_of_pytorchs_interpolation(
    vertical: tuple[int, int, Span], horizontal: tuple[int, int, Span], align_corners: bool, buffered: bool
) -> None:
    (height, tall, rows), (width, wide, columns) = vertical, horizontal
    x = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * width))
    expected = F.interpolate(x[None].double(), size=(tall, wide), mode="bilinear", align_corners=align_corners)[0]
    down = blend(rows, tall, height, align_corners=align_corners)
    across = blend(columns, wide, width, align_corners=align_corners)
    piece = x[:, slice(*down.inputs), slice(*across.inputs)].transpose(0, 1)
    before = piece.clone()
    out = torch.full((3 * 60 * 60,), torch.nan) if buffered else None
    found = resample(piece, down, across, out=out)
    torch.testing.assert_close(
        found.double(), expected[:, slice(*rows), slice(*columns)].transpose(0, 1), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(piece, before, rtol=0, atol=0)
    assert out is None or found.data_ptr() == out.data_ptr()


@given(axes(), st.booleans())
def test_only_what_is_needed_is_read(axis: tuple[int, int, Span], align_corners: bool) -> None:
    inputs, outputs, span = axis
    needed, weights = blend(span, outputs, inputs, align_corners=align_corners)
    if weights is None:
        assert inputs == outputs
        assert needed == span
        return
    assert weights.shape == (span.length, needed.length)
    assert needed.length <= (span.length - 1) * inputs / outputs + 3 + align_corners * span.length / outputs
    assert ((weights != 0).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(span.length))


@pytest.mark.parametrize("align_corners", [True, False])
def test_nothing_is_multiplied_where_sizes_agree(align_corners: bool) -> None:
    x = torch.randn(4, 2, 5)
    down, across = blend(Span(1, 3), 9, 9, align_corners=align_corners), blend(Span(0, 5), 5, 5, align_corners=True)
    assert down.weights is across.weights is None
    assert resample(x[1:3], down, across).data_ptr() == x[1:3].data_ptr()
