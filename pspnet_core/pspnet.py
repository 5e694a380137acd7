"""PSPNet: a dilated residual network, pyramid pooling, fusion, a decoder and an auxiliary head.

Zhao et al., "Pyramid Scene Parsing Network" (CVPR 2017), section 3.2 and figure 3.

Shapes: ``B`` batch, ``C`` classes, ``H W`` input pixels, ``h w`` feature cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_core.backbones import BACKBONES, OutputStride, Stem, build_backbone
from pspnet_core.errors import ConfigError

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclass(frozen=True, kw_only=True)
class PSPNetConfig:
    """Everything that determines the network's function besides its weights."""

    classes: int
    """Number of classes, at least 2."""
    backbone: str = "resnet50"
    """A row of BACKBONES."""
    stem: Stem = "plain"
    """First layers of the backbone: one 7x7 convolution (plain) or three 3x3 (deep)."""
    output_stride: OutputStride = 8
    """Input pixels per feature cell; 8 is the paper's, 16 and 32 are faster and coarser."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Grid sizes of the pyramid."""
    align_corners: bool = False
    """Whether bilinear resizing maps corner to corner."""
    dropout: float = 0.1
    """Share of fused channels dropped in training."""
    auxiliary: bool = True
    """Whether the third stage has a classifier of its own, used in training only."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of the training images, RGB, range [0, 255]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation, RGB, same unit."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ConfigError("classes", self.classes, "a segmentation needs at least 2 classes")
        if self.classes > 65535:
            raise ConfigError("classes", self.classes, "at most 65535 classes fit a 16-bit mask")
        if self.backbone not in BACKBONES:
            raise ConfigError("backbone", self.backbone, f"choose one of {', '.join(BACKBONES)}")
        if self.stem not in ("plain", "deep"):
            raise ConfigError("stem", self.stem, "choose plain or deep")
        if self.output_stride not in (8, 16, 32):
            raise ConfigError("output_stride", self.output_stride, "choose 8, 16 or 32")
        if not self.bins or min(self.bins) < 1:
            raise ConfigError("bins", self.bins, "give positive grid sizes, such as 1 2 3 6")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "choose a share in [0, 1)")
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(tuple(values)) != 3:
                raise ConfigError(field, values, "give three numbers: red, green, blue")
        if not all(value > 0 for value in self.std):
            raise ConfigError("std", self.std, "standard deviations are positive")


class Logits(NamedTuple):
    """Unnormalised class scores."""

    main: Tensor
    aux: Tensor | None


class PyramidPooling(nn.Module):
    """The pyramid pooling module: the feature beside its averages over grids of several sizes.

    Each grid is pooled, reduced to ``channels / len(bins)`` by a 1x1 convolution and resized to the feature's size.
    """

    def __init__(self, channels: int, bins: Sequence[int], *, align_corners: bool) -> None:
        super().__init__()
        reduced = channels // len(bins)
        self.align_corners = align_corners
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *_conv_bn_relu(channels, reduced, 1)) for size in bins
        )
        self.out_channels = channels + reduced * len(bins)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, h, w)`` to ``(B, out_channels, h, w)``: the feature first, then the grids in order."""
        grids = [_resize(stage(x), x.shape[-2:], align_corners=self.align_corners) for stage in self.stages]
        return torch.cat([x, *grids], dim=1)


class PSPNet(nn.Module):
    """The network; images in, logits out, normalisation inside.

    ``mean`` and ``std`` are buffers, so that preprocessing travels with the weights and runs on the model's device.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PSPNetConfig) -> None:
        super().__init__()
        self.config = config
        third, fourth = BACKBONES[config.backbone].channels
        width = fourth // 4
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))
        self.backbone = build_backbone(config.backbone, stem=config.stem, output_stride=config.output_stride)
        self.pyramid = PyramidPooling(fourth, config.bins, align_corners=config.align_corners)
        self.fusion = nn.Sequential(*_conv_bn_relu(self.pyramid.out_channels, width, 3))
        self.decoder = nn.Sequential(nn.Dropout2d(config.dropout), nn.Conv2d(width, config.classes, 1))
        self.auxiliary = _auxiliary_head(third, config) if config.auxiliary else None

    def preprocess(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` uint8 RGB to normalised float of the weights' type."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def coarse(self, images: Tensor) -> Logits:
        """Logits at the feature's size ``(B, C, h, w)``; ``aux`` only in training mode.

        Args:
            images: ``(B, 3, H, W)`` uint8 RGB of any size.
        """
        third, fourth = self.backbone(self.preprocess(images))
        main = self.decoder(self.fusion(self.pyramid(fourth)))
        aux = self.auxiliary(third) if self.auxiliary is not None and self.training else None
        return Logits(main, aux)

    def forward(self, images: Tensor) -> Logits:
        """Logits at the input's size.

        Args:
            images: ``(B, 3, H, W)`` uint8 RGB of any size.

        Returns:
            ``main`` ``(B, C, H, W)`` float and ``aux``, of the same shape in training mode, else None.
        """
        main, aux = self.coarse(images)
        return Logits(self._upsample(main, images), None if aux is None else self._upsample(aux, images))

    def _upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        return _resize(logits.float(), images.shape[-2:], align_corners=self.config.align_corners)


def _resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


def _conv_bn_relu(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _auxiliary_head(channels: int, config: PSPNetConfig) -> nn.Sequential:
    """The classifier on the third stage (paper, section 3.3)."""
    return nn.Sequential(
        *_conv_bn_relu(channels, channels // 4, 3),
        nn.Dropout2d(config.dropout),
        nn.Conv2d(channels // 4, config.classes, 1),
    )
