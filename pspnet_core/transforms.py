"""Joint augmentation of an image and its mask, as a pure function of the sample and a seed.

The recipe of the paper (section 5.1): random scale, rotation, Gaussian blur, mirror, and a crop padded with the mean
colour and the ignore id. The mask is resampled by nearest neighbour only, so no class id is ever invented.

Shapes: ``H W`` pixels of the sample, ``h w`` pixels of the crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pspnet_core.errors import ConfigError

Sample = tuple[Image.Image, Image.Image]
Mask = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges of the random changes, and the size of what comes out."""

    crop: tuple[int, int]
    """Height and width of the crop in pixels."""
    base: float = 1.0
    """Size of the unscaled sample relative to the file: 0.5 trains at half resolution."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale, drawn log-uniformly."""
    rotate: float = 10.0
    """Largest rotation either way, in degrees; half the samples are rotated."""
    blur: float = 0.5
    """Share of blurred samples."""
    mirror: float = 0.5
    """Share of mirrored samples."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Colour of the padding, RGB, range [0, 255]."""
    ignore: int = 255
    """Id of the padding in the mask."""

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise ConfigError("crop", self.crop, "give a positive height and width")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError("scale", self.scale, "give a positive range, smaller number first")
        if not self.base > 0:
            raise ConfigError("base", self.base, "give a positive factor, such as 0.5")
        if not 0 <= self.rotate <= 180:
            raise ConfigError("rotate", self.rotate, "choose an angle in 0..180 degrees")
        if not 0 <= self.blur <= 1:
            raise ConfigError("blur", self.blur, "choose a share in 0..1")
        if not 0 <= self.mirror <= 1:
            raise ConfigError("mirror", self.mirror, "choose a share in 0..1")
        if not 0 <= self.ignore <= 65535:
            raise ConfigError("ignore", self.ignore, "choose an id in 0..65535")


def augment(
    image: NDArray[np.uint8],
    mask: Mask,
    config: AugmentConfig,
    seed: int | Sequence[int],
) -> tuple[NDArray[np.uint8], Mask]:
    """One augmented crop; the same arguments give the same crop.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        mask: ``(H, W)`` uint8 or uint16 class ids.
        seed: a non-negative integer, or several.

    Returns:
        Image ``(h, w, 3)`` uint8 RGB and mask ``(h, w)`` of the type that came in, or of the next wider one that
        holds ``ignore``.
    """
    ids = np.result_type(mask.dtype, np.min_scalar_type(config.ignore))
    random = np.random.default_rng(seed)
    # Pillow resamples 8-bit ("L") and 32-bit ("I") single channels; 16-bit ids travel in the latter.
    sample = (
        Image.fromarray(image),
        Image.fromarray(mask if ids == np.uint8 else mask.astype(np.int32)),
    )
    sample = random_scale(sample, config, random)
    sample = random_rotate(sample, config, random)
    sample = random_crop(sample, config, random)
    sample = random_blur(sample, config, random)
    sample = random_mirror(sample, config, random)
    crop: NDArray[np.uint8] = np.array(sample[0])
    labels: Mask = np.array(sample[1]).astype(ids, copy=False)
    return crop, labels


def random_scale(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Resize by ``base`` times a factor drawn log-uniformly from ``scale``."""
    low, high = np.log(config.scale)
    factor = config.base * float(np.exp(random.uniform(low, high)))
    size = tuple(max(1, round(side * factor)) for side in sample[0].size)
    return _resize(sample, (size[0], size[1]))


def random_rotate(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Rotate half the samples about their centre; what comes in from outside is padding."""
    turn, angle = random.random() < 0.5, float(random.uniform(-config.rotate, config.rotate))
    if not turn or config.rotate == 0:
        return sample
    image = sample[0].rotate(angle, Image.Resampling.BILINEAR, fillcolor=_fill(config))
    return image, sample[1].rotate(angle, Image.Resampling.NEAREST, fillcolor=config.ignore)


def random_crop(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Cut a window of ``crop`` size anywhere; a sample smaller than that is centred on padding."""
    (width, height), (rows, columns) = sample[0].size, config.crop
    left = _offset(width - columns, random)
    top = _offset(height - rows, random)
    image = Image.new("RGB", (columns, rows), _fill(config))
    mask = Image.new(sample[1].mode, (columns, rows), config.ignore)
    image.paste(sample[0], (-left, -top))
    mask.paste(sample[1], (-left, -top))
    return image, mask


def random_blur(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Blur some images with a Gaussian of standard deviation up to 1 pixel; the mask stays."""
    blurred, radius = random.random() < config.blur, float(random.uniform(0.1, 1.0))
    return (sample[0].filter(ImageFilter.GaussianBlur(radius)), sample[1]) if blurred else sample


def random_mirror(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Swap left and right in some samples."""
    if random.random() >= config.mirror:
        return sample
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return sample[0].transpose(flip), sample[1].transpose(flip)


def _resize(sample: Sample, size: tuple[int, int]) -> Sample:
    if sample[0].size == size:
        return sample
    return sample[0].resize(size, Image.Resampling.BILINEAR), sample[1].resize(size, Image.Resampling.NEAREST)


def _offset(slack: int, random: np.random.Generator) -> int:
    """Start of the window when the sample is ``slack`` pixels longer; negative to centre a shorter one."""
    return int(random.integers(slack + 1)) if slack >= 0 else slack // 2


def _fill(config: AugmentConfig) -> tuple[int, int, int]:
    red, green, blue = (round(value) for value in config.mean)
    return red, green, blue
