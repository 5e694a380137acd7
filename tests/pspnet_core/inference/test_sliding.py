"""Sliding windows: which passes run, when, and how long their answers are held."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from pspnet_core.inference.postprocess import postprocess
from pspnet_core.inference.sliding import sliding_views
from pspnet_core.inference.windows import Box, Span, windows


class Network:
    """Says of each pixel of a cell how bright its window is; counts passes and the answers that are alive."""

    def __init__(self, answers: int = 1) -> None:
        self.answers = answers
        self.passes: list[int] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        self.passes.append(len(pixels))
        self.most = max(self.most, sum(reference() is not None for reference in self.alive))
        means = pixels.float().mean(dim=(1, 2, 3))
        logits = [torch.stack([means, -means], 1)[:, :, None, None] + index for index in range(self.answers)]
        self.alive += [weakref.ref(part) for part in logits]
        return logits


def test_each_image_gets_its_own_windows_from_top_to_bottom() -> None:
    pixels = torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 50, 64)
    network = Network(answers=2)
    for index, view in enumerate(sliding_views(pixels, network, side=32, limit=4, classes=2)):
        tiles = view.tiles_at(Box(Span(0, 50), Span(0, 64)))
        assert [tile.window for tile in tiles] == [window for window in windows(50, 64, 32) for _ in range(2)]
        # in units of ln 2
        assert {round(float(tile.logits[0, 0, 0]) * 0.6931, 3) for tile in tiles} == {index, index + 1}
    assert network.passes == [4, 4, 4]


def test_passes_run_when_a_block_needs_them_and_tiles_above_are_forgotten() -> None:
    network = Network()
    (view,) = sliding_views(torch.zeros(1, 3, 200, 40, dtype=torch.uint8), network, side=40, limit=1, classes=2)
    assert network.passes == []
    assert len(view.tiles_at(Box(Span(0, 10), Span(0, 40)))) == 1
    assert network.passes == [1]
    rows = [tile.window.rows for tile in view.tiles_at(Box(Span(50, 60), Span(0, 40)))]
    assert rows == [Span(27, 67), Span(54, 94)]
    assert network.passes == [1, 1, 1]
    assert [tile.window.rows for tile in view.tiles_at(Box(Span(68, 70), Span(0, 40)))] == [Span(54, 94)]
    assert network.passes == [1, 1, 1]


@pytest.mark.parametrize("limit", [1, 4])
def test_answers_are_held_no_longer_than_they_are_needed(limit: int) -> None:
    gc.disable()
    try:
        networks = [Network(answers=2) for _ in range(2)]
        inputs = [torch.zeros(1, 3, height, 48, dtype=torch.uint8) for height in (640, 1280)]
        views = [
            view
            for pixels, network in zip(inputs, networks, strict=True)
            for view in sliding_views(pixels, network, side=32, limit=limit, classes=2)
        ]
        postprocess(views, 640, 48, align_corners=False)
    finally:
        gc.enable()
    assert [sum(network.passes) for network in networks] == [2 * 29, 2 * 58]
    assert all(network.most <= 2 for network in networks)
