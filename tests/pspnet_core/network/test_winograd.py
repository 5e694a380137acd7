"""Winograd's convolution against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_core.network import winograd
from pspnet_core.network.winograd import WinogradConv2d, transforms


def _conv(inputs: int = 3, outputs: int = 5, dilation: int = 1, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=bias).requires_grad_(False)


def _exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, padding=conv.padding, dilation=conv.dilation)


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small images take every branch of the walk."""
    monkeypatch.setattr(winograd, "BAND_TILES", 20)
    monkeypatch.setattr(winograd, "BAND_CHANNELS", 4)


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_every_size_of_image(dilation: int, bias: bool, channels_last: bool) -> None:
    conv = _conv(10, 7, dilation, bias=bias)
    fast = WinogradConv2d(conv)
    for index, (batch, height, width) in enumerate([(1, 1, 1), (3, 4, 9), (2, 33, 17), (5, 16, 8), (1, 40, 61)]):
        x = torch.randn(batch, 10, height, width, generator=torch.Generator().manual_seed(index))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        found = fast.convolve(x)
        assert found.shape == (batch, 7, height, width)
        torch.testing.assert_close(found.double(), _exact(conv, x), rtol=1e-4, atol=1e-5)


def test_rounding_stays_near_that_of_the_plain_convolution() -> None:
    """The reason for the points: the usual ones are some five times worse.

    The plain one's depends on the processor: ours is 1.5 times as much with AVX2, 5.5 times with AVX-512.
    Ours does not, so it has a bound of its own, which is below 3 times the plain one's with AVX2.
    """
    conv = _conv(256, 32)
    x = torch.randn(1, 256, 60, 60, generator=torch.Generator().manual_seed(0)).relu()
    exact = _exact(conv, x)
    plain = (conv(x) - exact).square().mean().sqrt()
    fast = (WinogradConv2d(conv)(x) - exact).square().mean().sqrt()
    assert fast < 8 * plain
    assert fast < 4e-7 * exact.abs().max()


def test_the_transforms_convolve() -> None:
    """``A^T [(G g) * (B^T d)]`` is the correlation of 6 values with 3, in 6 products."""
    data_map, weight_map, output_map = transforms()
    data, weight = torch.randn(6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = torch.stack([(data[i : i + 3] * weight).sum() for i in range(4)])
    torch.testing.assert_close(output_map @ ((weight_map @ weight) * (data_map @ data)), expected)


@pytest.mark.usefixtures("small_bands")
def test_an_image_does_not_change_its_neighbours() -> None:
    fast = WinogradConv2d(_conv(6, 4, 2))
    x = torch.randn(3, 6, 19, 22)
    together = fast.convolve(x)
    poisoned = fast.convolve(torch.cat([x[:1], torch.full_like(x[:1], torch.nan), x[2:]]))
    torch.testing.assert_close(poisoned[[0, 2]], together[[0, 2]])
    assert poisoned[1].isnan().any()


def test_few_tiles_take_the_plain_convolution() -> None:
    conv = _conv(6, 4)
    x = torch.randn(1, 6, 12, 12)
    assert torch.equal(WinogradConv2d(conv)(x), conv(x))


@pytest.mark.parametrize(
    ("conv", "suits"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), True),
        (nn.Conv2d(512, 128, 3, padding=4, dilation=4, bias=False), True),
        (nn.Conv2d(128, 128, 3, padding=1), False),
        (nn.Conv2d(256, 256, 3, padding=1, stride=2), False),
        (nn.Conv2d(256, 256, 3, padding=2, dilation=1), False),
        (nn.Conv2d(256, 256, 3, padding=(1, 2), dilation=(1, 2)), False),
        (nn.Conv2d(256, 256, 1, padding=1), False),
        (nn.Conv2d(512, 512, 3, padding=1, groups=2), False),
        (nn.Conv2d(256, 256, 3, padding=1, dtype=torch.bfloat16), False),
    ],
    ids=str,
)
def test_which_convolutions_it_suits(conv: nn.Conv2d, suits: bool) -> None:
    assert WinogradConv2d.suits(conv) == suits
