"""What a forward pass takes, against tensors counted by hand and larger passes of real networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pspnet_core.inference.footprint import SIDE, bytes_per_pixel
from pspnet_core.network.deploy import deploy
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

CPU = torch.device("cpu")
BIAS = torch.zeros(SIDE, SIDE)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda x: x.float(), 4),
        (lambda x: x.float() + x.double(), 4 + 8 + 8),
        (lambda x: x.float() * 2 * 3, 4 + 4),
        (lambda x: x.float().flatten(1).view(x.shape).mul_(2).permute(0, 2, 3, 1), 4),
        (lambda x: x.float().add_(BIAS.view(1, 1, SIDE, SIDE)), 4),
    ],
    ids=["one result", "two at once", "one after the other", "views and places", "with a weight"],
)
def test_what_is_there_at_one_time_is_added_up(network: Callable[[Tensor], Tensor], expected: int) -> None:
    for bands in (1, 3):
        assert bytes_per_pixel(network, bands=bands, device=CPU) == expected * bands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backbone", "stages"), [("resnet18", 4), ("resnet50", 2)])
def test_larger_sizes_and_batches_take_as_much_for_a_pixel(backbone: str, stages: int, dtype: torch.dtype) -> None:
    model = PSPNet(PSPNetConfig(backbone=backbone, stages=stages, classes=11)).eval()
    network = deploy(model, dtype, winograd=False).coarse
    told = bytes_per_pixel(network, bands=3, device=CPU)
    batch, height, width = 3, 257, 385

    def larger(pixels: Tensor) -> Tensor:
        return network(pixels.new_zeros(batch, 3, height, width))

    taken = bytes_per_pixel(larger, bands=3, device=CPU) * SIDE**2
    assert taken == pytest.approx(told * batch * height * width, rel=0.1)


def test_what_the_pass_put_aside_counts_and_the_weights_do_not() -> None:
    kept: list[Tensor] = []
    weight = nn.Parameter(torch.ones(1000, 1000), requires_grad=False)

    def network(x: Tensor) -> Tensor:
        kept.append(x.float())
        return x.float() * weight[0, 0]

    assert bytes_per_pixel(network, bands=1, device=CPU) == 4 + 4 + 4
    assert kept[0].nbytes == 4 * SIDE**2
