"""The residual networks against numbers, names and arithmetic that come from elsewhere.

Parameter counts and names are torchvision's; the features are compared with a functional network written from the
paper's table, and a dilated network with the strided one that it must agree with at every common cell.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_core.network.backbones import BACKBONES, BasicBlock, Dilation, OutputStride, ResNet, Stem
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

# Output stride -> (stride of the first block, its dilation, the dilation of the rest) of the third and fourth stage.
STAGES: dict[int, list[tuple[int, int, int]]] = {
    8: [(1, 1, 2), (1, 2, 4)],
    16: [(2, 1, 1), (1, 1, 2)],
    32: [(2, 1, 1), (2, 1, 1)],
}


@functools.cache
def _on_meta(name: str, stem: Stem = "plain", output_stride: OutputStride = 8) -> ResNet:
    """The backbone without memory for its weights: shapes only."""
    with torch.device("meta"):
        return ResNet(BACKBONES[name], stem=stem, output_stride=output_stride).eval()


@functools.cache
def _random(name: str, stem: Stem = "plain", output_stride: OutputStride = 32) -> ResNet:
    """A backbone whose BatchNorms do something, as after training."""
    backbone = ResNet(BACKBONES[name], stem=stem, output_stride=output_stride)
    randomise(backbone)
    return backbone


def _parameters(backbone: nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def test_every_row_has_a_known_count() -> None:
    assert BACKBONES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("name", "stride"), list(itertools.product(BACKBONES, STRIDES)))
def test_parameters_of_the_plain_stem_are_torchvisions(name: str, stride: OutputStride) -> None:
    assert _parameters(_on_meta(name, "plain", stride)) == PARAMETERS[name]


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
    widths = (256, 512) if name in ("resnet18", "resnet34") else (1024, 2048)
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


@pytest.mark.parametrize(
    ("name", "entries"),
    [("resnet18", 120), ("resnet34", 216), ("resnet50", 318), ("resnet101", 624), ("resnet152", 930)],
)
def test_names_are_torchvisions(name: str, entries: int) -> None:
    names = list(_torchvision_names(name))
    assert len(names) == entries
    assert sorted(_on_meta(name).state_dict()) == sorted(names)


class _Reference:
    """A residual network as plain function calls on a state dict."""

    def __init__(
        self, state: Mapping[str, Tensor], name: str, stem: Stem, stride: int, *, full: bool, avg_down: bool
    ) -> None:
        self.state, self.stem, self.full, self.avg_down = state, stem, full, avg_down
        self.convolutions = 2 if BACKBONES[name].block is BasicBlock else 3
        self.plan = list(zip(BACKBONES[name].blocks, [(1, 1, 1), (2, 1, 1), *STAGES[stride]], strict=True))

    def __call__(self, x: Tensor) -> list[Tensor]:
        if self.stem == "plain":
            x = F.conv2d(x, self.state["conv1.weight"], stride=2, padding=3)
        else:
            for index, stride in ((0, 2), (3, 1), (6, 1)):
                x = F.conv2d(x, self.state[f"conv1.{index}.weight"], stride=stride, padding=1)
                x = x if index == 6 else F.relu(self._norm(x, f"conv1.{index + 1}"))
        x = F.max_pool2d(F.relu(self._norm(x, "bn1")), 3, 2, 1)
        features = []
        for stage, (count, (stride, contracted, dilation)) in enumerate(self.plan, start=1):
            for block in range(count):
                first = block == 0
                spread = contracted if first and not self.full else dilation
                x = self._block(x, f"layer{stage}.{block}", stride if first else 1, spread)
            features.append(x)
        return features

    def _block(self, x: Tensor, prefix: str, stride: int, dilation: int) -> Tensor:
        carrier, y = self.convolutions - 1, x
        for index in range(1, self.convolutions + 1):
            weight = self.state[f"{prefix}.conv{index}.weight"]
            carries = index == carrier
            spread = dilation if carries else 1
            padding = spread * (weight.shape[-1] // 2)
            y = F.conv2d(y, weight, stride=stride if carries else 1, padding=padding, dilation=spread)
            y = self._norm(y, f"{prefix}.bn{index}")
            y = y if index == self.convolutions else F.relu(y)
        shortcut = self.state.get(f"{prefix}.downsample.0.weight")
        if shortcut is not None:
            if self.avg_down:
                x, stride = _average_blocks(x, stride), 1
            x = self._norm(F.conv2d(x, shortcut, stride=stride), f"{prefix}.downsample.1")
        return F.relu(x + y)

    def _norm(self, x: Tensor, prefix: str) -> Tensor:
        weight, bias, mean, var = (
            self.state[f"{prefix}.{part}"].view(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def _average_blocks(x: Tensor, size: int) -> Tensor:
    """Means of blocks of ``size`` x ``size``; those at the far edges may be smaller, and count what they hold."""
    rows = [
        torch.stack([block.mean((-2, -1)) for block in strip.split(size, dim=-1)], dim=-1)
        for strip in x.split(size, dim=-2)
    ]
    return torch.stack(rows, dim=-2)


@pytest.mark.parametrize(
    ("name", "stem", "stride", "dilation", "avg_down"),
    [
        ("resnet18", "plain", 8, "contracted", False),
        ("resnet18", "deep", 16, "full", False),
        ("resnet18", "deep32", 8, "full", True),
        ("resnet50", "plain", 32, "contracted", True),
        ("resnet50", "deep", 8, "full", False),
        ("resnet50", "deep32", 16, "contracted", True),
    ],
)
def test_features_are_those_of_the_functional_network(
    name: str, stem: Stem, stride: OutputStride, dilation: Dilation, avg_down: bool
) -> None:
    backbone = ResNet(BACKBONES[name], stem=stem, output_stride=stride, dilation=dilation, avg_down=avg_down).eval()
    backbone.load_state_dict(_random(name, stem).state_dict())
    images = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        third, fourth = backbone(images)
        expected = _Reference(backbone.state_dict(), name, stem, stride, full=dilation == "full", avg_down=avg_down)(
            images
        )
    assert fourth.std() > 1e-3
    torch.testing.assert_close(third, expected[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fourth, expected[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_shorter_network_ends_after_its_last_stage(stages: int) -> None:
    whole = _random("resnet18", "plain", 8)
    short = ResNet(BACKBONES["resnet18"], stages=stages).eval()
    mismatch = short.load_state_dict(whole.state_dict(), strict=False)
    assert not mismatch.missing_keys
    assert mismatch.unexpected_keys[0].startswith(f"layer{stages + 1}")
    images = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        expected = _Reference(whole.state_dict(), "resnet18", "plain", 8, full=False, avg_down=False)(images)
        before, last = short(images)
    torch.testing.assert_close(before, expected[stages - 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[stages - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("bands", [1, 2, 13])
def test_any_number_of_bands(stem: Stem, bands: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(BACKBONES["resnet18"], stem=stem, bands=bands)
        assert backbone(torch.empty(1, bands, 32, 32))[1].shape == (1, 512, 4, 4)


@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_keeps_the_strided_features(stride: OutputStride) -> None:
    """A dilated network computes what the strided one does, at more cells (a trous)."""
    strided, step = _random("resnet50"), 32 // stride
    dilated = ResNet(BACKBONES["resnet50"], output_stride=stride).eval()
    dilated.load_state_dict(strided.state_dict())
    for size in ((33, 47), (64, 40)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            common, expected = dilated(images)[1][..., ::step, ::step], strided(images)[1]
        torch.testing.assert_close(common, expected, rtol=1e-4, atol=1e-4)
