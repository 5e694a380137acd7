"""Street scenes with exact masks, drawn from a seed: data for the demo, the benchmarks and the tests.

A scene is a street seen through a pinhole camera: houses with windows, trees, cars and people at their own depths,
under a random sky. Colours, light, haze, shadows and noise differ from scene to scene, so that colour alone does not
give the class away: a sky may be as grey as a wall, a car as green as a tree, and autumn trees are brown.

Shapes: ``H W`` pixels. World coordinates are in metres: ``x`` to the right and ``y`` up from the point of the road
below the camera, ``z`` ahead. Colours are RGB, 0 to 255.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from pspnet_core.images.classes import ClassTable, Color

SCALE = 2
"""Scenes are drawn this many times larger and reduced, which smooths the edges of the picture."""
NEAREST = 1.5
"""Nothing is drawn nearer than this, where the projection grows without bound."""

Random = np.random.Generator
Rgb = NDArray[np.float64]
Point = tuple[float, float, float]
Part = tuple[str, float, list[Point]]
"""A part of a car: its paint, the light on it and its corners."""

# Plaster, brick, concrete and glass.
_WALLS = np.array(
    [
        (196, 182, 158),
        (156, 88, 68),
        (142, 140, 136),
        (104, 118, 132),
        (214, 210, 200),
        (178, 140, 104),
        (96, 84, 78),
        (122, 134, 108),
        (186, 150, 150),
    ]
)
_TILES = np.array([(120, 70, 56), (84, 84, 92), (98, 88, 70)])
_LEAVES = np.array(
    [(58, 96, 44), (84, 118, 52), (44, 74, 50), (70, 104, 44), (50, 88, 58), (148, 112, 48), (136, 74, 44)]
)
_SKINS = np.array([(232, 190, 160), (198, 148, 112), (140, 96, 70), (88, 60, 46)])
_LAMPLIGHT = np.array([246.0, 210, 130])

# Zenith and horizon of a clear, a sunset, a pale, an overcast, a rainy and a dusk sky; three of them may have a sun.
_SKIES = np.array(
    [
        [(62, 118, 200), (178, 206, 232)],
        [(110, 108, 152), (238, 178, 124)],
        [(130, 168, 208), (214, 222, 226)],
        [(176, 182, 188), (214, 214, 210)],
        [(112, 120, 130), (164, 168, 170)],
        [(36, 42, 78), (120, 96, 110)],
    ]
)
_SKY_SHARES = (0.3, 0.1, 0.2, 0.2, 0.15, 0.05)


@dataclass(frozen=True, kw_only=True)
class Street:
    """The camera, the light and the measures of a scene.

    Attributes:
        centre: where the street vanishes, ``(x, y)`` as shares of the picture's width and height.
        focal: focal length as a share of the picture's width.
        eye: height of the camera.
        half_road, half_street: from the middle of the road to the kerb and to the houses.
        zenith, horizon: colours of the sky.
        haze: depth at which 37 % of a thing's own colour is left.
        sun: the side that the sun stands on, -1 or 1; 0 for none.
        glow: share of the windows that are lit from inside.
    """

    centre: tuple[float, float]
    focal: float
    eye: float
    half_road: float
    half_street: float
    zenith: Rgb
    horizon: tuple[float, ...]
    haze: float
    sun: float
    glow: float


class Shape(NamedTuple):
    """A filled polygon; what shines through, such as a shadow, changes the picture and not the mask."""

    corners: Sequence[Point]
    color: Iterable[float]
    light: float = 1.0
    opacity: float = 1.0


def _jitter(random: Random, color: ArrayLike, spread: float) -> Rgb:
    """Move a colour: all channels together by ``spread``, and each by a third of it."""
    return np.asarray(color) + random.normal(0, spread) + random.normal(0, spread / 3, 3)


def _mix(one: ArrayLike, other: ArrayLike, share: ArrayLike) -> Rgb:
    mixed: Rgb = np.asarray(one) * (1 - np.asarray(share)) + np.asarray(other) * share
    return mixed


def _vivid(random: Random) -> Rgb:
    """Return any colour, from grey to saturated: of a car or of clothes."""
    return _mix(random.uniform(25, 225), random.uniform(0, 235, 3), random.uniform())


def _smooth_noise(random: Random, size: tuple[int, int], cells: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth noise, (height, width) float32 around 0, of about ``cells`` (across, down) waves."""
    coarse = random.standard_normal((cells[1] + 2, cells[0] + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def _upright(x0: float, z0: float, x1: float, z1: float, y0: float, y1: float) -> list[Point]:
    """Return a rectangle that stands on the line between two points of the ground."""
    return [(x0, y0, z0), (x0, y1, z0), (x1, y1, z1), (x1, y0, z1)]


def _flat(x0: float, x1: float, z0: float, z1: float) -> list[Point]:
    """Return a rectangle that lies on the ground."""
    return [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)]


_CIRCLE = [(float(np.cos(angle)), float(np.sin(angle))) for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False)]


def _disc(x: float, y: float, z: float, across: float, up: float) -> list[Point]:
    """Return an ellipse that faces the camera."""
    return [(x + across * u, y + up * v, z) for u, v in _CIRCLE]


def _shadow(x: float, z: float, across: float, ahead: float) -> Shape:
    """Return the shadow below a thing: an ellipse on the ground."""
    return Shape([(x + across * u, 0, z + ahead * v) for u, v in _CIRCLE], (0, 0, 0), opacity=0.4)


def _draw_road(street: Street, random: Random, z: float) -> Iterator[Shape]:
    """Draw all of the ground in bands of depth, then lines, crossing, mended places, and the shadow of the houses."""
    road, kerb = street.half_road, street.half_road + 0.24
    tar = _jitter(random, np.full(3, random.uniform(60, 130)), 6)
    paving = _jitter(random, _mix(random.choice(_WALLS), tar, 0.55), 14)
    stone = paving * random.uniform(0.6, 1.4)
    for far, near in itertools.pairwise(np.geomspace(z, NEAREST, 14).tolist()):
        for half, color in ((2 * far, paving), (kerb, stone), (road, tar)):
            yield Shape(_flat(-half, half, near, far), color)
    for near in np.arange(3.0, 22.0, random.uniform(1, 2.5)):
        for side in (-1, 1):
            yield Shape(_flat(side * kerb, side * 30, near, near + 0.07), paving * 0.82)
    for x, near, width, length in random.uniform((-road, 3, 0.5, 0.5), (road - 2, 30, 2, 6), (random.integers(5), 4)):
        yield Shape(_flat(x, x + width, near, near + length), tar * random.uniform(0.75, 1.2))
    paint = random.uniform(0.5, 1) * np.array((228, 226, 214) if random.random() < 0.75 else (220, 180, 70))
    dash, gap = random.uniform(1.5, 4), random.uniform(2, 5)
    for x in ((0,), (-road / 3, road / 3))[random.integers(2)]:
        for near in np.arange(NEAREST, 70, dash + gap):
            yield Shape(_flat(x - 0.08, x + 0.08, near, near + dash), paint)
    if random.random() < 0.35:
        near = random.uniform(5, 18)
        for x in np.arange(-road + 0.3, road - 0.3, 1.1):
            yield Shape(_flat(x, x + 0.55, near, near + 3), paint)
    if edge := street.sun * street.half_street:
        bands = itertools.pairwise(np.geomspace(NEAREST, 90, 9).tolist())
        for (near, far), reach in zip(bands, random.uniform(-0.5, 1, 8), strict=True):
            yield Shape(_flat(reach * edge, 3 * edge, near, far), (0, 0, 0), opacity=0.4)


def _draw_house(street: Street, random: Random, z: float) -> Iterator[Shape]:
    """Draw the gable, which faces the camera, and the front towards the street with its windows."""
    side = float(random.choice((-1, 1)))
    # The houses at the far end of the street stand anywhere along the horizon.
    x = side * (street.half_street + random.uniform(0, 2)) if z < 80 else random.uniform(-0.8, 0.8) * z
    storey, floors = random.uniform(2.8, 3.6), int(random.integers(1, 8))
    end, top = z + random.uniform(7, 20), floors * storey + 0.8
    wall, light = _jitter(random, random.choice(_WALLS), 20), 1 - 0.22 * side * street.sun
    yield Shape(_upright(x, z, x + side * random.uniform(9, 25), z, 0, top), wall, 0.8)
    yield Shape(_upright(x, z, x, end, 0, top), wall, light)
    if floors <= 3 and random.random() < 0.7:
        tiles, ridge = _jitter(random, random.choice(_TILES), 12), (x + side * 3.5, top + random.uniform(1.5, 3.5))
        yield Shape([(x, top, z), (*ridge, z), (x + side * 7, top, z)], tiles, 0.75)
        yield Shape([(x, top, z), (*ridge, z), (*ridge, end), (x, top, end)], tiles, light)
    if z > 40:
        return  # windows would be smaller than a pixel
    bay, width = random.uniform(2.2, 4), random.uniform(0.4, 0.7)
    sill, head = random.uniform(0.25, 0.4), random.uniform(0.7, 0.9)
    glass = _mix((40, 46, 54), street.zenith, random.uniform(0, 0.7))
    for floor, near in itertools.product(range(floors), np.arange(z + 0.5, end - bay * width, bay).tolist()):
        is_lit = random.random() < street.glow
        pane = _upright(x, near, x, near + bay * width, (floor + sill) * storey, (floor + head) * storey)
        yield Shape(pane, _LAMPLIGHT if is_lit else glass * random.uniform(0.7, 1.3), 1 if is_lit else light)
    if floors > 1 and random.random() < 0.5:
        yield Shape(_upright(x, z + 0.6, x, end - 0.6, 0.4, 0.75 * storey), _jitter(random, (58, 62, 66), 10))
        yield Shape(_upright(x, z + 0.6, x, end - 0.6, 0.78 * storey, storey), _vivid(random), light)


def _draw_tree(street: Street, random: Random, z: float) -> Iterator[Shape]:
    """Draw a trunk under clumps of leaves, which are lit from above and from the side of the sun."""
    x = float(random.choice((-1, 1))) * random.uniform(street.half_road + 0.6, street.half_street)
    trunk, crown, slender = random.uniform(1.6, 3.2), random.uniform(1.2, 3.2), random.uniform(0.7, 1.1)
    half, middle = 0.09 * crown + 0.05, trunk + 0.8 * crown
    yield _shadow(x - street.sun, z, crown, crown)
    yield Shape(_upright(x - half, z, x + half, z, 0, middle), _jitter(random, (84, 68, 54), 12))
    leaves = _jitter(random, random.choice(_LEAVES), 14)
    clumps = random.uniform((-0.6, -0.6, 0.4, 0.75), (0.6, 0.6, 0.75, 1.2), (9, 4)) * (crown, crown, crown, 1)
    for across, up, radius, tone in clumps.tolist():
        light = tone + (0.25 * up + 0.2 * across * street.sun) / crown
        yield Shape(_disc(x + across * slender, middle + up, z, radius * slender, radius), leaves, light)
    if z < 30:
        flecks = random.normal((x, middle, 1), (0.35 * crown * slender, 0.35 * crown, 0.22), (25, 3))
        for across, up, tone in flecks.tolist():
            leaf = _upright(across - 0.05 * crown, z, across + 0.05 * crown, z, up - 0.05 * crown, up + 0.05 * crown)
            yield Shape(leaf, leaves, tone)


# A car's parts in the order of painting; corners are shares of its half width, height and length.
_CAR: tuple[Part, ...] = (
    ("tyre", 1.0, _upright(1, 0.14, 1, 0.28, 0, 0.4)),
    ("tyre", 1.0, _upright(1, 0.72, 1, 0.86, 0, 0.4)),
    ("body", 0.75, _upright(1, 0, 1, 1, 0.15, 0.56)),
    ("glass", 0.9, [(1, 0.56, 0.04), (0.8, 1, 0.16), (0.8, 1, 0.68), (1, 0.56, 0.82)]),
    ("tyre", 1.0, _upright(-0.95, 0, -0.65, 0, 0, 0.26)),
    ("tyre", 1.0, _upright(0.65, 0, 0.95, 0, 0, 0.26)),
    ("body", 1.08, [(-1, 0.56, 0), (-0.8, 1, 0.1), (0.8, 1, 0.1), (1, 0.56, 0)]),
    ("glass", 1.0, [(-0.86, 0.6, 0), (-0.7, 0.93, 0.08), (0.7, 0.93, 0.08), (0.86, 0.6, 0)]),
    ("body", 1.0, _upright(-1, 0, 1, 0, 0.14, 0.58)),
    ("body", 0.55, _upright(-1, 0, 1, 0, 0.14, 0.27)),
    ("lamp", 1.0, _upright(-0.93, 0, -0.6, 0, 0.38, 0.5)),
    ("lamp", 1.0, _upright(0.6, 0, 0.93, 0, 0.38, 0.5)),
    ("plate", 1.0, _upright(-0.28, 0, 0.28, 0, 0.29, 0.37)),
)
# The same of a car that crosses the street: shares of half its length, and of its height.
_CROSSING_CAR: tuple[Part, ...] = (
    ("body", 1.08, [(-0.84, 0.58, 0), (-0.6, 1, 0), (0.16, 1, 0), (0.56, 0.58, 0)]),
    ("glass", 1.0, [(-0.72, 0.62, 0), (-0.54, 0.93, 0), (-0.2, 0.93, 0), (-0.2, 0.62, 0)]),
    ("glass", 1.0, [(-0.12, 0.62, 0), (-0.12, 0.93, 0), (0.12, 0.93, 0), (0.44, 0.62, 0)]),
    (
        "body",
        1.0,
        [(-1, 0.18, 0), (-1, 0.55, 0), (-0.6, 0.62, 0), (0.56, 0.62, 0), (1, 0.5, 0), (1, 0.18, 0)],
    ),
    ("body", 0.6, _upright(-1, 0, 1, 0, 0.18, 0.28)),
    ("tyre", 1.0, _disc(-0.6, 0.2, 0, 0.16, 0.21)),
    ("tyre", 1.0, _disc(0.6, 0.2, 0, 0.16, 0.21)),
    ("plate", 0.7, _disc(-0.6, 0.2, 0, 0.07, 0.09)),
    ("plate", 0.7, _disc(0.6, 0.2, 0, 0.07, 0.09)),
)


def _draw_car(street: Street, random: Random, z: float) -> Iterator[Shape]:
    """Draw a car that drives or parks along the street, from behind or from the front, or one that crosses it."""
    half, height, length = random.uniform((0.8, 1.35, 3.4), (1, 1.95, 4.6))
    x, turned = random.choice((-0.75, -0.3, 0.3, 0.75)) * street.half_road, random.choice((-1, 1))
    parts = _CROSSING_CAR if random.random() < 0.2 else _CAR
    if parts is _CROSSING_CAR:
        half, length = length / 2, 0
    else:
        turned = -np.sign(x)  # it shows the flank that is nearer to the middle
    paints: dict[str, Iterable[float]] = {
        "body": _vivid(random),
        "glass": _mix((34, 38, 44), street.horizon, random.uniform(0.1, 0.5)),
        "tyre": (24, 24, 26),
        "lamp": (206, 40, 34) if x > 0 else (250, 244, 214),
        "plate": (214, 210, 190),
    }
    yield _shadow(x - 0.3 * street.sun, z + length / 2, 1.15 * half, 0.6 + length / 2)
    for paint, light, corners in parts:
        yield Shape([(x + turned * half * u, height * v, z + length * w) for u, v, w in corners], paints[paint], light)


def _draw_person(street: Street, random: Random, z: float) -> Iterator[Shape]:
    """Draw a person who walks on the road or on the pavement."""
    x, tall = random.uniform(-1, 1) * (street.half_street - 0.3), random.uniform(1.15, 1.9)
    coat, trousers, skin = _vivid(random), _vivid(random), random.choice(_SKINS)
    stride, swing = random.uniform(0.02, 0.2), random.uniform(-0.12, 0.12)
    yield _shadow(x - 0.1 * street.sun, z, 0.22 * tall, 0.22 * tall)
    # Legs, skirt or hips, an arm, the body, the other arm: from a low point to a high one, and half the width.
    for color, light, foot, low, hip, high, half in (
        (trousers, 0.85, -stride, 0, -0.03, 0.5, 0.04),
        (trousers, 1, stride, 0, 0.03, 0.5, 0.04),
        (trousers, 1, 0, 0.3 if random.random() < 0.25 else 0.45, 0, 0.52, 0.085),
        (coat, 0.8, -0.11 - swing, 0.45, -0.1, 0.8, 0.028),
        (coat, 1, 0, 0.46, 0, 0.82, 0.095),
        (coat, 0.9, 0.11 + swing, 0.45, 0.1, 0.8, 0.028),
    ):
        outline = ((foot - half, low), (hip - half, high), (hip + half, high), (foot + half, low))
        yield Shape([(x + u * tall, v * tall, z) for u, v in outline], color, light)
    yield Shape(_disc(x, 0.92 * tall, z, 0.064 * tall, 0.075 * tall), skin)
    yield Shape(_disc(x, 0.96 * tall, z, 0.064 * tall, 0.042 * tall), (120, 96, 66), random.uniform(0.2, 1.4))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of the scenes.

    Attributes:
        color: its colour in the class table.
        grain: how rough it is, as a share of its brightness.
        count: least and most of them in a scene.
        depth: where they stand, as many near as far by their size on the picture.
        draw: gives the shapes of one that stands at a depth, in the order of painting.
    """

    color: Color
    grain: float
    count: tuple[int, int]
    depth: tuple[float, float]
    draw: Callable[[Street, Random, float], Iterator[Shape]]


KINDS: dict[str, Kind] = {
    "Building": Kind(color=(128, 64, 64), grain=0.035, count=(18, 28), depth=(3, 170), draw=_draw_house),
    "Tree": Kind(color=(107, 142, 35), grain=0.11, count=(2, 9), depth=(7, 70), draw=_draw_tree),
    "Road": Kind(color=(128, 64, 128), grain=0.05, count=(1, 1), depth=(2000, 2000), draw=_draw_road),
    "Car": Kind(color=(0, 0, 160), grain=0.02, count=(1, 6), depth=(5, 30), draw=_draw_car),
    "Person": Kind(color=(220, 20, 60), grain=0.04, count=(5, 9), depth=(2.5, 7), draw=_draw_person),
}
"""The classes beside the sky, which is what nothing is painted over. Road is all of the ground."""

SCENE_CLASSES = ClassTable(names=("Sky", *KINDS), colors=((70, 130, 180), *(kind.color for kind in KINDS.values())))
"""The classes of a scene. No pixel is unlabelled."""


def draw_scene(seed: int, *, width: int = 160, height: int = 120) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a street scene; a pure function of its arguments.

    Args:
        seed: which scene, 0 or more; the same street at every size.
        width: W, at least 16.
        height: H, at least 16.

    Returns:
        the image, (H, W, 3) uint8 RGB, and its mask, (H, W) uint8 of ids of :data:`SCENE_CLASSES`.

    Raises:
        ValueError: when the seed is negative or the scene is smaller than 16 x 16.
    """
    if seed < 0 or width < 16 or height < 16:
        raise ValueError(f"scene {seed} of {width} x {height}: seeds are from 0, sides from 16")
    random = np.random.default_rng(seed)
    street = _lay_out(random)
    things = [
        (math.exp(random.uniform(math.log(kind.depth[0]), math.log(kind.depth[1]))), label)
        for label, kind in enumerate(KINDS.values(), start=1)
        for _ in range(random.integers(*kind.count, endpoint=True))
    ]
    picture = _sky(street, random, (width * SCALE, height * SCALE))
    mask = Image.new("L", picture.size)
    brush, label_brush = ImageDraw.Draw(picture, "RGBA"), ImageDraw.Draw(mask)
    kinds = list(KINDS.values())
    # The far ones first, as the near ones hide them. Each has dice of its own, so that no size changes the others.
    for place, (z, label) in enumerate(sorted(things, reverse=True)):
        for shape in kinds[label - 1].draw(street, np.random.default_rng((seed, place)), z):
            points, fill = _seen(street, shape, picture.size)
            brush.polygon(points, fill=fill)
            if shape.opacity == 1:
                label_brush.polygon(points, fill=label)
    ids = np.array(mask)[::SCALE, ::SCALE].copy()
    return _photograph(picture.reduce(SCALE), ids, random), ids


def _lay_out(random: Random) -> Street:
    sky = random.choice(len(_SKIES), p=_SKY_SHARES)
    zenith, horizon = (_jitter(random, color, 16) for color in _SKIES[sky])
    half_road = random.uniform(3.5, 6.5)
    return Street(
        centre=(random.uniform(0.34, 0.66), random.uniform(0.4, 0.55)),
        focal=random.uniform(0.7, 1),
        eye=random.uniform(1.5, 2.6),
        half_road=half_road,
        half_street=half_road + random.uniform(2, 5),
        zenith=zenith,
        horizon=tuple(horizon.tolist()),
        haze=random.uniform(60, 120) if random.random() < 0.15 else random.uniform(150, 500),
        sun=random.choice((-1, 1)) * float(sky < 3 and random.random() < 0.8),
        glow=0.45 if sky == 5 else 0.06,
    )


def _sky(street: Street, random: Random, size: tuple[int, int]) -> Image.Image:
    """Return a sky: from the zenith's colour at the top to the horizon's, with clouds, wider than they are high."""
    small = size[0] // 4, size[1] // 4  # it is soft, so a small picture will do
    share = np.linspace(0, 1 / street.centre[1], small[1]).clip(0, 1)[:, None, None] ** 0.8
    cover = _smooth_noise(random, small, (4, 10)) + 0.5 * _smooth_noise(random, small, (9, 28))
    opacity = (0.6 * (cover - 1 + 1.4 * random.uniform(0, 1))).clip(0, 0.8)[:, :, None]
    clouds = _mix(street.horizon, (250, 248, 245), random.uniform(0, 0.8))
    pixels = _mix(_mix(street.zenith, street.horizon, share), clouds, opacity).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def _seen(street: Street, shape: Shape, size: tuple[int, int]) -> tuple[list[tuple[float, float]], tuple[int, ...]]:
    """Return a shape's corners on a picture, in pixels, and its colour under the haze, with its opacity."""
    focal, left, top = street.focal * size[0], street.centre[0] * size[0], street.centre[1] * size[1]
    points = [(left + focal * x / z, top + focal * (street.eye - y) / z) for x, y, z in shape.corners]
    clear = math.exp(-shape.corners[0][2] / street.haze)
    own, veil = clear * shape.light, 1 - clear
    color = (own * paint + veil * far for paint, far in zip(shape.color, street.horizon, strict=True))
    return points, (*(int(min(255, max(0, channel))) for channel in color), int(255 * shape.opacity))


_GRAIN = np.array([0.008, *(kind.grain for kind in KINDS.values())], np.float32)


def _photograph(picture: Image.Image, mask: NDArray[np.uint8], random: Random) -> NDArray[np.uint8]:
    """Add the grain of surfaces, light that varies over the picture, a tint, blur and sensor noise."""
    size = picture.size
    grain = random.standard_normal(mask.shape, dtype=np.float32)
    grain *= _GRAIN[mask] * np.float32(random.uniform(0.6, 1.4))
    # Stains on walls and roads, larger than the grain, and light that falls off to one side.
    grain += 0.035 * _smooth_noise(random, size, (24, 18)) * (mask != 0)
    grain += 0.06 * _smooth_noise(random, size, (1, 1))
    gain = np.float32(random.uniform(0.75, 1.2)) * random.normal(1, 0.05, 3).astype(np.float32)
    pixels = np.asarray(picture) * (1 + grain[:, :, None]) * gain + np.float32(random.uniform(-10, 16))
    soft = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(
        ImageFilter.BoxBlur(random.uniform(0.2, 0.7) * size[0] / 160)
    )
    noise = random.standard_normal((*mask.shape, 3), dtype=np.float32) * np.float32(random.uniform(1.5, 6))
    noise += np.asarray(soft)
    return noise.clip(0, 255).astype(np.uint8)
