"""The residual networks against numbers, names and arithmetic that come from elsewhere.

Parameter counts and names are torchvision's; a dilated network is compared with the strided one that it must agree with
at every common cell. That features are those of other projects' networks is shown where their weights are imported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

from pspnet_core.network.backbones import BACKBONES, OutputStride, ResNet, Stem
from tests.support.public_models import randomise

# torchvision's models without their classifier (fc).
PARAMETERS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnet152": 58_143_808,
}
STEMS: tuple[Stem, ...] = ("plain", "deep", "deep32")
STRIDES: tuple[OutputStride, ...] = (8, 16, 32)


@functools.cache
def _on_meta(name: str, stem: Stem = "plain", output_stride: OutputStride = 8) -> ResNet:
    """The backbone without memory for its weights: shapes only."""
    with torch.device("meta"):
        return ResNet(BACKBONES[name], stem=stem, output_stride=output_stride).eval()


def test_every_row_has_a_known_count() -> None:
    assert BACKBONES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("name", "stride"), list(itertools.product(BACKBONES, STRIDES)))
def test_parameters_of_the_plain_stem_are_torchvisions(name: str, stride: OutputStride) -> None:
    assert sum(parameter.numel() for parameter in _on_meta(name, "plain", stride).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("stem", "widths"), [("deep", (64, 64, 128)), ("deep32", (32, 32, 64))])
def test_widths_of_the_deep_stems(stem: Stem, widths: tuple[int, ...]) -> None:
    """The authors' and mmsegmentation's; the next layer takes what they give."""
    convolutions = [tensor for tensor in _on_meta("resnet18", stem).conv1.parameters() if tensor.ndim == 4]
    found = [tuple(weight.shape) for weight in convolutions]
    assert found == [(out, into, 3, 3) for into, out in zip((3, *widths), widths, strict=False)]


@pytest.mark.parametrize(
    ("name", "size"),
    [*itertools.product(BACKBONES, [(33, 79)]), *itertools.product(["resnet18"], [(1, 1), (8, 9), (64, 65)])],
)
def test_feature_shapes(name: str, size: tuple[int, int]) -> None:
    expansion = BACKBONES[name].block.expansion
    widths = (256 * expansion, 512 * expansion)
    assert (BACKBONES[name].channels(3), BACKBONES[name].channels(4)) == widths
    for stem, stride in itertools.product(STEMS, STRIDES):
        third, fourth = _on_meta(name, stem, stride)(torch.empty(2, 3, *size, device="meta"))
        assert third.shape == (2, widths[0], *(-(-side // min(stride, 16)) for side in size))
        assert fourth.shape == (2, widths[1], *(-(-side // stride) for side in size))


def _torchvision_names(name: str) -> Iterator[str]:
    """The state-dict names of torchvision's ResNets, without ``fc``."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convolutions = 2 if name in ("resnet18", "resnet34") else 3
    yield "conv1.weight"
    yield from (f"bn1.{part}" for part in norm)
    for stage, count in enumerate(BACKBONES[name].blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for index in range(1, convolutions + 1):
                yield f"{prefix}.conv{index}.weight"
                yield from (f"{prefix}.bn{index}.{part}" for part in norm)
            if block == 0 and (stage > 1 or convolutions == 3):
                yield f"{prefix}.downsample.0.weight"
                yield from (f"{prefix}.downsample.1.{part}" for part in norm)


@pytest.mark.parametrize("name", BACKBONES)
def test_names_are_torchvisions(name: str) -> None:
    assert sorted(_on_meta(name).state_dict()) == sorted(_torchvision_names(name))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("bands", [1, 2, 13])
def test_any_number_of_bands(stem: Stem, bands: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(BACKBONES["resnet18"], stem=stem, bands=bands)
        assert backbone(torch.empty(1, bands, 32, 32))[1].shape == (1, 512, 4, 4)


@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_keeps_the_strided_features(stride: OutputStride) -> None:
    """A dilated network computes what the strided one does, at more cells (a trous)."""
    strided, step = ResNet(BACKBONES["resnet50"], output_stride=32), 32 // stride
    randomise(strided)
    dilated = ResNet(BACKBONES["resnet50"], output_stride=stride).eval()
    dilated.load_state_dict(strided.state_dict())
    for size in ((33, 47), (64, 40)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            common, expected = dilated(images)[1][..., ::step, ::step], strided(images)[1]
        torch.testing.assert_close(common, expected, rtol=1e-4, atol=1e-4)
