"""Postprocessing of coarse logits to classes: resize, softmax, average, argmax, block by block.

No ``(C, H, W)`` array of the whole image ever exists: a block of pixels is computed from the few coarse cells around it
while it fits into the cache.

Shapes: ``C`` classes, ``H W`` pixels of the image, ``h w`` of a network input, ``p q`` coarse cells, ``r c`` rows and
columns of a block.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pspnet_core.inference.resampling import blend, resample
from pspnet_core.inference.windows import Box, Span

BLOCK_VALUES = {"cpu": 2**19, "cuda": 2**24}
"""Logits of a block: on a CPU what stays in its caches, on a GPU enough to keep it busy."""
BLOCK_ROWS, BLOCK_COLUMNS = 12, 512
"""Least rows and most columns of a block: long rows suit the CPU, more of them use the same coarse cells."""


class Tile(NamedTuple):
    """Coarse logits of a window of a network input.

    Attributes:
        logits: ``(p, C, q)`` float32 in units of ln 2, since CPUs raise 2 to a power twice as fast as e.
        window: where in the network input.
    """

    logits: Tensor
    window: Box

    @classmethod
    def of(cls, logits: Tensor, window: Box) -> "Tile":
        """From logits ``(C, p, q)`` float32, to be resized bilinearly to the window's size."""
        return cls((logits * math.log2(math.e)).transpose(0, 1).contiguous(), window)


class View(Protocol):
    """A network input made of the image, and the tiles that cover it.

    Attributes:
        height, width: ``h w``, its size in pixels.
        classes, device: of the logits.
    """

    height: int
    width: int
    classes: int
    device: torch.device

    def tiles_at(self, box: Box) -> Sequence[Tile]:
        """The tiles that touch some pixels of the view. Asked for from top to bottom."""


class WholeView:
    """A view that the network looked at in one piece.

    Args:
        height, width: ``h w``, its size in pixels.
        logits: ``(C, p, q)`` float32 each: of the view, and of its mirror image (mirrored back) if there is one.
    """

    def __init__(self, height: int, width: int, logits: Sequence[Tensor]) -> None:
        self.height, self.width = height, width
        self.classes, self.device = len(logits[0]), logits[0].device
        box = Box(Span(0, height), Span(0, width))
        self.tiles = [Tile.of(answer, box) for answer in logits]

    def tiles_at(self, box: Box) -> Sequence[Tile]:
        """All of its tiles, as each covers the view."""
        return self.tiles


@torch.no_grad()
def postprocess(views: Sequence[View], height: int, width: int, *, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Find the most probable class of each pixel, and its probability.

    In the order of the paper's evaluation code (hszhao/semseg, ``tool/test.py``): logits are resized to their window
    and turned into probabilities; these are averaged over the tiles, resized to the image and averaged over the views.
    The lowest of equally probable classes wins.

    Args:
        views: at least one, all of the same image and on the same device.
        height, width: ``H W``, the image's size.
        align_corners: how logits are resized. Probabilities are resized by pixel centres, as images are.

    Returns:
        Mask ``(H, W)`` uint8 (uint16 above 256 classes) and confidence ``(H, W)`` float32 in [1/C, 1].
    """
    canvases = [_Canvas(view, height, width, align_corners=align_corners) for view in views]
    classes, device = canvases[0].classes, canvases[0].device
    mask = torch.empty((height, width), dtype=torch.uint8 if classes <= 256 else torch.uint16, device=device)
    confidence = torch.empty((height, width), dtype=torch.float32, device=device)
    values = BLOCK_VALUES["cpu" if device.type == "cpu" else "cuda"]
    # A block of an image that was enlarged for the network takes as many more of the network's pixels.
    enlarged = max(1.0, *(view.height * view.width / (height * width) for view in views))
    for block in _blocks(height, width, max(1, int(values / (classes * enlarged)))):
        winner, probability = _classify_block(canvases, block)
        mask[block.slices] = winner.to(mask.dtype)
        confidence[block.slices] = probability
    return mask, confidence


def _blocks(height: int, width: int, pixels: int) -> Iterator[Box]:
    """Blocks of at most that many pixels, from top to bottom."""
    wide = min(width, BLOCK_COLUMNS, max(1, pixels // BLOCK_ROWS))
    tall = min(height, pixels // wide)
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            yield Box(Span(top, min(top + tall, height)), Span(left, min(left + wide, width)))


def _classify_block(canvases: Sequence["_Canvas"], block: Box) -> tuple[Tensor, Tensor]:
    """Winner and probability ``(r, c)``."""
    if len(canvases) == 1 and (logits := canvases[0].logits(block)) is not None:
        margin = logits.sub_(logits.amax(dim=1, keepdim=True))
        # The largest softmax value is 1 / sum(2 ** (x - max x)): no need to divide all of them.
        return _first_zero(margin), margin.exp2_().sum(dim=1).reciprocal_()
    total, *others = (canvas.probabilities(block) for canvas in canvases)
    for probabilities in others:
        total += probabilities
    best = total.amax(dim=1, keepdim=True)
    return _first_zero(total.sub_(best)), best.squeeze(1) / len(canvases)


def _first_zero(margin: Tensor) -> Tensor:
    """The lowest class whose entry of ``(r, C, c)`` is 0; the highest there is where none is (NaN).

    On a CPU many times faster than ``argmax``, ``max`` with indices or a comparison of floats, which PyTorch does one
    value at a time: the cast to bool and operations on bytes are vectorised.
    """
    last = margin.shape[1] - 1
    ranks = torch.arange(last, -1, -1, dtype=torch.uint8 if last < 256 else torch.int32, device=margin.device)
    zeros = margin.bool().view(torch.uint8).bitwise_xor_(1)
    return last - (zeros * ranks.view(-1, 1)).amax(dim=1)


class _Canvas:
    """A view at the image's size, a block at a time from top to bottom."""

    def __init__(self, view: View, height: int, width: int, *, align_corners: bool) -> None:
        self.view, self.classes, self.device = view, view.classes, view.device
        self.resized = (view.height, view.width) != (height, width)
        self.scratch = torch.empty(0, device=self.device)
        self.down = partial(blend, outputs=height, inputs=view.height, align_corners=False, device=self.device)
        self.across = partial(blend, outputs=width, inputs=view.width, align_corners=False, device=self.device)
        self.in_window = partial(blend, align_corners=align_corners, device=self.device)

    def logits(self, block: Box) -> Tensor | None:
        """Logits ``(r, C, c)`` in bits of a block that lies in one tile of a view of the image's size; else None."""
        if self.resized:
            return None
        tiles = self.view.tiles_at(block)
        return self._tile_logits(tiles[0], block) if len(tiles) == 1 else None

    def probabilities(self, block: Box) -> Tensor:
        """Probabilities ``(r, C, c)``."""
        down, across = self.down(block.rows), self.across(block.columns)
        return resample(self._mean(Box(down.inputs, across.inputs)), down, across)

    def _mean(self, box: Box) -> Tensor:
        """Probabilities of some pixels of the view, averaged over the tiles there."""
        rows, columns = box.shape
        total = torch.zeros((rows, self.classes, columns), device=self.device)
        count = torch.zeros((rows, 1, columns), device=self.device)
        for tile in self.view.tiles_at(box):
            part = box & tile.window
            down, across = part.seen_from(box).slices
            odds = self._tile_logits(tile, part)
            odds.sub_(odds.amax(dim=1, keepdim=True)).exp2_()
            total[down, :, across].addcdiv_(odds, odds.sum(dim=1, keepdim=True))
            count[down, :, across] += 1
        return total.div_(count)

    def _tile_logits(self, tile: Tile, box: Box) -> Tensor:
        """Logits ``(r, C, c)`` in bits of some pixels of a tile; valid until the next call."""
        inside = box.seen_from(tile.window)
        height, width = tile.window.shape
        down = self.in_window(inside.rows, height, len(tile.logits))
        across = self.in_window(inside.columns, width, tile.logits.shape[-1])
        rows, columns = Box(down.inputs, across.inputs).slices
        values = math.prod(box.shape) * self.classes
        if values > len(self.scratch):
            self.scratch = torch.empty(values, device=self.device)
        return resample(tile.logits[rows, :, columns], down, across, out=self.scratch)
