"""Classes and confidence, against PyTorch's interpolation and softmax of whole arrays and loops over tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pspnet_core.inference import postprocess as postprocessing
from pspnet_core.inference.postprocess import Tile, WholeView, postprocess
from pspnet_core.inference.windows import Box, Span, windows
from tests.support.networks import Results, assert_decision


class TiledView:
    """A view of ready answers, ``(C, p, q)`` each, for some windows."""

    def __init__(self, height: int, width: int, answers: Sequence[tuple[Tensor, Box]]) -> None:
        self.height, self.width, self.answers = height, width, answers
        self.classes, self.device = len(answers[0][0]), answers[0][0].device
        self.tiles = [Tile.of(*answer) for answer in answers]

    def tiles_at(self, box: Box) -> list[Tile]:
        return [tile for tile in self.tiles if all((tile.window & box).shape)]


def _probabilities(views: Sequence[TiledView], size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """``(C, H, W)`` float64: softmax, mean over tiles, resize, mean over views."""
    resized = []
    for view in views:
        total = torch.zeros(view.classes, view.height, view.width, dtype=torch.float64)
        count = torch.zeros(view.height, view.width)
        for logits, window in view.answers:
            upsampled = F.interpolate(
                logits[None].double(), size=window.shape, mode="bilinear", align_corners=align_corners
            )
            rows, columns = window.slices
            total[:, rows, columns] += upsampled[0].softmax(0)
            count[rows, columns] += 1
        assert count.min() > 0
        mean = (total / count)[None]
        resized.append(F.interpolate(mean, size=size, mode="bilinear", align_corners=False)[0])
    return torch.stack(resized).mean(0)


def _whole(logits: Tensor, height: int, width: int) -> TiledView:
    return TiledView(height, width, [(logits, Box(Span(0, height), Span(0, width)))])


def _random_view(
    seed: int, classes: int, size: tuple[int, int], cells: tuple[int, int], side: int, twice: bool
) -> TiledView:
    generator = torch.Generator().manual_seed(seed)
    answers = [
        (4 * torch.randn(classes, *cells, generator=generator), window)
        for window in windows(*size, side)
        for _ in range(1 + twice)
    ]
    return TiledView(*size, answers)


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
cells = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(
    st.integers(0, 2**32),
    st.integers(2, 9),
    sides,
    st.lists(st.tuples(sides | st.none(), cells, st.sampled_from([0, 9, 16]), st.booleans()), min_size=1, max_size=3),
    st.sampled_from([60, 3000]),
)
@settings(max_examples=25)
@pytest.mark.parametrize("align_corners", [True, False])
def test_it_is_interpolation_softmax_mean_and_argmax(
    align_corners: bool, seed: int, classes: int, size: tuple[int, int], inputs: list[Any], values: int
) -> None:
    views = [
        _random_view(seed + index, classes, own or size, shape, side, twice)
        for index, (own, shape, side, twice) in enumerate(inputs)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(postprocessing.BLOCK_VALUES, "cpu", values)
        patch.setattr(postprocessing, "BLOCK_ROWS", 2)
        patch.setattr(postprocessing, "BLOCK_COLUMNS", 13)
        mask, confidence = postprocess(views, *size, align_corners=align_corners)
    assert_decision(mask, confidence, _probabilities(views, size, align_corners=align_corners), within=1e-5)


@pytest.mark.parametrize(("classes", "align_corners"), [(11, True), (11, False), (150, False), (300, True)])
def test_one_view_of_the_images_size_in_blocks_as_they_are(classes: int, align_corners: bool) -> None:
    view = _whole(4 * torch.randn(classes, 9, 35, generator=torch.Generator().manual_seed(0)), 69, 530)
    mask, confidence = postprocess([view], 69, 530, align_corners=align_corners)
    assert_decision(mask, confidence, _probabilities([view], (69, 530), align_corners=align_corners), within=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (33, 47)])
@pytest.mark.parametrize("twice", [True, False])
def test_the_logits_stay_as_they_are(shape: tuple[int, int], twice: bool) -> None:
    view = _random_view(0, 5, (33, 47), shape, 0, twice)
    before = [tile.logits.clone() for tile in view.tiles]
    first, second = postprocess([view], 33, 47, align_corners=False), postprocess([view], 33, 47, align_corners=False)
    assert all(torch.equal(tile.logits, old) for tile, old in zip(view.tiles, before, strict=True))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("classes", [2, 256, 257, 300])
@pytest.mark.parametrize("views", [1, 2])
def test_ids_above_255_need_16_bits(classes: int, views: int) -> None:
    logits = torch.zeros(classes, 2, 2)
    logits[classes - 1] = 5
    mask, _ = postprocess([_whole(logits, 5, 7)] * views, 5, 7, align_corners=False)
    assert mask.dtype == (torch.uint8 if classes <= 256 else torch.uint16)
    assert set(mask.numpy().ravel()) == {classes - 1}


@pytest.mark.parametrize("classes", [3, 40, 256, 300])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("size", [(7, 5), (45, 61), (96, 128)])
def test_the_lowest_of_equal_classes_wins(size: tuple[int, int], views: int, classes: int) -> None:
    logits = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).repeat(classes, 1, 1)
    logits[0] -= 1
    mask, confidence = postprocess([_whole(logits, *size)] * views, *size, align_corners=False)
    assert set(mask.numpy().ravel()) == {1}
    torch.testing.assert_close(confidence, torch.full(size, 1 / (classes - 1 + math.exp(-1))))


@pytest.mark.parametrize("views", [1, 2])
def test_huge_logits_do_not_overflow(views: int) -> None:
    logits = torch.tensor([1000.0, -1000.0, 999.0]).view(3, 1, 1)
    mask, confidence = postprocess([_whole(logits, 2, 2)] * views, 2, 2, align_corners=False)
    assert (mask == 0).all()
    torch.testing.assert_close(confidence, torch.full((2, 2), 1 / (1 + math.exp(-1))))


@pytest.mark.parametrize("views", [1, 2])
def test_a_broken_networks_ids_are_ids_all_the_same(views: int) -> None:
    mask, confidence = postprocess([_whole(torch.full((3, 1, 1), math.nan), 2, 2)] * views, 2, 2, align_corners=False)
    assert (mask < 3).all()
    assert confidence.isnan().all()


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 160), (64, 70), (8, 10), (150, 170)])
@pytest.mark.parametrize("side", [0, 50])
def test_no_array_of_all_classes_and_pixels_is_made(
    monkeypatch: pytest.MonkeyPatch, side: int, size: tuple[int, int]
) -> None:
    block, classes, height, width = 2**14, 60, 128, 160
    monkeypatch.setitem(postprocessing.BLOCK_VALUES, "cpu", block)
    cells = -(-(side or height) // 16), -(-(side or width) // 16)
    view = _random_view(0, classes, (height, width), cells, side, False)
    with Results() as results:
        postprocess([view], *size, align_corners=False)
    # A block, with the margin that resizing needs around it.
    assert results.largest <= max(classes * math.prod(cells), math.prod(size), 3 * block)
    assert results.largest < classes * height * width / 10


def test_a_view_in_one_piece_and_its_mirror_image() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randn(5, 4, 6, generator=generator) for _ in range(2)]
    whole = postprocess([WholeView(33, 47, answers)], 20, 30, align_corners=False)
    window = Box(Span(0, 33), Span(0, 47))
    tiled = postprocess([TiledView(33, 47, [(answer, window) for answer in answers])], 20, 30, align_corners=False)
    assert all(torch.equal(one, other) for one, other in zip(whole, tiled, strict=True))
