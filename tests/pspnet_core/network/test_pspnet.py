"""The network: sizes, normalisation inside, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import IMAGENET_MEAN, IMAGENET_STD, PSPNet, PSPNetConfig
from pspnet_core.training.losses import LossConfig, pspnet_loss
from tests.support.networks import random_images

SMALL = PSPNetConfig(classes=3, backbone="resnet18", output_stride=32)


@functools.cache
def _network(config: PSPNetConfig = SMALL) -> PSPNet:
    """A network in evaluation mode; not to be changed, since tests share it."""
    torch.manual_seed(0)
    return PSPNet(config).eval()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 47), (64, 64), (90, 7)])
def test_logits_have_the_size_of_the_images(size: tuple[int, int]) -> None:
    network = _network()
    with torch.no_grad():
        logits, coarse = network(random_images(2, *size)), network.coarse(random_images(2, *size))
    assert logits.main.shape == (2, 3, *size)
    assert coarse.shape == (2, 3, -(-size[0] // 32), -(-size[1] // 32))
    assert logits.aux is not None  # in evaluation, too
    assert logits.aux.shape == logits.main.shape
    assert logits.main.dtype == torch.float32
    assert logits.main.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_no_auxiliary_head_no_auxiliary_logits(training: bool) -> None:
    with torch.device("meta"):
        network = PSPNet(dataclasses.replace(SMALL, auxiliary=False)).train(training)
        assert network(torch.empty(2, 3, 40, 40, dtype=torch.uint8)).aux is None
    assert not [name for name in network.state_dict() if name.startswith("auxiliary")]


@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_are_the_coarse_ones_resized(align_corners: bool) -> None:
    network = _network(dataclasses.replace(SMALL, align_corners=align_corners))
    images = random_images(2, 65, 97)
    with torch.no_grad():
        main, coarse = network(images).main, network.coarse(images)
    expected = F.interpolate(coarse, size=(65, 97), mode="bilinear", align_corners=align_corners)
    other = F.interpolate(coarse, size=(65, 97), mode="bilinear", align_corners=not align_corners)
    torch.testing.assert_close(main, expected)
    assert not torch.allclose(main, other, atol=1e-4)


def test_normalisation_is_inside() -> None:
    """The same weights without normalisation, given images that are normalised in RGB order, say the same."""
    plain = PSPNet(dataclasses.replace(SMALL, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))).eval()
    plain.load_state_dict(_network().state_dict() | {"mean": plain.mean, "std": plain.std})
    images = random_images(2, 33, 47)
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = torch.from_numpy((images.numpy() - mean) / std).float()
    with torch.no_grad():
        torch.testing.assert_close(_network()(images).main, plain(normalised).main, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(_network()(images).main, plain(images).main, atol=1e-2)


@pytest.mark.parametrize(
    ("backbone", "pyramid", "fusion", "auxiliary"),
    [
        ("resnet18", (128, 512, 1, 1), (128, 1024, 3, 3), (64, 256, 3, 3)),
        ("resnet50", (512, 2048, 1, 1), (512, 4096, 3, 3), (256, 1024, 3, 3)),
    ],
)
def test_widths_are_the_papers(
    backbone: str, pyramid: tuple[int, ...], fusion: tuple[int, ...], auxiliary: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        state = PSPNet(PSPNetConfig(classes=19, backbone=backbone)).state_dict()
    assert {tuple(state[f"pyramid.stages.{index}.0.weight"].shape) for index in range(4)} == {pyramid}
    assert tuple(state["fusion.0.weight"].shape) == fusion
    assert tuple(state["auxiliary.0.weight"].shape) == auxiliary
    assert tuple(state["decoder.1.weight"].shape) == (19, fusion[0], 1, 1)
    assert tuple(state["auxiliary.4.weight"].shape) == (19, auxiliary[0], 1, 1)


def test_the_auxiliary_head_sees_the_third_stage_and_the_main_head_the_fourth() -> None:
    torch.manual_seed(0)
    network = PSPNet(SMALL).train()
    fourth = list(network.backbone.get_submodule("layer4").parameters())
    third = list(network.backbone.get_submodule("layer3").parameters())
    main, aux = network(random_images(2, 64, 64))
    assert aux is not None
    from_aux = torch.autograd.grad(aux.sum(), [*third, *fourth], retain_graph=True, allow_unused=True)
    assert all(gradient is not None for gradient in from_aux[: len(third)])
    assert all(gradient is None for gradient in from_aux[len(third) :])
    from_main = torch.autograd.grad(main.square().sum(), [*third, *fourth], allow_unused=True)
    assert all(gradient is not None for gradient in from_main)


def test_dropout_works_in_training_only() -> None:
    network = _network(dataclasses.replace(SMALL, dropout=0.5))
    feature = torch.rand(1, 128, 2, 2) + 1
    with torch.no_grad():
        assert torch.equal(network.decoder(feature), network.decoder(feature))
        network.decoder.train()
        assert not torch.equal(network.decoder(feature), network.decoder(feature))
        network.decoder.eval()


def test_layout_does_not_change_the_logits() -> None:
    network = copy.deepcopy(_network()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = random_images(2, 33, 47)
    with torch.no_grad():
        expected = _network()(images).main
        found = network(images.contiguous(memory_format=torch.channels_last)).main
    assert network.fusion.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_under_autocast() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert _network().coarse(random_images(2, 33, 33)).dtype == torch.bfloat16
        assert _network()(random_images(2, 33, 33)).main.dtype == torch.float32


def test_a_step_of_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    network = PSPNet(dataclasses.replace(SMALL, dropout=0.0)).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    images, masks = random_images(2, 64, 64), torch.arange(64).view(1, 1, 64).expand(2, 64, 64) // 22
    losses = []
    for _ in range(3):
        loss = pspnet_loss(network(images), masks, config=LossConfig(), ignore=255)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


REFUSED: dict[str, list[Any]] = {
    "classes": [1, 65536],
    "backbone": ["resnet20"],
    "bins": [(), (1, 0), (1.5,), (1, 1025), (1,) * 65],
    "dropout": [1.0, -0.1, math.nan],
    "mean": [(), (1.0, math.inf, 3.0)],
    "std": [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0), (1.0, 0.0, 1.0), (1.0, math.nan, 1.0)],
    "stem": ["wide"],
    "output_stride": [4],
    "stages": [1, 5],
    "dilation": ["some"],
    "dilations": [(2, 0), (2,)],
    "fusion_order": ["first"],
    "fusion_kernel": [2],
    "classifier_kernel": [0],
    "biased_bins": [(4,)],
    "bin_width": [-1],
    "fusion_width": [-5],
    "auxiliary_width": [-5],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_a_config_that_cannot_work_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: \S") as caught, torch.device("meta"):
        PSPNet(PSPNetConfig(**{"classes": 3, field: value}))
    assert caught.value.field == field


def test_the_limits_of_the_config_are_allowed() -> None:
    assert PSPNetConfig(classes=2, dropout=0.0).classes == 2
    assert PSPNetConfig(classes=65535).classes == 65535
