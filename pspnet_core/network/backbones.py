"""Dilated residual networks, the feature extractors of PSPNet.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), dilated as in Yu et al., "Dilated Residual
Networks" (CVPR 2017). Module names are torchvision's (``conv1``, ``bn1``, ``layerN.M.convK``), so that ImageNet
weights of the plain stem load by name.

Shapes: ``B`` batch, ``N`` input bands, ``H W`` input pixels, ``h w`` feature cells (input size divided by the output
stride, rounded up).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Stem = Literal["plain", "deep", "deep32"]
OutputStride = Literal[8, 16, 32]
Dilation = Literal["contracted", "full"]

# First layers -> widths of their 3x3 convolutions; none for a single 7x7 (64).
STEMS: dict[str, tuple[int, ...]] = {
    "plain": (),  # He et al.; torchvision; V1b of mmsegmentation
    "deep": (64, 64, 128),  # the code of the PSPNet paper's authors
    "deep32": (32, 32, 64),  # V1c and V1d of mmsegmentation
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; only the first is dilated, as in mmsegmentation."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, *, avg_down: bool = False) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride, avg_down=avg_down)

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

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, *, avg_down: bool = False) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride, avg_down=avg_down)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, width * expansion, h / stride, w / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


def _shortcut(inputs: int, outputs: int, stride: int, *, avg_down: bool) -> nn.Sequential | None:
    """A 1x1 convolution where size or channels change; with ``avg_down`` an average takes over its stride."""
    if stride == 1 and inputs == outputs:
        return None
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if avg_down and stride > 1:
        layers["pool"] = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    layers["0"] = nn.Conv2d(inputs, outputs, 1, 1 if avg_down else stride, bias=False)
    layers["1"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(layers)


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Row of ``BACKBONES``: the block of a residual network, and how many of them each stage has."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]

    def channels(self, stage: int) -> int:
        """Channels that stage 1, 2, 3 or 4 puts out."""
        return int(32 * 2**stage * self.block.expansion)


BACKBONES: dict[str, BackboneSpec] = {
    "resnet18": BackboneSpec(block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": BackboneSpec(block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": BackboneSpec(block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": BackboneSpec(block=Bottleneck, blocks=(3, 4, 23, 3)),
    "resnet152": BackboneSpec(block=Bottleneck, blocks=(3, 8, 36, 3)),
}

# Output stride -> stride of each stage, and the dilation of the last two.
_STRIDES: dict[int, tuple[int, ...]] = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}
_DILATIONS: dict[int, tuple[int, int]] = {8: (2, 4), 16: (1, 2), 32: (1, 1)}


class ResNet(nn.Module):
    """A residual network whose last stages trade stride for dilation.

    Args:
        spec: a row of ``BACKBONES``.
        bands: channels of the input, 3 for RGB.
        stem: a row of ``STEMS``: one 7x7 convolution, or three 3x3.
        stages: residual stages, 2 to 4; the network ends after the last.
        output_stride: input pixels per feature cell at the end of stage 4. Two stages end at stride 8 in any case.
        dilation: ``contracted``: the first block of a dilated stage keeps the dilation of the stage before it
            (torchvision, mmsegmentation); ``full``: it is dilated like the rest (the paper's code).
        dilations: of stages 3 and 4; by default those that make up for the strides they have lost.
        avg_down: whether shortcuts average before their convolution instead of striding it (ResNet-D).
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        bands: int = 3,
        stem: Stem = "plain",
        stages: int = 4,
        output_stride: OutputStride = 8,
        dilation: Dilation = "contracted",
        dilations: tuple[int, int] | None = None,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, inputs = _stem(bands, STEMS[stem])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stages = stages
        before, spreads = 1, (1, 1, *(dilations or _DILATIONS[output_stride]))
        for index, (stride, own) in enumerate(zip(_STRIDES[output_stride], spreads[:stages], strict=False)):
            outputs, first = spec.channels(index + 1), own if dilation == "full" else before
            width = outputs // spec.block.expansion
            blocks = [spec.block(inputs, width, stride, first, avg_down=avg_down)]
            blocks += [spec.block(outputs, width, 1, own) for _ in range(spec.blocks[index] - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            inputs, before = outputs, own
        for module in self.modules():
            # On the meta device there is nothing to draw, and drawing there would load torch's compiler (2 s).
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of normalised images.

        Args:
            x: ``(B, N, H, W)`` float, normalised.

        Returns:
            The last stage but one ``(B, C3, h, w)`` (for the auxiliary head) and the last ``(B, C4, h, w)``.
        """
        before = x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(self.stages):
            before, x = x, self.get_submodule(f"layer{index + 1}")(x)
        return before, x


def _stem(bands: int, widths: tuple[int, ...]) -> tuple[nn.Module, nn.BatchNorm2d, int]:
    """First convolutions, their last normalisation and their output channels; the input is halved once."""
    if not widths:
        return nn.Conv2d(bands, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), 64
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((bands, *widths), widths, (2, 1, 1), strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2]), nn.BatchNorm2d(widths[-1]), widths[-1]
