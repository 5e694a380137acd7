"""The PSPNets of other projects in plain torch, with their names of weights and their forward passes.

Written from what the projects' networks do, as the other side of a comparison. Each takes normalised images
``(B, N, H, W)`` and gives main and auxiliary logits ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Blocks = tuple[int, int, int, int]
Kind = Literal["V1b", "V1c", "V1d"]
RESNET18: Blocks = (2, 2, 2, 2)
RESNET50: Blocks = (3, 4, 6, 3)


def conv(inputs: int, outputs: int, side: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, dilation * (side // 2), dilation, bias=False)


class Basic(nn.Module):
    """Two 3x3 convolutions; the first strides and is dilated."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Wide(nn.Module):
    """A bottleneck; its 3x3 convolution strides and is dilated."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.downsample(x))


def expansion(blocks: Blocks) -> int:
    return 1 if blocks == RESNET18 else 4


def stage(
    inputs: int, blocks: Blocks, index: int, stride: int, dilations: Sequence[int] = (1, 1), *, average: bool = False
) -> nn.Sequential:
    """A residual stage; ``dilations`` of its first block and of the others."""
    width = 64 * 2**index
    block, outputs = (Basic, width) if expansion(blocks) == 1 else (Wide, 4 * width)
    shortcut: list[nn.Module] = []
    if stride > 1 or inputs != outputs:
        if average:
            shortcut.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
        shortcut += [conv(inputs, outputs, 1, 1 if average else stride), nn.BatchNorm2d(outputs)]
    layers = [block(inputs, width, stride, dilations[0], nn.Sequential(*shortcut))]
    layers += [block(outputs, width, 1, dilations[1], nn.Sequential()) for _ in range(1, blocks[index])]
    return nn.Sequential(*layers)


def deep_stem(bands: int, widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        layers += [conv(bands, width, 3, 2 if index == 0 else 1), nn.BatchNorm2d(width), nn.ReLU()]
        bands = width
    return layers


class TorchvisionResNet(nn.Module):
    """A ResNet for ImageNet: the backbone weights that trainings start from."""

    def __init__(self, blocks: Blocks, bands: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(bands, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1 = stage(64, blocks, 0, 1)
        self.layer2 = stage(64 * expansion(blocks), blocks, 1, 2)
        self.layer3 = stage(128 * expansion(blocks), blocks, 2, 2)
        self.layer4 = stage(256 * expansion(blocks), blocks, 3, 2)
        self.fc = nn.Linear(512 * expansion(blocks), 1000)


class SemsegPPM(nn.Module):
    def __init__(self, channels: int, width: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())
            for size in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        grown = [F.interpolate(part(x), x.shape[2:], mode="bilinear", align_corners=True) for part in self.features]
        return torch.cat([x, *grown], 1)


class SemsegPSPNet(nn.Module):
    """hszhao/semseg: strides of a ResNet-50 with a deep stem turned into dilation, corners aligned, sizes 8n + 1."""

    def __init__(self, classes: int, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(*deep_stem(3, (64, 64, 128)), nn.MaxPool2d(3, 2, 1))
        self.layer1 = stage(128, RESNET50, 0, 1)
        self.layer2 = stage(256, RESNET50, 1, 2)
        self.layer3 = stage(512, RESNET50, 2, 2)
        self.layer4 = stage(1024, RESNET50, 3, 2)
        for layer, dilation in ((self.layer3, 2), (self.layer4, 4)):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
                    module.stride, module.dilation, module.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
                elif isinstance(module, nn.Conv2d) and name.endswith("downsample.0"):
                    module.stride = (1, 1)
        self.ppm = SemsegPPM(2048, 2048 // len(bins), bins)
        self.cls = self._head(4096, 512, classes)
        self.aux = self._head(1024, 256, classes)

    @staticmethod
    def _head(inputs: int, width: int, classes: int) -> nn.Sequential:
        return nn.Sequential(
            conv(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[2:]
        assert all((side - 1) % 8 == 0 for side in size)
        third = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        coarse = self.cls(self.ppm(self.layer4(third))), self.aux(third)
        main, aux = (F.interpolate(logits, size, mode="bilinear", align_corners=True) for logits in coarse)
        return main, aux


class ConvModule(nn.Module):
    """mmcv's convolution, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, side), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MmsegResNet(nn.Module):
    """V1b: one 7x7; V1c: three 3x3; V1d: shortcuts average besides. ``contract`` halves a stage's first dilation."""

    def __init__(
        self, kind: Kind, blocks: Blocks, strides: Sequence[int], dilations: Sequence[int], *, contract: bool
    ) -> None:
        super().__init__()
        self.deep = kind != "V1b"
        if self.deep:
            self.stem = nn.Sequential(*deep_stem(3, (32, 32, 64)))
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for index, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
            first = dilation // 2 if contract and dilation > 1 else dilation
            layer = stage(inputs, blocks, index, stride, (first, dilation), average=kind == "V1d")
            self.add_module(f"layer{index + 1}", layer)
            inputs = 64 * 2**index * expansion(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x) if self.deep else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
            features.append(x)
        return features


class PSPHead(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int, bins: Sequence[int], *, align: bool) -> None:
        super().__init__()
        self.align = align
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvModule(inputs, width, 1)) for size in bins
        )
        self.bottleneck = ConvModule(inputs + len(bins) * width, width, 3)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for module in self.psp_modules:
            parts.append(F.interpolate(module(x), x.shape[2:], mode="bilinear", align_corners=self.align))
        logits: Tensor = self.conv_seg(self.bottleneck(torch.cat(parts, 1)))
        return logits


class FCNHead(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(inputs, width, 3))
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv_seg(self.convs(x))
        return logits


class MmsegPSPNet(nn.Module):
    """mmsegmentation's EncoderDecoder with PSPHead and an auxiliary FCNHead; any size."""

    def __init__(
        self,
        classes: int,
        kind: Kind = "V1c",
        blocks: Blocks = RESNET18,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        strides: Sequence[int] = (1, 2, 1, 1),
        dilations: Sequence[int] = (1, 1, 2, 4),
        align: bool = False,
        contract: bool = True,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        channels = 512 * expansion(blocks)
        self.backbone = MmsegResNet(kind, blocks, strides, dilations, contract=contract)
        self.decode_head = PSPHead(channels, channels // 4, classes, bins, align=align)
        self.auxiliary_head = FCNHead(channels // 2, channels // 8, classes) if auxiliary else None
        self.align = align

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.backbone(x)
        main = self._resized(self.decode_head(features[3]), x)
        return main, None if self.auxiliary_head is None else self._resized(self.auxiliary_head(features[2]), x)

    def _resized(self, logits: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=self.align)


class SmpEncoder(TorchvisionResNet):
    """torchvision's ResNet without its classifier; all stages are there, the first ``depth - 1`` are used."""

    def __init__(self, blocks: Blocks, depth: int, bands: int) -> None:
        super().__init__(blocks, bands)
        del self.fc
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for index in range(1, self.depth):
            x = self.get_submodule(f"layer{index}")(x)
        return x


class SmpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        reduce = nn.Conv2d(inputs, outputs, 1, bias=size == 1)
        norm = nn.Identity() if size == 1 else nn.BatchNorm2d(outputs)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Sequential(reduce, norm, nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.pool(x), x.shape[2:], mode="bilinear", align_corners=True)


class SmpPSP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SmpBlock(channels, channels // 4, size) for size in (1, 2, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(block(x) for block in self.blocks), x], 1)


class SmpDecoder(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.psp = SmpPSP(channels)
        self.conv = nn.Sequential(conv(2 * channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        fused: Tensor = self.conv(self.psp(x))
        return fused


class SmpPSPNet(nn.Module):
    """segmentation_models.pytorch; sides that the encoder's stride divides, upsampled by that stride."""

    def __init__(
        self, classes: int, blocks: Blocks = RESNET18, *, depth: int = 3, bands: int = 3, width: int = 512
    ) -> None:
        super().__init__()
        self.encoder = SmpEncoder(blocks, depth, bands)
        self.decoder = SmpDecoder(64 * 2 ** (depth - 2) * expansion(blocks), width)
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(width, classes, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2**depth)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.segmentation_head(self.decoder(self.encoder(x))), None


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics that keep activations of order 1; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif value.ndim == 1 and name.endswith("weight"):
            value.uniform_(0.5, 1.0, generator=generator)
        else:
            value.normal_(0, 0.1, generator=generator)
    return network.eval()
