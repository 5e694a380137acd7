"""Low-rank pyramid fusion: the convolution over the feature beside its upsampled grids, without upsampling them.

The plain fusion convolves ``cat[x, up(p1), ..., up(pn)]``, but upsampling is linear and the grids ``p`` hold few cells
(50 for bins 1, 2, 3, 6). With the weight split by input channels, ``conv(cat, W) = conv(x, Wx) + sum low_rank(p, Wp)``:
each grid meets the weights at its own size, and two interpolation matrices, shifted once per tap of the kernel, carry
the result to the feature's size. No concatenation is made, and half of the head's arithmetic is gone.

Shapes: ``B`` batch, ``h w`` feature cells, ``b`` cells along a grid, ``r`` channels of a grid, ``O`` outputs of the
fusion, ``k`` side of its kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pspnet_core.network.interpolation import interpolation_matrix


def mixing_matrix(weight: Tensor) -> Tensor:
    """The weight ``(O, r, k, k)`` of a grid's channels as ``low_rank_fusion`` takes it: ``(r, k * k * O)``."""
    return weight.permute(1, 2, 3, 0).reshape(weight.shape[1], -1)


def low_rank_fusion(
    grids: Sequence[Tensor], mixers: Sequence[Tensor], size: Sequence[int], *, kernel: int, align_corners: bool
) -> Tensor:
    """The part of the fusion convolution that sees the upsampled grids, without upsampling them.

    Args:
        grids: ``(B, r, b, b)`` each.
        mixers: the ``mixing_matrix`` of each grid's weight.
        size: ``h, w`` of the feature.
        kernel: ``k``, odd; the convolution's padding is ``k // 2``.
        align_corners: how the grids are resized, as in ``torch.nn.functional.interpolate``.

    Returns:
        ``(B, O, h, w)`` float (float32 for narrower inputs), channels last.
    """
    height, width = size
    taps, rows = [], []
    for grid, mixer in zip(grids, mixers, strict=True):
        batch, cells = grid.shape[0], grid.shape[-1]
        mixed = grid.flatten(2).transpose(1, 2) @ mixer
        # (B, y, x, ky, kx, O) -> (B, ky y, kx x, O): one row or column per tap and cell, as in _tap_matrix.
        mixed = mixed.view(batch, cells, cells, kernel, kernel, -1).permute(0, 3, 1, 4, 2, 5)
        mixed = mixed.reshape(batch, kernel * cells, kernel * cells, -1)
        # Interpolation weights have no room in 8 bits of mantissa; this part is small.
        mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        across = _tap_matrix(width, cells, kernel, align_corners=align_corners, like=mixed)
        taps.append(across @ mixed)
        rows.append(_tap_matrix(height, cells, kernel, align_corners=align_corners, like=mixed))
    tall = torch.cat(taps, dim=1)
    out = torch.cat(rows, dim=1) @ tall.flatten(2)
    return out.view(tall.shape[0], height, width, -1).permute(0, 3, 1, 2)


def _tap_matrix(length: int, cells: int, kernel: int, *, align_corners: bool, like: Tensor) -> Tensor:
    """``(length, kernel * cells)``: interpolation along one axis as each tap of a zero-padded convolution sees it."""
    along = interpolation_matrix(length, cells, align_corners=align_corners, dtype=like.dtype, device=like.device)
    padded = nn.functional.pad(along, (0, 0, kernel // 2, kernel // 2))
    return torch.cat([padded[tap : tap + length] for tap in range(kernel)], dim=1)


class PyramidFusion(nn.Sequential):
    """Convolution, BatchNorm and ReLU over the feature beside its upsampled grids, by ``low_rank_fusion``.

    The weight is the one of the plain formulation, ``(O, channels + all grids' channels, k, k)``.

    Args:
        channels: of the feature.
        grids: channels of each grid.
        outputs: channels put out.
        kernel: side of the kernel, odd.
        align_corners: how the grids are resized.
        feature_first: whether the weight's input channels begin or end with the feature's.
    """

    def __init__(
        self,
        channels: int,
        grids: Sequence[int],
        outputs: int,
        *,
        kernel: int,
        align_corners: bool,
        feature_first: bool,
    ) -> None:
        conv = nn.Conv2d(channels + sum(grids), outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        self.channels, self.grids, self.kernel = channels, list(grids), kernel
        self.align_corners, self.feature_first = align_corners, feature_first

    def split(self, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The parts of a weight that belong to the feature, ``(O, channels, k, k)``, and to the grids."""
        if self.feature_first:
            feature, *grids = weight.split([self.channels, *self.grids], dim=1)
        else:
            *grids, feature = weight.split([*self.grids, self.channels], dim=1)
        return feature, grids

    def forward(self, x: Tensor, grids: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Map ``(B, channels, h, w)`` and the grids ``(B, r, b, b)`` to ``(B, O, h, w)``."""
        conv, norm, relu = self
        feature, parts = self.split(conv.get_parameter("weight"))
        y = nn.functional.conv2d(x, feature, padding=self.kernel // 2)
        mixers = [mixing_matrix(part) for part in parts]
        y += low_rank_fusion(grids, mixers, x.shape[-2:], kernel=self.kernel, align_corners=self.align_corners)
        out: Tensor = relu(norm(y))
        return out
