"""PSPNet: a dilated residual network, pyramid pooling, fusion, a decoder and an auxiliary head.

Zhao et al., "Pyramid Scene Parsing Network" (CVPR 2017), section 3.2 and figure 3.

Shapes: ``B`` batch, ``C`` classes, ``H W`` input pixels, ``h w`` feature cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_core.errors import check, check_choice
from pspnet_core.network.backbones import BACKBONES, STEMS, Dilation, OutputStride, ResNet, Stem
from pspnet_core.network.fusion import PyramidFusion
from pspnet_core.network.interpolation import pooling_matrix

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

MOST_GRIDS = 64
MOST_CELLS = 1024
"""Along a side of a grid; more than any feature has."""

FusionOrder = Literal["feature_first", "feature_last"]


@dataclass(frozen=True, kw_only=True)
class PSPNetConfig:
    """Everything that determines the network's function besides its weights.

    The fields span the PSPNets of the paper's authors, of mmsegmentation and of segmentation_models.pytorch.
    """

    classes: int
    """Number of classes, 2 to 65535."""
    backbone: str = "resnet50"
    """A row of BACKBONES."""
    stem: Stem = "plain"
    """First layers of the backbone: one 7x7 convolution (plain), or three 3x3 (deep, deep32): a row of STEMS."""
    stages: int = 4
    """Residual stages of the backbone that are used, 2 to 4."""
    output_stride: OutputStride = 8
    """Input pixels per feature cell; 8 is the paper's, 16 and 32 are faster and coarser."""
    dilation: Dilation = "contracted"
    """Whether the first block of a dilated stage is dilated less than the rest (contracted) or as they are (full)."""
    dilations: tuple[int, int] | None = None
    """Dilations of the third and fourth stage; by default those that make up for the strides they have lost."""
    avg_down: bool = False
    """Whether the backbone's shortcuts average before their convolution instead of striding it (ResNet-D, V1d)."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Grid sizes of the pyramid."""
    bin_width: int | None = None
    """Channels of each grid; by default the feature's divided by the number of grids."""
    biased_bins: tuple[int, ...] = ()
    """Grids whose reduction has a bias in place of BatchNorm."""
    fusion_width: int | None = None
    """Channels after the fusion; by default a quarter of the feature's."""
    fusion_kernel: int = 3
    """Side of the fusion's kernel, odd."""
    fusion_order: FusionOrder = "feature_first"
    """Whether the fusion's input channels begin or end with the feature's."""
    classifier_kernel: int = 1
    """Side of the last convolution's kernel, odd."""
    align_corners: bool = False
    """Whether bilinear resizing maps corner to corner."""
    dropout: float = 0.1
    """Share of fused channels dropped in training."""
    auxiliary: bool = True
    """Whether the last stage but one has a classifier of its own."""
    auxiliary_width: int | None = None
    """Channels of that classifier; by default a quarter of its input's."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of the training images in each band (RGB by default), range [0, 255]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each band, same unit; as many as there are bands."""

    @property
    def bands(self) -> int:
        """Channels of the images: 3 for RGB."""
        return len(self.mean)

    def __post_init__(self) -> None:
        check(self.classes >= 2, "classes", self.classes, "a segmentation needs at least 2 classes")
        check(self.classes <= 65535, "classes", self.classes, "at most 65535 classes fit a 16-bit mask")
        for field, choices in _CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        check(1 <= len(self.bins) <= MOST_GRIDS, "bins", len(self.bins), f"give 1 to {MOST_GRIDS} grids")
        whole = all(size in range(1, MOST_CELLS + 1) for size in self.bins)
        check(whole, "bins", self.bins, f"give whole grid sizes from 1 to {MOST_CELLS}, such as 1 2 3 6")
        among = f"choose among the bins {self.bins}"
        check(set(self.biased_bins) <= set(self.bins), "biased_bins", self.biased_bins, among)
        for field in ("bin_width", "fusion_width", "auxiliary_width"):
            width = getattr(self, field)
            check((width or 1) >= 1, field, width, "give a positive number of channels, or none")
        spreads: tuple[int, ...] = (1, 1) if self.dilations is None else tuple(self.dilations)
        two = "give two positive numbers, for stages 3 and 4"
        check(len(spreads) == 2 and min(spreads) >= 1, "dilations", self.dilations, two)
        for field in ("fusion_kernel", "classifier_kernel"):
            side = getattr(self, field)
            check(side >= 1 and side % 2 == 1, field, side, "give an odd size, such as 3")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "choose a share in [0, 1)")
        finite = bool(self.mean) and all(map(math.isfinite, self.mean))
        check(finite, "mean", self.mean, "give a number for each band: red, green and blue")
        each = f"give a positive number for each of the {self.bands} bands of mean"
        check(len(self.std) == self.bands and all(0 < value < math.inf for value in self.std), "std", self.std, each)


_CHOICES: dict[str, Sequence[object]] = {
    "backbone": tuple(BACKBONES),
    "stem": tuple(STEMS),
    "stages": (2, 3, 4),
    "output_stride": (8, 16, 32),
    "dilation": ("contracted", "full"),
    "fusion_order": ("feature_first", "feature_last"),
}


class Logits(NamedTuple):
    """Unnormalised class scores."""

    main: Tensor
    aux: Tensor | None


class PyramidPooling(nn.Module):
    """The pyramid pooling module: averages of the feature over grids of several sizes, each reduced by a 1x1 kernel.

    The grids stay at their own size; resizing them is part of the fusion.
    """

    def __init__(self, channels: int, bins: Sequence[int], width: int, *, biased: Sequence[int] = ()) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(inplace=True))
            if size in biased
            else nn.Sequential(*_conv_bn_relu(channels, width, 1))
            for size in bins
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``(B, channels, h, w)`` to one ``(B, width, b, b)`` for each bin ``b``."""
        return [stage(grid) for stage, grid in zip(self.stages, average_grids(x, self.bins), strict=True)]


def average_grids(x: Tensor, bins: Sequence[int]) -> list[Tensor]:
    """Adaptive average pooling to several grids in one pass over ``(B, channels, h, w)``: ``(B, channels, b, b)`` each.

    Exactly ``adaptive_avg_pool2d``, as matrix products: its backward pass takes a tenth of the time on CPUs, and it
    exports for sizes that the grids do not divide.
    """
    batch, channels, height, width = x.shape
    rows = torch.cat([pooling_matrix(size, height, dtype=x.dtype, device=x.device) for size in bins])
    # Sums first, then division: 1 / n has no exact form in bfloat16, zeros and ones have.
    tall = rows @ x.permute(0, 2, 3, 1).reshape(batch, height, width * channels) / rows.sum(1, keepdim=True)
    grids = []
    for size, part in zip(bins, tall.view(batch, -1, width, channels).split(list(bins), dim=1), strict=True):
        columns = pooling_matrix(size, width, dtype=x.dtype, device=x.device)
        grids.append((columns @ part / columns.sum(1, keepdim=True)).permute(0, 3, 1, 2))
    return grids


class PSPNet(nn.Module):
    """The network; images in, logits out, normalisation inside.

    ``mean`` and ``std`` are buffers, so that preprocessing travels with the weights and runs on the model's device.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PSPNetConfig) -> None:
        super().__init__()
        self.config = config
        spec = BACKBONES[config.backbone]
        third, fourth = spec.channels(config.stages - 1), spec.channels(config.stages)
        width, bin_width = config.fusion_width or fourth // 4, config.bin_width or fourth // len(config.bins)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1))
        self.backbone = ResNet(
            spec,
            bands=config.bands,
            stem=config.stem,
            stages=config.stages,
            output_stride=config.output_stride,
            dilation=config.dilation,
            dilations=config.dilations,
            avg_down=config.avg_down,
        )
        self.pyramid = PyramidPooling(fourth, config.bins, bin_width, biased=config.biased_bins)
        self.fusion = PyramidFusion(
            fourth,
            [bin_width] * len(config.bins),
            width,
            kernel=config.fusion_kernel,
            align_corners=config.align_corners,
            feature_first=config.fusion_order == "feature_first",
        )
        self.decoder = nn.Sequential(
            nn.Dropout2d(config.dropout), _classifier(width, config.classes, config.classifier_kernel)
        )
        self.auxiliary = _auxiliary_head(third, config) if config.auxiliary else None

    def preprocess(self, images: Tensor) -> Tensor:
        """``(B, N, H, W)`` uint8 (RGB by default) to normalised float of the weights' type."""
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        return normalised.to(next(self.backbone.parameters()).dtype)

    def coarse(self, images: Tensor) -> Tensor:
        """Main logits at the feature's size, ``(B, C, h, w)`` float; what inference needs.

        Args:
            images: ``(B, N, H, W)`` uint8 (RGB by default) of any size.
        """
        return self._decode(self.backbone(self.preprocess(images))[1])

    def forward(self, images: Tensor) -> Logits:
        """Logits at the input's size.

        Args:
            images: ``(B, N, H, W)`` uint8 (RGB by default) of any size.

        Returns:
            ``main`` ``(B, C, H, W)`` float and ``aux``, of the same shape, or None for a network without that head.
        """
        third, fourth = self.backbone(self.preprocess(images))
        main = self._upsample(self._decode(fourth), images)
        return Logits(main, None if self.auxiliary is None else self._upsample(self.auxiliary(third), images))

    def _decode(self, feature: Tensor) -> Tensor:
        """Pyramid pooling, fusion and decoder: ``(B, C4, h, w)`` to ``(B, C, h, w)``."""
        logits: Tensor = self.decoder(self.fusion(feature, self.pyramid(feature)))
        return logits

    def _upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        # At least float32: neighbouring scores of a narrower type are often equal.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        align = self.config.align_corners
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=align)


def _conv_bn_relu(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _classifier(inputs: int, classes: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, classes, kernel, padding=kernel // 2)


def _auxiliary_head(channels: int, config: PSPNetConfig) -> nn.Sequential:
    """The classifier on the last stage but one (paper, section 3.3)."""
    width = config.auxiliary_width or channels // 4
    return nn.Sequential(
        *_conv_bn_relu(channels, width, 3), nn.Dropout2d(config.dropout), _classifier(width, config.classes, 1)
    )
