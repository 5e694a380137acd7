"""The low-rank fusion and the deployed network against the plain formulation: values, gradients, memory."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.network import PlainPSPNet
from pspnet_core.network.deploy import deploy
from pspnet_core.network.fusion import PyramidFusion
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig, average_grids
from pspnet_core.network.winograd import WinogradConv2d
from tests.support.networks import Results, random_images, trained

SMALL = PSPNetConfig(classes=3, backbone="resnet18", output_stride=32)
VARIANTS = {
    "paper": PSPNetConfig(classes=3, backbone="resnet18", stem="deep", dilation="full", align_corners=True),
    "mmsegmentation": PSPNetConfig(classes=3, backbone="resnet18", stem="deep32", avg_down=True),
    "smp": PSPNetConfig(
        classes=3,
        backbone="resnet18",
        stages=2,
        fusion_order="feature_last",
        fusion_kernel=1,
        classifier_kernel=3,
        biased_bins=(1,),
        align_corners=True,
        auxiliary=False,
    ),
    "wide kernel": dataclasses.replace(SMALL, fusion_kernel=5, bins=(2, 5), bin_width=7, fusion_width=24),
    "four bands": dataclasses.replace(SMALL, mean=(0.0,) * 4, std=(255.0,) * 4, bins=(3,)),
    "bottleneck": PSPNetConfig(classes=3, backbone="resnet50", output_stride=32),
}


def _images(config: PSPNetConfig, size: tuple[int, int] = (97, 131)) -> Tensor:
    return random_images(2, *size, config.bands)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


# --- the low-rank fusion -----------------------------------------------------------------------------------------

FUSIONS = list(itertools.product([True, False], [True, False], [1, 3, 5]))
SIZES = [(1, 1), (2, 7), (6, 6), (13, 5)]


def _fusion(align_corners: bool, feature_first: bool, kernel: int) -> PyramidFusion:
    torch.manual_seed(0)
    fusion = PyramidFusion(
        4, [2, 3, 1], 5, kernel=kernel, align_corners=align_corners, feature_first=feature_first
    ).double()
    nn.init.uniform_(fusion[1].get_buffer("running_mean"), -0.2, 0.2)
    return fusion.eval()


def _inputs(size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    grids = [torch.randn(2, width, cells, cells, dtype=torch.float64) for width, cells in ((2, 1), (3, 2), (1, 6))]
    return torch.randn(2, 4, *size, dtype=torch.float64), grids


def _plain_fusion(fusion: PyramidFusion, x: Tensor, grids: list[Tensor]) -> Tensor:
    up = [F.interpolate(g, x.shape[-2:], mode="bilinear", align_corners=fusion.align_corners) for g in grids]
    joined = torch.cat([x, *up] if fusion.feature_first else [*up, x], dim=1)
    conv, norm, relu = fusion
    found: Tensor = relu(norm(conv(joined)))
    return found


@pytest.mark.parametrize(("align_corners", "feature_first", "kernel"), FUSIONS)
def test_the_fusion_and_its_gradients_are_the_plain_ones(align_corners: bool, feature_first: bool, kernel: int) -> None:
    fusion = _fusion(align_corners, feature_first, kernel)
    for size in SIZES:
        x, grids = _inputs(size)
        leaves = [x.requires_grad_(), *(grid.requires_grad_() for grid in grids), *fusion.parameters()]
        found, expected = fusion(x, grids), _plain_fusion(fusion, x, grids)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        weights = torch.randn_like(found)
        slopes = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [*SIZES, (60, 45)])
def test_the_grids_are_adaptive_averages(size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    for bins in ((1, 2, 3, 6), (4,)):
        for cells, grid in zip(bins, average_grids(x, bins), strict=True):
            torch.testing.assert_close(grid, F.adaptive_avg_pool2d(x, cells), rtol=1e-12, atol=1e-12)


def test_no_feature_of_twice_the_channels_is_made() -> None:
    model = PSPNet(SMALL).train()
    images = _images(SMALL, (128, 128))
    with Results() as ours:
        model(images).main.sum().backward()
    with Results() as plain:
        PlainPSPNet(model)(images).main.sum().backward()
    wide = (2, 1024, 4, 4)
    assert wide in plain.shapes
    assert wide not in ours.shapes


# --- the whole network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_network_is_the_plain_one(kind: str) -> None:
    model = trained(VARIANTS[kind])
    for size in ((97, 131), (8, 8), (1, 40)):
        images = _images(model.config, size)
        with torch.no_grad():
            assert _relative(model(images).main, PlainPSPNet(model)(images).main) < 2e-5
    exact = copy.deepcopy(model).double()
    images = _images(model.config)
    with torch.no_grad():
        assert _relative(exact(images).main, PlainPSPNet(exact)(images).main) < 1e-12


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_deployed_network_has_the_same_logits(kind: str, winograd: bool) -> None:
    model = trained(VARIANTS[kind])
    deployed = deploy(model, winograd=winograd)
    for size in ((97, 131), (8, 8), (1, 40)):
        images = _images(model.config, size)
        with torch.no_grad():
            found, expected = deployed(images), PlainPSPNet(model)(images)
        assert found.aux is None
        assert _relative(found.main, expected.main) < 5e-5
    # Two stages have no convolution that is large enough.
    assert (_kinds(deployed, WinogradConv2d) > 0) == (winograd and kind != "smp")


def _kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("kind", VARIANTS)
def test_deploying_folds_everything_and_leaves_the_model_alone(kind: str) -> None:
    model = trained(VARIANTS[kind]).train()
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert _kinds(deployed, nn.BatchNorm2d) == 0
    assert not deployed.training
    assert deployed.auxiliary is None
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_large_convolutions_go_by_winograd_in_float32_on_a_cpu() -> None:
    """ResNet-18 has three in stage 3 and four in stage 4 of 256 x 256 weights per tap or more; and the fusion's."""
    model = trained(dataclasses.replace(SMALL, output_stride=8))
    assert _kinds(deploy(model), WinogradConv2d) == 8
    assert _kinds(deploy(model, torch.bfloat16), WinogradConv2d) == 0
    assert _kinds(deploy(model, device=torch.device("meta")), WinogradConv2d) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_close_and_normalise_in_float32(dtype: torch.dtype) -> None:
    model = trained(SMALL)
    deployed = deploy(model, dtype)
    images = _images(SMALL)
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}
    assert deployed.mean.dtype == deployed.std.dtype == torch.float32
    torch.testing.assert_close(deployed.preprocess(images), model.preprocess(images).to(dtype))
    with torch.no_grad():
        logits = deployed(images).main
        expected = PlainPSPNet(model)(images).main
    assert logits.dtype == torch.float32
    assert _relative(logits, expected) < 0.05


def test_weights_are_channels_last() -> None:
    deployed = deploy(trained(SMALL))
    convolutions = [module for module in deployed.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)


def test_a_norm_without_a_convolution_is_refused() -> None:
    model = trained(SMALL)
    model.backbone.add_module("layer1", nn.BatchNorm2d(64))
    with pytest.raises(ValueError, match="layer1 follows no convolution"):
        deploy(model)
