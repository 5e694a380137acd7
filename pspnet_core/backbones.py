"""Dilated residual networks, the feature extractors of PSPNet.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), dilated as in Yu et al., "Dilated Residual
Networks" (CVPR 2017). Module names are torchvision's (``conv1``, ``bn1``, ``layerN.M.convK``), so that ImageNet
weights of the plain stem load by name.

Shapes: ``B`` batch, ``H W`` input pixels, ``h w`` feature cells (input size divided by the output stride, rounded up).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pspnet_core.errors import ConfigError

Stem = Literal["plain", "deep"]
OutputStride = Literal[8, 16, 32]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; only the first is dilated, as in mmsegmentation."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, width * expansion, h / stride, w / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the 3x3 carries stride and dilation (ResNet V1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, width * expansion, h / stride, w / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What distinguishes one residual network from another: the block and how many of them each stage has."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the third and of the fourth stage."""
        return 256 * self.block.expansion, 512 * self.block.expansion


BACKBONES: dict[str, BackboneSpec] = {
    "resnet18": BackboneSpec(block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": BackboneSpec(block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": BackboneSpec(block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": BackboneSpec(block=Bottleneck, blocks=(3, 4, 23, 3)),
    "resnet152": BackboneSpec(block=Bottleneck, blocks=(3, 8, 36, 3)),
}

# Output stride -> (stride, dilation) of the third and of the fourth stage.
_STAGES: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {
    8: ((1, 2), (1, 4)),
    16: ((2, 1), (1, 2)),
    32: ((2, 1), (2, 1)),
}


class ResNet(nn.Module):
    """A residual network whose last two stages trade stride for dilation.

    A dilated stage keeps the dilation of the stage before it in its first block ("contracted" pattern, the one of
    torchvision and mmsegmentation).

    Args:
        spec: a row of ``BACKBONES``.
        stem: ``plain`` is one 7x7 convolution (64); ``deep`` is three 3x3 (64, 64, 128), as in the PSPNet paper's code.
        output_stride: input pixels per feature cell.

    Raises:
        ConfigError: for an output stride that is not 8, 16 or 32, or an unknown stem.
    """

    def __init__(self, spec: BackboneSpec, *, stem: Stem = "plain", output_stride: OutputStride = 8) -> None:
        super().__init__()
        if output_stride not in _STAGES:
            raise ConfigError("output_stride", output_stride, "choose 8, 16 or 32")
        if stem not in ("plain", "deep"):
            raise ConfigError("stem", stem, "choose plain or deep")
        self.conv1, self.bn1, width = _stem(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self._inputs, self._dilation = width, 1
        third, fourth = _STAGES[output_stride]
        self.layer1 = self._stage(spec, 0, 64, 1, 1)
        self.layer2 = self._stage(spec, 1, 128, 2, 1)
        self.layer3 = self._stage(spec, 2, 256, *third)
        self.layer4 = self._stage(spec, 3, 512, *fourth)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, spec: BackboneSpec, index: int, width: int, stride: int, dilation: int) -> nn.Sequential:
        blocks: list[nn.Module] = [spec.block(self._inputs, width, stride, self._dilation)]
        self._inputs, self._dilation = width * spec.block.expansion, dilation
        blocks += [spec.block(self._inputs, width, 1, dilation) for _ in range(spec.blocks[index] - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of normalised images.

        Args:
            x: ``(B, 3, H, W)`` float, normalised RGB.

        Returns:
            Third stage ``(B, C3, h, w)`` (for the auxiliary head) and fourth stage ``(B, C4, h, w)``.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        third = self.layer3(self.layer2(self.layer1(x)))
        return third, self.layer4(third)


def _stem(kind: Stem) -> tuple[nn.Module, nn.Module, int]:
    """First convolution, its normalisation and its output channels; the input is halved once."""
    if kind == "plain":
        return nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), 64
    widths: Sequence[tuple[int, int, int]] = ((3, 64, 2), (64, 64, 1), (64, 128, 1))
    layers: list[nn.Module] = []
    for inputs, outputs, stride in widths:
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2]), layers[-2], widths[-1][1]


def build_backbone(name: str, *, stem: Stem = "plain", output_stride: OutputStride = 8) -> ResNet:
    """The backbone called ``name``; raises ConfigError when there is none of that name."""
    if name not in BACKBONES:
        raise ConfigError("backbone", name, f"choose one of {', '.join(BACKBONES)}")
    return ResNet(BACKBONES[name], stem=stem, output_stride=output_stride)


def load_backbone_weights(backbone: ResNet, state: dict[str, Tensor]) -> list[str]:
    """Load ImageNet weights named as torchvision names them; the classifier ``fc`` is left over.

    Returns:
        The names in ``state`` that were not used.

    Raises:
        ConfigError: when a weight of the backbone is missing or has another shape.
    """
    own = backbone.state_dict()
    absent = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if absent:
        raise ConfigError(
            "init",
            f"{len(absent)} weights missing, first {absent[0]}",
            "use weights of this backbone and stem",
        )
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        shapes = f"{wrong[0]} {tuple(state[wrong[0]].shape)}"
        raise ConfigError(
            "init", shapes, f"expected {tuple(own[wrong[0]].shape)}; use weights of this backbone and stem"
        )
    with torch.no_grad():
        backbone.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return sorted(set(state) - set(own))
