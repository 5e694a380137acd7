"""Bilinear resizing of any piece of an array, as two small matrix products.

Along each axis an output is a blend of two neighbouring inputs. A short span of outputs needs a short span of inputs,
and the weights between the two make a small matrix.

Shapes: ``k q`` inputs down and across, ``r c`` outputs, ``C`` channels. Channels lie between rows and columns, so that
both products are plain ones.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pspnet_core.inference.windows import Span


class Blend(NamedTuple):
    """Weights that blend inputs into a span of outputs along one axis.

    Attributes:
        inputs: the span of inputs that is needed.
        weights: ``(outputs, inputs)`` float32 for these spans, rows summing to 1; None where outputs are the inputs.
    """

    inputs: Span
    weights: Tensor | None


@lru_cache(maxsize=1024)
def blend(span: Span, outputs: int, inputs: int, *, align_corners: bool, device: torch.device | None = None) -> Blend:
    """Weights of 1-d linear interpolation of ``inputs`` values to ``outputs``, for a span of the outputs.

    Positions are those of ``torch.nn.functional.interpolate``. Cached, since pieces side by side and images of one size
    need the same weights: treat them as constants.
    """
    if outputs == inputs:
        return Blend(span, None)
    position = np.arange(*span, dtype=np.float64)
    if align_corners:
        position *= (inputs - 1) / max(outputs - 1, 1)
    else:
        position = (position + 0.5) * (inputs / outputs) - 0.5
    position = position.clip(0, inputs - 1)
    needed = Span(int(position[0]), min(int(position[-1]) + 2, inputs))
    # An input's weight falls linearly from 1 at its own position to 0 at its neighbours'.
    weights = (1 - np.abs(position[:, None] - np.arange(*needed))).clip(min=0)
    return Blend(needed, torch.from_numpy(weights.astype(np.float32)).to(device))


def resample(x: Tensor, down: Blend, across: Blend, *, out: Tensor | None = None) -> Tensor:
    """Map ``(k, C, q)`` float, the inputs that both blends need, to ``(r, C, c)``.

    Args:
        out: 1-d buffer with room for the result, which is then laid down there. Large arrays made anew for every piece
            cost as much in page faults as in arithmetic. Without it the result may be ``x`` itself.
    """
    if down.weights is not None and len(down.weights) < len(x):
        # Whichever product leaves less to the other one comes first.
        x, down = _blend_rows(x, down.weights), Blend(down.inputs, None)
    if across.weights is not None:
        x = x @ across.weights.t()
    if down.weights is not None:
        return _blend_rows(x, down.weights, out)
    return x if out is None else out[: x.numel()].view(x.shape).copy_(x)


def _blend_rows(x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    flat = x.flatten(1)
    if out is not None:
        out = out[: len(weights) * flat.shape[1]].view(-1, flat.shape[1])
    return torch.mm(weights, flat, out=out).view(-1, *x.shape[1:])
