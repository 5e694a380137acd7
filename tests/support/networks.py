"""What tests of networks share: images, networks as after training, what operations put out, decisions to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.public_models import randomise


def random_images(batch: int, height: int, width: int, bands: int = 3) -> Tensor:
    """``(B, N, H, W)`` uint8, the same for the same size."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (batch, bands, height, width), dtype=torch.uint8, generator=generator)


def trained(config: PSPNetConfig) -> PSPNet:
    """A network in evaluation mode whose BatchNorms do something, as after training, with its own normalisation."""
    network = PSPNet(config)
    own = {name: network.state_dict()[name].clone() for name in ("mean", "std")}
    randomise(network).load_state_dict(own, strict=False)
    return network


class Results(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations put out, and the elements of the largest memory behind one.

    A view has no memory of its own, and may be of an expanded tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


def assert_decision(mask: Tensor, confidence: Tensor, probabilities: Tensor, *, within: float) -> None:
    """The mask is the argmax of ``(C, H, W)`` (rounding aside, where two classes tie), the confidence its value."""
    classes, height, width = probabilities.shape
    assert mask.shape == confidence.shape == (height, width)
    assert mask.dtype == (torch.uint8 if classes <= 256 else torch.uint16)
    assert confidence.dtype == torch.float32
    best = probabilities.amax(0)
    torch.testing.assert_close(confidence.double(), best, rtol=0, atol=within)
    chosen = probabilities.gather(0, mask.long()[None])[0]
    torch.testing.assert_close(chosen, best, rtol=0, atol=within)
