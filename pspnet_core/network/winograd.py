"""Winograd's minimal filtering for 3x3 convolutions in inference on CPUs: 2.25 products per output instead of 9.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), F(4x4, 3x3): the input is cut into
6x6 tiles that overlap by two, and ``Y = A^T [(G g G^T) * (B^T d B)] A`` gives 4x4 outputs of each; the product is one
matrix multiplication over the channels for each of a tile's 36 values. A convolution of dilation d is d * d
convolutions of dilation 1, one for each phase of the pixels.

Shapes: ``B`` batch, ``C`` channels in, ``O`` channels out, ``H W`` pixels, ``T`` tiles, ``d`` dilation.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

OUTPUTS, KERNEL = 4, 3
TILE = OUTPUTS + KERNEL - 1
# The usual points 0, +-1, +-2 lose a digit; these round as little as the plain convolution does. Compare Barabasz et
# al., "Error analysis and improving the accuracy of Winograd convolution for deep neural networks" (2020).
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)

# Size of a band that is transformed at once: the workspace stays below 120 MB whatever the image's size.
BAND_TILES, BAND_CHANNELS = 512, 512
# With fewer weights the transforms cost more than they save; with fewer tiles, reading the larger weights does.
LEAST_WEIGHTS, LEAST_TILES = 256 * 256, 48


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 that keeps the size, for inference in float32 on a CPU.

    Small images take the plain convolution, by ``LEAST_TILES``.
    """

    transformed: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        input_map, weight_map, output_map = transforms()
        filters = torch.einsum("ay,bx,ocyx->abco", weight_map, weight_map, conv.weight.detach().double())
        self.register_buffer("transformed", filters.flatten(0, 1).float().contiguous())
        self.register_buffer("before", torch.kron(input_map, input_map).float())
        self.register_buffer("after", torch.kron(output_map, output_map).float())

    @staticmethod
    def suits(conv: nn.Conv2d) -> bool:
        """Whether a convolution can run this way, and gains by it."""
        return (
            conv.kernel_size == (KERNEL, KERNEL)
            and conv.stride == (1, 1)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and conv.padding == conv.dilation
            and conv.dilation[0] == conv.dilation[1]
            and conv.in_channels * conv.out_channels >= LEAST_WEIGHTS
            and conv.weight.dtype == torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, O, H, W)``, channels last."""
        rows, columns = self._tile_counts(x)
        tiles = len(x) * self.conv.dilation[0] ** 2 * rows * columns
        out: Tensor = self.conv(x) if tiles < LEAST_TILES else self.convolve(x)
        return out

    def convolve(self, x: Tensor) -> Tensor:
        """``forward`` for images of any size by Winograd's algorithm."""
        dilation = self.conv.dilation[0]
        batch, _, height, width = x.shape
        down, across = self._tile_counts(x)
        out = x.new_empty(batch, down, OUTPUTS, dilation, across, OUTPUTS, dilation, self.conv.out_channels)
        self._fill(out, x)
        rows = out.view(batch, down * OUTPUTS * dilation, across * OUTPUTS * dilation, -1)
        return rows[:, :height, :width].permute(0, 3, 1, 2)

    def _tile_counts(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of tiles in each phase."""
        step = OUTPUTS * self.conv.dilation[0]
        return -(-x.shape[-2] // step), -(-x.shape[-1] // step)

    def _fill(self, out: Tensor, x: Tensor) -> None:
        """Convolve band by band into ``(B, rows of tiles, 4, d, columns of tiles, 4, d, O)``."""
        tiles, out = _tiles(x, self.conv.dilation[0]), out.permute(2, 5, 0, 3, 6, 1, 4, 7)
        _, _, batch, dilation, _, down, across, channels = tiles.shape
        per_row = dilation**2 * across
        rows = max(1, min(down, BAND_TILES // per_row))
        images = max(1, min(batch, BAND_TILES // (per_row * rows)))
        work = _Workspace.sized(x, images * rows * per_row, min(channels, BAND_CHANNELS), self.conv.out_channels)
        for image in range(0, batch, images):
            for row in range(0, down, rows):
                band = np.s_[:, :, image : image + images, :, :, row : row + rows]
                self._convolve(tiles[band], out[band], work)

    def _convolve(self, tiles: Tensor, out: Tensor, work: "_Workspace") -> None:
        """One band: ``(6, 6, ..., C)`` to ``(4, 4, ..., O)``."""
        *shape, channels = tiles.shape
        count, outputs = math.prod(shape[2:]), out.shape[-1]
        products = work.products[: TILE**2 * count * outputs].view(TILE**2, count, outputs)
        for start in range(0, channels, BAND_CHANNELS):
            part = tiles[..., start : start + BAND_CHANNELS]
            gathered, data = (space[: part.numel()] for space in (work.gathered, work.data))
            gathered.view(part.shape).copy_(part)
            torch.mm(self.before, gathered.view(TILE**2, -1), out=data.view(TILE**2, -1))
            weights = self.transformed[:, start : start + BAND_CHANNELS]
            products.baddbmm_(data.view(TILE**2, count, -1), weights, beta=float(start > 0))
        sums = (self.after @ products.view(TILE**2, -1)).view(out.shape)
        if self.conv.bias is not None:
            sums += self.conv.bias
        out.copy_(sums)


class _Workspace(NamedTuple):
    """Memory that the bands share: fresh memory for each would cost as much time as a transform."""

    gathered: Tensor
    data: Tensor
    products: Tensor

    @classmethod
    def sized(cls, like: Tensor, tiles: int, channels: int, outputs: int) -> "_Workspace":
        values = TILE**2 * tiles
        return cls(
            like.new_empty(values * channels), like.new_empty(values * channels), like.new_empty(values * outputs)
        )


def _tiles(x: Tensor, dilation: int) -> Tensor:
    """Overlapping tiles of ``(B, C, H, W)``, zero-padded: a view ``(6, 6, B, d, d, rows, columns, C)``."""
    height, width = x.shape[-2:]
    step = OUTPUTS * dilation
    below, right = (-side % step + dilation for side in (height, width))
    padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, dilation, right, dilation, below))
    image, row, column, channel = padded.stride()
    sizes = (TILE, TILE, len(x), dilation, dilation, -(-height // step), -(-width // step), x.shape[1])
    strides = (row * dilation, column * dilation, image, row, column, row * step, column * step, channel)
    return padded.as_strided(sizes, strides)


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """``B^T`` (6, 6), ``G`` (6, 3) and ``A^T`` (4, 6) of F(4, 3) in float64, by Toom and Cook's construction.

    Polynomials are multiplied by their values at ``POINTS`` and at infinity; transposed, that is a correlation.
    """
    points = np.array(POINTS)
    data, weight, output = np.zeros((TILE, TILE)), np.zeros((TILE, KERNEL)), np.zeros((OUTPUTS, TILE))
    for index, point in enumerate(points):
        others = np.delete(points, index)
        data[index, :-1] = np.poly(others)[::-1]
        weight[index] = point ** np.arange(KERNEL) / np.prod(point - others)
        output[:, index] = point ** np.arange(OUTPUTS)
    data[-1], weight[-1, -1], output[-1, -1] = np.poly(points)[::-1], 1, 1
    return torch.from_numpy(data), torch.from_numpy(weight), torch.from_numpy(output)
