"""Colours and noise of the drawn scenes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rgb = tuple[float, float, float]


Random = np.random.Generator


# Plaster, brick, concrete, glass; and roofs and doors of any colour come from `vivid`.
WALLS: tuple[Rgb, ...] = (
    (196, 182, 158),
    (156, 88, 68),
    (142, 140, 136),
    (104, 118, 132),
    (214, 210, 200),
    (178, 140, 104),
    (96, 84, 78),
    (122, 134, 108),
    (186, 150, 150),
)


LEAVES: tuple[Rgb, ...] = (
    (58, 96, 44),
    (84, 118, 52),
    (44, 74, 50),
    (70, 104, 44),
    (50, 88, 58),
    (148, 112, 48),
    (136, 74, 44),
    (110, 122, 70),
)


SKINS: tuple[Rgb, ...] = ((232, 190, 160), (198, 148, 112), (140, 96, 70), (88, 60, 46))


def jitter(random: Random, color: Rgb, spread: float) -> Rgb:
    """Move a colour: all channels together by ``spread``, and each by a third of it."""
    red, green, blue = (
        channel + shift
        for channel, shift in zip(color, random.normal(0, spread) + random.normal(0, spread / 3, 3), strict=True)
    )
    return red, green, blue


def mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def scaled(color: Rgb, factor: float) -> Rgb:
    return color[0] * factor, color[1] * factor, color[2] * factor


def pick(random: Random, colors: Sequence[Rgb]) -> Rgb:
    return colors[int(random.integers(len(colors)))]


def vivid(random: Random) -> Rgb:
    """Return any colour, from grey to saturated: of a car or of clothes."""
    grey = random.uniform(25, 225)
    red, green, blue = random.uniform(0, 235, 3)
    return mix((grey, grey, grey), (red, green, blue), random.uniform(0, 1))


def smooth_noise(random: Random, size: tuple[int, int], cells: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth noise, (height, width) float32 around 0, of about ``cells`` (across, down) waves."""
    coarse = random.standard_normal((cells[1] + 2, cells[0] + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
