"""Inference settings: how an image becomes network inputs, and how many of them are averaged.

Shapes: ``H W`` pixels of the image, ``h w`` of a network input.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pspnet_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How an image becomes network inputs. Stored with the model and part of its fingerprint."""

    resize: Literal["none", "short", "long", "scale", "fixed"] = "none"
    """Network input: the image as it is, its short or long side brought to ``size``, its sides times ``size``, or
    ``shape`` whatever its own."""
    size: float = 0.0
    """Pixels for the short or long side; a factor for ``scale``; unused by the others."""
    shape: tuple[int, int] | None = None
    """Height and width in pixels for ``fixed``; unused by the others."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on that input; the probabilities of all are averaged (paper, section 5.1)."""
    flip: bool = False
    """Whether the mirrored input is averaged in as well."""
    window: int = 0
    """Side of the square sliding window in input pixels, overlapping by a third; 0 for the whole image at once."""
    reduced: bool = False
    """Whether a JPEG that is larger than the network's input is decoded to a half, a quarter or an eighth of its sides,
    as long as that is no smaller than the input: faster, and very nearly the same input."""

    def __post_init__(self) -> None:
        if self.resize not in ("none", "short", "long", "scale", "fixed"):
            raise ConfigError("resize", self.resize, "choose none, short, long, scale or fixed")
        if self.resize in ("short", "long", "scale") and not 0 < self.size < math.inf:
            raise ConfigError("size", self.size, f"resize={self.resize} needs a positive size")
        if self.shape is None:
            if self.resize == "fixed":
                raise ConfigError("shape", self.shape, "resize=fixed needs a height and a width")
        elif len(tuple(self.shape)) != 2 or min(self.shape) < 1:
            raise ConfigError("shape", self.shape, "give a height and a width of at least 1 pixel each")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError("scales", self.scales, "give positive factors, such as 0.75,1.0,1.25")
        if self.window < 0 or 0 < self.window < 32:
            raise ConfigError("window", self.window, "give a window of at least 32 pixels, or 0 for none")

    def input_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width of the network's input for an image of this size, at least 1 pixel each."""
        if self.shape is not None and self.resize == "fixed":
            height, width = self.shape
        factor = {
            "none": scale,
            "short": round(self.size * scale) / min(height, width),
            "long": round(self.size * scale) / max(height, width),
            "scale": self.size * scale,
            "fixed": scale,
        }[self.resize]
        return max(1, round(height * factor)), max(1, round(width * factor))

    def input_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the network's input for each scale."""
        return [self.input_size(height, width, scale) for scale in self.scales]
