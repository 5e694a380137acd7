"""Bilinear resizing and adaptive averaging as matrices: both are linear maps along each axis.

Written with tensor operations of symbolic sizes, so that they trace into exported graphs of any size.
"""

import torch
from torch import Tensor


def interpolation_matrix(
    outputs: int,
    inputs: int,
    *,
    align_corners: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """The linear map of 1-d linear interpolation, as ``torch.nn.functional.interpolate`` defines it.

    Returns:
        ``(outputs, inputs)`` whose rows sum to 1, at most two entries of a row being non-zero.
    """
    position = torch.arange(outputs, dtype=dtype, device=device)
    if align_corners:
        # The last position as a tensor: as a number it would be taken for more than 0 in a graph of any size.
        position = position * ((inputs - 1) / position[-1:].clamp_min(1))
    else:
        position = (position + 0.5) * (inputs / outputs) - 0.5
    position = position.clamp(0, inputs - 1)
    # A cell's weight falls linearly from 1 at its centre to 0 at its neighbours' centres.
    cells = torch.arange(inputs, dtype=dtype, device=device)
    return (1 - (position.unsqueeze(1) - cells).abs()).clamp_min(0)


def pooling_matrix(
    outputs: int, inputs: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Which inputs belong to which cell of ``torch.nn.functional.adaptive_avg_pool2d`` along one axis.

    Returns:
        ``(outputs, inputs)`` of zeros and ones; cells share an input where the sizes do not divide. Divided by its row
        sums it averages.
    """
    start = torch.arange(outputs, device=device) * inputs // outputs
    stop = -(-torch.arange(1, outputs + 1, device=device) * inputs // outputs)
    index = torch.arange(inputs, device=device)
    return ((index >= start.unsqueeze(1)) & (index < stop.unsqueeze(1))).to(dtype)
