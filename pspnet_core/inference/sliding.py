"""Sliding windows: forward passes over windows of a batch, run when postprocessing needs them.

A large image has more windows than memory holds answers, so passes and postprocessing take turns: a view asks for the
tiles of a block, which runs passes until there are all, and forgets those above it. Windows of the images of a batch
share passes.

Shapes: ``B`` images, ``N`` bands, ``C`` classes, ``h w`` pixels of a network input, ``p q`` coarse cells.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pspnet_core.inference.postprocess import Tile
from pspnet_core.inference.windows import Box, windows


def sliding_views(
    pixels: Tensor, network: Callable[[Tensor], Sequence[Tensor]], *, side: int, limit: int, classes: int
) -> list["SlidingView"]:
    """One view of each input of a batch, seen through windows.

    Args:
        pixels: ``(B, N, h, w)`` uint8.
        network: gives logits ``(B, C, p, q)`` float32 of pixels, once or, mirrored, twice.
        side: of a window in pixels.
        limit: most windows in one pass; each pass has one of every input at least.
    """
    passes = _WindowPasses(pixels, network, side=side, limit=limit)
    return [SlidingView(passes, index, classes) for index in range(len(pixels))]


class SlidingView:
    """A view seen through windows; its tiles come from passes that the views of a batch share."""

    def __init__(self, passes: "_WindowPasses", index: int, classes: int) -> None:
        self.height, self.width = passes.pixels.shape[-2:]
        self.classes, self.device = classes, passes.pixels.device
        self._passes, self._index = passes, index
        self._near: list[Tile] = []

    def tiles_at(self, box: Box) -> list[Tile]:
        """The tiles that touch some pixels; runs passes until there are all, and forgets the tiles that end above."""
        self._near = [tile for tile in self._near if tile.window.rows.stop > box.rows.start]
        while self._passes.next_row(self._index) < box.rows.stop:
            self._near.append(Tile.of(*self._passes.next_answer(self._index)))
        return [tile for tile in self._near if all((tile.window & box).shape)]


class _WindowPasses:
    """Passes over the windows of a batch, from top to bottom, and their answers until each view has taken its own."""

    def __init__(self, pixels: Tensor, network: Callable[[Tensor], Sequence[Tensor]], *, side: int, limit: int) -> None:
        self.pixels, self.network = pixels, network
        self.per_pass = max(1, limit // len(pixels))
        height, width = pixels.shape[-2:]
        self.ahead = deque(windows(height, width, side))
        self.answers: list[deque[tuple[Tensor, Box]]] = [deque() for _ in pixels]  # of each image, not yet taken

    def next_row(self, index: int) -> float:
        """The first row of the image's next window; infinite after the last."""
        own = self.answers[index]
        following = own[0][1] if own else self.ahead[0] if self.ahead else None
        return following.rows.start if following else float("inf")

    def next_answer(self, index: int) -> tuple[Tensor, Box]:
        """The next logits ``(C, p, q)`` of the image, and their window."""
        if not self.answers[index]:
            self._run()
        return self.answers[index].popleft()

    def _run(self) -> None:
        """Run the next pass and deal its answers to the images."""
        some = [self.ahead.popleft() for _ in range(min(self.per_pass, len(self.ahead)))]
        logits = self.network(torch.cat([self.pixels[(..., *window.slices)] for window in some]))
        count = len(self.answers)
        for place, window in enumerate(some):
            for answer in logits:
                for own, part in zip(self.answers, answer[place * count : (place + 1) * count], strict=True):
                    own.append((part, window))
