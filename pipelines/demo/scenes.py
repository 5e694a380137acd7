"""Procedural street scenes with exact masks, for the demo and the tests: no data set needed.

A scene is a street seen through a pinhole camera: rows of houses with windows, trees, cars and people
at their own depths, under a random sky. Colours, light, haze, shadows and noise are drawn at random for
each scene, so that colour alone does not give the class away: a sky may be as grey as a wall, a car as
green as a tree, and autumn trees are brown.

Shapes: ``H W`` pixels. World coordinates are in metres: ``x`` to the right and ``y`` up from the point
of the road below the camera, ``z`` ahead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pspnet_core.images.classes import ClassTable, Color

SCENE_CLASSES = ClassTable(
    names=("Sky", "Building", "Tree", "Road", "Car", "Person"),
    colors=((70, 130, 180), (128, 64, 64), (107, 142, 35), (128, 64, 128), (0, 0, 160), (220, 20, 60)),
)
"""The classes of a scene; Road is all of the ground, pavements included. No pixel is unlabelled."""

_SKY, _BUILDING, _TREE, _ROAD, _CAR, _PERSON = range(6)

# Scenes are drawn this many times larger and reduced, which smooths the edges of the picture.
_SCALE = 2

# Nothing is drawn nearer than this, where the projection grows without bound.
_NEAREST = 1.5
_FARTHEST = 160.0

Point = tuple[float, float]
Rgb = tuple[float, float, float]
Random = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """A pinhole camera that looks along z, level; lengths on the picture in drawn pixels."""

    focal: float
    centre: Point
    height: float

    def project(self, x: float, y: float, z: float) -> Point:
        return (self.centre[0] + self.focal * x / z, self.centre[1] + self.focal * (self.height - y) / z)

    def pixels(self, metres: float, z: float) -> float:
        return self.focal * metres / z


@dataclass(frozen=True, kw_only=True)
class _Weather:
    """The light of a scene. Colours are RGB, 0 to 255."""

    zenith: Rgb
    horizon: Rgb
    cloud: Rgb
    clouds: float
    haze: float
    sun: float
    shadow: float
    night: bool

    def seen(self, color: Rgb, z: float, light: float = 1.0) -> Color:
        """Return a colour under ``light``, as it looks from ``z`` metres away."""
        clear = math.exp(-z / self.haze)
        veil, light = 1 - clear, light * clear
        red = int(color[0] * light + self.horizon[0] * veil)
        green = int(color[1] * light + self.horizon[1] * veil)
        blue = int(color[2] * light + self.horizon[2] * veil)
        return min(255, max(0, red)), min(255, max(0, green)), min(255, max(0, blue))


class _Canvas:
    """A picture and its mask, painted together."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width * _SCALE, height * _SCALE)
        self.mask = Image.new("L", self.size, _SKY)
        self._mask_draw = ImageDraw.Draw(self.mask)
        self.picture = Image.new("RGB", self.size)
        self._draw = ImageDraw.Draw(self.picture)

    def polygon(self, points: Sequence[Point], color: Color, label: int) -> None:
        self._draw.polygon(points, fill=color)
        self._mask_draw.polygon(points, fill=label)

    def ellipse(self, centre: Point, rx: float, ry: float, color: Color, label: int) -> None:
        box = _around(centre, rx, ry)
        self._draw.ellipse(box, fill=color)
        self._mask_draw.ellipse(box, fill=label)

    def detail(self, points: Sequence[Point], color: Color) -> None:
        """Paint on the picture only: what is here already keeps its class."""
        self._draw.polygon(points, fill=color)

    def spot(self, centre: Point, rx: float, ry: float, color: Color) -> None:
        """Paint an ellipse on the picture only."""
        self._draw.ellipse(_around(centre, rx, ry), fill=color)


@dataclass(frozen=True, kw_only=True)
class _Thing:
    """Something that stands on the ground, painted in the order of depth.

    Its shadow is an ellipse: half its width, and half its height as a share of that.
    """

    x: float
    z: float
    radius: float
    flatness: float = 0.22
    paint: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class _Street:
    """What every painter needs: where to paint, how it projects, the light and the dice."""

    canvas: _Canvas
    camera: _Camera
    weather: _Weather
    random: Random
    half_road: float
    half_street: float

    def quad(self, corners: Sequence[tuple[float, float, float]]) -> list[Point]:
        return [self.camera.project(*corner) for corner in corners]

    def flat(self, x0: float, x1: float, z0: float, z1: float) -> list[Point]:
        """Project a rectangle that lies on the ground."""
        return self.quad([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])

    def lit(self, side: float) -> float:
        """Return how much light a wall on one side of the street gets; the sun is on one of them."""
        return 1.0 if self.weather.sun == 0 else 1.0 - 0.22 * side * self.weather.sun


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
    street = _lay_out(random, _Canvas(width, height))
    _paint_sky(street)
    _paint_skyline(street)
    _paint_ground(street)
    things = _place_things(street)
    _cast_shadows(street, things)
    for side in (-1.0, 1.0):
        _paint_houses(street, side)
    for thing in sorted(things, key=lambda thing: -thing.z):
        thing.paint()
    mask = np.array(street.canvas.mask)[::_SCALE, ::_SCALE].copy()
    return _photograph(street.canvas.picture.reduce(_SCALE), mask, random), mask


def _lay_out(random: Random, canvas: _Canvas) -> _Street:
    width, height = canvas.size
    half_road = random.uniform(3.5, 6.5)
    camera = _Camera(
        focal=width * random.uniform(0.7, 1.0),
        centre=(width * random.uniform(0.34, 0.66), height * random.uniform(0.4, 0.55)),
        height=random.uniform(1.5, 2.6),
    )
    return _Street(
        canvas=canvas,
        camera=camera,
        weather=_weather(random),
        random=random,
        half_road=half_road,
        half_street=half_road + random.uniform(2.0, 5.0),
    )


# --- colours and noise ---------------------------------------------------------------------------


# Zenith and horizon of a clear, a pale, an overcast, a rainy, a sunset and a dusk sky.
_SKIES: tuple[tuple[Rgb, Rgb], ...] = (
    ((62, 118, 200), (178, 206, 232)),
    ((130, 168, 208), (214, 222, 226)),
    ((176, 182, 188), (214, 214, 210)),
    ((112, 120, 130), (164, 168, 170)),
    ((110, 108, 152), (238, 178, 124)),
    ((36, 42, 78), (120, 96, 110)),
)
_SKY_SHARES = (0.3, 0.2, 0.2, 0.15, 0.1, 0.05)
_DUSK = 5

# Plaster, brick, concrete, glass; and roofs and doors of any colour come from `_vivid`.
_WALLS: tuple[Rgb, ...] = (
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
_LEAVES: tuple[Rgb, ...] = (
    (58, 96, 44),
    (84, 118, 52),
    (44, 74, 50),
    (70, 104, 44),
    (50, 88, 58),
    (148, 112, 48),
    (136, 74, 44),
    (110, 122, 70),
)
_SKINS: tuple[Rgb, ...] = ((232, 190, 160), (198, 148, 112), (140, 96, 70), (88, 60, 46))


def _weather(random: Random) -> _Weather:
    kind = int(random.choice(len(_SKIES), p=_SKY_SHARES))
    zenith, horizon = (_jitter(random, color, 16) for color in _SKIES[kind])
    sunny = kind in (0, 1, 4) and random.random() < 0.8
    return _Weather(
        zenith=zenith,
        horizon=horizon,
        cloud=_mix(horizon, (250, 248, 245), random.uniform(0.0, 0.8)),
        clouds=random.uniform(0.0, 1.0),
        haze=random.uniform(60, 120) if random.random() < 0.15 else random.uniform(150, 500),
        sun=float(random.choice((-1.0, 1.0))) if sunny else 0.0,
        shadow=random.uniform(0.45, 0.65) if sunny else random.uniform(0.75, 0.9),
        night=kind == _DUSK,
    )


def _jitter(random: Random, color: Rgb, spread: float) -> Rgb:
    """Move a colour: all channels together by ``spread``, and each by a third of it."""
    red, green, blue = (
        channel + shift
        for channel, shift in zip(color, random.normal(0, spread) + random.normal(0, spread / 3, 3), strict=True)
    )
    return red, green, blue


def _mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def _scaled(color: Rgb, factor: float) -> Rgb:
    return color[0] * factor, color[1] * factor, color[2] * factor


def _pick(random: Random, colors: Sequence[Rgb]) -> Rgb:
    return colors[int(random.integers(len(colors)))]


def _vivid(random: Random) -> Rgb:
    """Return any colour, from grey to saturated: of a car or of clothes."""
    grey = random.uniform(25, 225)
    red, green, blue = random.uniform(0, 235, 3)
    return _mix((grey, grey, grey), (red, green, blue), random.uniform(0, 1))


def _noise(random: Random, size: tuple[int, int], cells: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth noise, (height, width) float32 around 0, of about ``cells`` (across, down) waves."""
    coarse = random.standard_normal((cells[1] + 2, cells[0] + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


# --- sky, skyline and ground ---------------------------------------------------------------------


def _paint_sky(street: _Street) -> None:
    weather, size = street.weather, street.canvas.size
    depth = int(street.camera.centre[1]) + 1
    share = np.linspace(0, 1, depth, dtype=np.float32)[:, None] ** 0.8
    ramp = (1 - share) * np.array(weather.zenith, np.float32) + share * np.array(weather.horizon, np.float32)
    column = Image.fromarray(ramp.clip(0, 255).astype(np.uint8)[:, None])
    sky = column.resize((size[0], depth), Image.Resampling.NEAREST)
    if weather.clouds > 0.25:
        # Clouds lie flat: wider than they are high. They are soft, so that a small picture will do.
        small = (size[0] // 4, depth // 4 + 1)
        cover = _noise(street.random, small, (4, 5)) + 0.5 * _noise(street.random, small, (9, 14))
        opacity = ((cover - 1 + 1.4 * weather.clouds) * 150).clip(0, 210).astype(np.uint8)
        veil = Image.fromarray(opacity).resize(sky.size, Image.Resampling.BILINEAR)
        sky.paste(weather.seen(weather.cloud, 0), mask=veil)
    street.canvas.picture.paste(sky)


def _paint_skyline(street: _Street) -> None:
    """Paint the far end of the street: blocks and treetops along the horizon."""
    canvas, random, (_, horizon) = street.canvas, street.random, street.camera.centre
    x = 0.0
    while x < canvas.size[0]:
        width = canvas.size[0] * random.uniform(0.02, 0.09)
        far = random.uniform(100, _FARTHEST)
        if random.random() < 0.55:
            top = horizon - street.camera.pixels(random.uniform(5, 32), far)
            color = street.weather.seen(_jitter(random, _pick(random, _WALLS), 14), far)
            canvas.polygon(_box(x, top, x + width, horizon + 1), color, _BUILDING)
        elif random.random() < 0.7:
            rise = street.camera.pixels(random.uniform(5, 14), far)
            color = street.weather.seen(_jitter(random, _pick(random, _LEAVES), 10), far)
            canvas.ellipse((x + width / 2, horizon), width * 0.7, rise, color, _TREE)
        x += width


def _paint_ground(street: _Street) -> None:
    random, canvas, weather = street.random, street.canvas, street.weather
    grey = random.uniform(60, 130)
    road = _jitter(random, (grey, grey, grey * 1.03), 6)
    paving = _jitter(random, _mix(_pick(random, _WALLS), (grey, grey, grey), 0.55), 14)
    horizon = street.camera.centre[1]
    canvas.polygon(_box(0, horizon, canvas.size[0], canvas.size[1]), weather.seen(paving, _FARTHEST), _ROAD)
    # Bands of depth, far to near, each a little less hazy.
    edges = np.geomspace(_FARTHEST, _NEAREST, 14)
    for far, near in itertools.pairwise(edges):
        band = street.flat(-60, 60, near, far)
        canvas.detail(band, weather.seen(paving, far))
        canvas.detail(street.flat(-street.half_road, street.half_road, near, far), weather.seen(road, far))
    _paint_paving_joints(street, paving)
    _paint_patches(street, road)
    _paint_lines(street)


def _paint_paving_joints(street: _Street, paving: Rgb) -> None:
    kerb = _scaled(paving, street.random.uniform(0.6, 1.4))
    for side in (-street.half_road, street.half_road):
        street.canvas.detail(street.flat(side - 0.12, side + 0.12, _NEAREST, 60), street.weather.seen(kerb, 8))
    step = street.random.uniform(1.0, 2.5)
    joint = _scaled(paving, 0.82)
    for z in np.arange(3.0, 22.0, step):
        for x0, x1 in ((-30.0, -street.half_road), (street.half_road, 30.0)):
            street.canvas.detail(street.flat(x0, x1, z, z + 0.07), street.weather.seen(joint, z))


def _paint_patches(street: _Street, road: Rgb) -> None:
    """Paint mended places and stains, darker or lighter than the road."""
    random = street.random
    for _ in range(int(random.integers(0, 5))):
        x, z = random.uniform(-street.half_road, street.half_road - 1), random.uniform(3, 30)
        patch = street.flat(x, x + random.uniform(0.5, 2), z, z + random.uniform(0.5, 6))
        street.canvas.detail(patch, street.weather.seen(_scaled(road, random.uniform(0.75, 1.2)), z))


def _paint_lines(street: _Street) -> None:
    random, weather, canvas = street.random, street.weather, street.canvas
    worn = random.uniform(0.5, 1.0)
    paint = _scaled((228, 226, 214) if random.random() < 0.75 else (220, 180, 70), worn)
    lanes = 2 if random.random() < 0.6 else 3
    dash, gap = random.uniform(1.5, 4), random.uniform(2, 5)
    for lane in range(1, lanes):
        x = -street.half_road + 2 * street.half_road * lane / lanes
        for z in np.arange(_NEAREST, 70, dash + gap):
            canvas.detail(street.flat(x - 0.08, x + 0.08, z, z + dash), weather.seen(paint, z))
    if random.random() < 0.35:
        z = random.uniform(5, 18)
        for x in np.arange(-street.half_road + 0.3, street.half_road - 0.3, 1.1):
            canvas.detail(street.flat(x, x + 0.55, z, z + 3), weather.seen(paint, z))


def _cast_shadows(street: _Street, things: Sequence[_Thing]) -> None:
    """Darken the ground beside the houses on the sun's side, and under whatever stands on it."""
    canvas, weather, random = street.canvas, street.weather, street.random
    dark = Image.new("L", canvas.size)
    draw = ImageDraw.Draw(dark)
    depth = int(255 * (1 - weather.shadow))
    if weather.sun:
        near = _NEAREST
        while near < 90:
            far = near * random.uniform(1.3, 2.2)
            reach = street.half_street * random.uniform(0.0, 1.5)
            edge = weather.sun * street.half_street
            draw.polygon(street.flat(edge - weather.sun * reach, 3 * edge, near, far), fill=depth)
            near = far
    for thing in things:
        x, y = street.camera.project(thing.x - weather.sun * thing.radius * 0.4, 0, thing.z)
        across = street.camera.pixels(thing.radius * (1.3 if weather.sun else 1.15), thing.z)
        draw.ellipse(_around((x, y), across, thing.flatness * across), fill=min(255, depth + 50))
    # The sky and the skyline are no ground.
    dark.paste(0, (0, 0, canvas.size[0], int(street.camera.centre[1])))
    canvas.picture.paste((0, 0, 0), mask=dark.filter(ImageFilter.BoxBlur(1)))


# --- houses --------------------------------------------------------------------------------------


def _paint_houses(street: _Street, side: float) -> None:
    """Paint one row of houses, far to near, with gaps between some of them."""
    random = street.random
    near = random.uniform(3, 9)
    rows: list[tuple[float, float]] = []
    while near < 90:
        far = near + random.uniform(7, 20)
        if random.random() < 0.84:
            rows.append((near, far))
        near = far + (random.uniform(3, 14) if random.random() < 0.3 else 0.0)
    for near, far in reversed(rows):
        _paint_house(street, side, near, far)


def _paint_house(street: _Street, side: float, near: float, far: float) -> None:
    random, weather = street.random, street.weather
    x = side * (street.half_street + random.uniform(0, 2))
    floors = int(random.integers(1, 8))
    storey = random.uniform(2.8, 3.6)
    top = floors * storey + 0.8
    wall = _jitter(random, _pick(random, _WALLS), 20)
    light = street.lit(side)
    # The gable, which faces the camera and shows above or between the neighbours, then the front.
    gable = street.quad([(x, 0, near), (x, top, near), (x * 6, top, near), (x * 6, 0, near)])
    street.canvas.polygon(gable, weather.seen(wall, near, 0.8), _BUILDING)
    front = street.quad([(x, 0, near), (x, top, near), (x, top, far), (x, 0, far)])
    street.canvas.polygon(front, weather.seen(wall, (near + far) / 2, light), _BUILDING)
    if floors <= 3 and random.random() < 0.7:
        _paint_roof(street, x, top, near, far)
    _paint_courses(street, wall, light, x, storey, floors, near, far)
    _paint_windows(street, light, x, storey, floors, near, far)
    if floors > 1 and random.random() < 0.5:
        _paint_shop(street, x, storey, near, far)


def _paint_roof(street: _Street, x: float, top: float, near: float, far: float) -> None:
    """Paint a pitched roof over the front, ridge along the street."""
    random = street.random
    rise, back = random.uniform(1.5, 3.5), x + math.copysign(3.5, x)
    tiles = _jitter(random, ((120, 70, 56), (84, 84, 92), (98, 88, 70))[int(random.integers(3))], 12)
    gable = street.quad([(x, top, near), (back, top + rise, near), (back * 1.6, top, near)])
    street.canvas.polygon(gable, street.weather.seen(tiles, near, 0.75), _BUILDING)
    slope = street.quad([(x, top, near), (back, top + rise, near), (back, top + rise, far), (x, top, far)])
    street.canvas.polygon(slope, street.weather.seen(tiles, near, street.lit(math.copysign(1, x))), _BUILDING)


def _paint_courses(
    street: _Street, wall: Rgb, light: float, x: float, storey: float, floors: int, near: float, far: float
) -> None:
    """Paint the lines between the storeys."""
    course = _scaled(wall, street.random.uniform(0.75, 1.2))
    if street.camera.pixels(storey, near) < 8 * _SCALE:
        return
    for floor in range(1, floors + 1):
        y = floor * storey + 0.5
        line = street.quad([(x, y, near), (x, y + 0.25, near), (x, y + 0.25, far), (x, y, far)])
        street.canvas.detail(line, street.weather.seen(course, near, light))


def _paint_windows(
    street: _Street, light: float, x: float, storey: float, floors: int, near: float, far: float
) -> None:
    """Paint rows of windows: dark, reflecting the sky, or lit from inside."""
    random, weather = street.random, street.weather
    bay, share = random.uniform(2.2, 4.0), random.uniform(0.4, 0.7)
    sill, head = storey * random.uniform(0.25, 0.4), storey * random.uniform(0.7, 0.9)
    # Windows of less than a pixel or so are left to the noise.
    if street.camera.pixels(head - sill, near) < 2 * _SCALE:
        return
    glass = _mix((40, 46, 54), weather.zenith, random.uniform(0.0, 0.7))
    glow = 0.45 if weather.night else 0.06
    for z in np.arange(near + 0.5, far - bay * share, bay):
        if street.camera.pixels(bay, z) * abs(x) / z < 0.8 * _SCALE:
            break
        for floor in range(floors):
            y0, y1, z1 = floor * storey + sill, floor * storey + head, z + bay * share
            pane = street.quad([(x, y0, z), (x, y1, z), (x, y1, z1), (x, y0, z1)])
            if pane[1][1] < -street.camera.pixels(head - sill, z):
                break
            lit = random.random() < glow
            color = (246, 210, 130) if lit else _scaled(glass, random.uniform(0.7, 1.3))
            street.canvas.detail(pane, weather.seen(color, z, 1.0 if lit else light))


def _paint_shop(street: _Street, x: float, storey: float, near: float, far: float) -> None:
    """Paint a shop window with an awning or a sign above it."""
    random, weather = street.random, street.weather
    z0, z1 = near + 0.6, far - 0.6
    window = street.quad([(x, 0.4, z0), (x, storey * 0.75, z0), (x, storey * 0.75, z1), (x, 0.4, z1)])
    inside = (230, 205, 150) if weather.night else (58, 62, 66)
    street.canvas.detail(window, weather.seen(_jitter(random, inside, 10), near))
    sign = street.quad([(x, storey * 0.78, z0), (x, storey, z0), (x, storey, z1), (x, storey * 0.78, z1)])
    street.canvas.detail(sign, weather.seen(_vivid(random), near, street.lit(math.copysign(1, x))))


# --- trees, cars and people ----------------------------------------------------------------------


def _place_things(street: _Street) -> list[_Thing]:
    """Throw the dice for everything that stands on the ground."""
    random = street.random
    things: list[_Thing] = []
    for _ in range(int(random.integers(1, 9))):
        side = random.choice((-1.0, 1.0))
        x = side * (street.half_road + random.uniform(0.6, street.half_street - street.half_road))
        things.append(_tree(street, x, _depth(random, 7, 70)))
    taken: list[tuple[float, float]] = []
    for _ in range(int(random.integers(1, 6))):
        x, z = random.choice((-0.75, -0.3, 0.3, 0.75)) * street.half_road, _depth(random, 5, 25)
        # Two cars do not stand in one place.
        if all(abs(x - other) > 2 or abs(z - ahead) > 6 for other, ahead in taken):
            things.append(_car(street, x, z))
            taken.append((x, z))
    if random.random() < 0.25:
        things.append(_crossing_car(street, _depth(random, 7, 18)))
    for _ in range(int(random.integers(4, 10))):
        on_road = random.random() < 0.45
        side = random.choice((-1.0, 1.0))
        x = side * (
            random.uniform(0, street.half_road)
            if on_road
            else random.uniform(street.half_road + 0.3, street.half_street - 0.3)
        )
        things.append(_person(street, x, _depth(random, 2.5, 7)))
    return things


def _depth(random: Random, near: float, far: float) -> float:
    """Return a depth; as many things near as far, counted by their size on the picture."""
    return float(math.exp(random.uniform(math.log(near), math.log(far))))


def _tree(street: _Street, x: float, z: float) -> _Thing:
    random, camera, weather, canvas = street.random, street.camera, street.weather, street.canvas
    trunk, crown = random.uniform(1.6, 3.2), random.uniform(1.2, 3.2)
    leaves = _jitter(random, _pick(random, _LEAVES), 14)
    bark = _jitter(random, (84, 68, 54), 12)
    slender = random.uniform(0.7, 1.1)
    # Across, up, radius and tone of each clump of leaves; across, up and tone of each fleck.
    blobs = random.uniform((-0.6, -0.6, 0.4, 0.75), (0.6, 0.6, 0.75, 1.2), (9, 4)).tolist()
    flecks = random.normal((0, 0, 1), (0.5, 0.5, 0.22), (60, 3)).tolist()

    def paint() -> None:
        foot, half = camera.project(x, 0, z), camera.pixels(0.09 * crown + 0.05, z)
        middle = camera.project(x, trunk + crown * 0.8, z)
        size = camera.pixels(crown, z)
        stem = [
            (foot[0] - half, foot[1]),
            (middle[0] - half * 0.7, middle[1]),
            (middle[0] + half * 0.7, middle[1]),
            (foot[0] + half, foot[1]),
        ]
        canvas.polygon(stem, weather.seen(bark, z), _TREE)
        for dx, dy, radius, tone in blobs:
            # Lit from above and from the side of the sun.
            light = tone * (1 - 0.25 * dy + 0.2 * dx * weather.sun)
            centre = (middle[0] + dx * size * slender, middle[1] + dy * size)
            canvas.ellipse(centre, radius * size * slender, radius * size, weather.seen(leaves, z, light), _TREE)
        # Single leaves are seen on a near tree only.
        fleck = size * 0.045
        for dx, dy, tone in flecks if fleck > 0.5 else ():
            if dx * dx + dy * dy < 0.7:
                spot = (middle[0] + dx * size * slender, middle[1] + dy * size)
                canvas.spot(spot, fleck, fleck, weather.seen(leaves, z, tone))

    return _Thing(x=x, z=z, radius=crown, paint=paint)


def _car(street: _Street, x: float, z: float) -> _Thing:
    """Place a car that drives or parks along the street: seen from behind or from the front."""
    random, weather, canvas = street.random, street.weather, street.canvas
    width, height, length = random.uniform(1.6, 1.95), random.uniform(1.35, 1.95), random.uniform(3.4, 4.6)
    body = _vivid(random)
    glass = _mix((34, 38, 44), weather.horizon, random.uniform(0.1, 0.5))
    oncoming = x < 0
    waist = height * random.uniform(0.52, 0.6)
    taper = random.uniform(0.72, 0.9)

    def paint() -> None:
        half, back = width / 2, z + length
        flank = x - half if x > 0 else x + half
        for wheel in (z + 0.6, back - 1.2):
            tyre = street.quad(
                [(flank, 0, wheel), (flank, 0.6, wheel), (flank, 0.6, wheel + 0.6), (flank, 0, wheel + 0.6)]
            )
            canvas.polygon(tyre, weather.seen((24, 24, 26), z), _CAR)
        side = street.quad([(flank, 0.25, z), (flank, waist, z), (flank, waist, back), (flank, 0.25, back)])
        canvas.polygon(side, weather.seen(body, z, 0.75), _CAR)
        roof_edge = x + (flank - x) * taper
        cabin = street.quad(
            [
                (flank, waist, z + 0.2),
                (roof_edge, height, z + 0.7),
                (roof_edge, height, back - 1.4),
                (flank, waist, back - 0.8),
            ]
        )
        canvas.polygon(cabin, weather.seen(glass, z, 0.9), _CAR)
        for sx in (x - half + 0.05, x + half - 0.3):
            canvas.polygon(_standing(street, sx, sx + 0.25, 0, 0.4, z), weather.seen((22, 22, 24), z), _CAR)
        roof = street.quad(
            [
                (x - half, waist, z),
                (x - half * taper, height, z + 0.4),
                (x + half * taper, height, z + 0.4),
                (x + half, waist, z),
            ]
        )
        canvas.polygon(roof, weather.seen(body, z, 1.08), _CAR)
        inner = street.quad(
            [
                (x - half * 0.86, waist + 0.06, z),
                (x - half * taper * 0.86, height - 0.12, z + 0.35),
                (x + half * taper * 0.86, height - 0.12, z + 0.35),
                (x + half * 0.86, waist + 0.06, z),
            ]
        )
        canvas.detail(inner, weather.seen(glass, z))
        canvas.polygon(_standing(street, x - half, x + half, 0.22, waist, z), weather.seen(body, z), _CAR)
        canvas.detail(_standing(street, x - half, x + half, 0.22, 0.42, z), weather.seen(_scaled(body, 0.55), z))
        lamp = (250, 244, 214) if oncoming else (206, 40, 34)
        for sx in (x - half + 0.06, x + half - 0.36):
            canvas.detail(_standing(street, sx, sx + 0.3, waist - 0.32, waist - 0.12, z), weather.seen(lamp, z))
        canvas.detail(_standing(street, x - 0.25, x + 0.25, 0.45, 0.57, z), weather.seen((214, 210, 190), z))

    return _Thing(x=x, z=z, radius=width * 0.62, paint=paint)


def _crossing_car(street: _Street, z: float) -> _Thing:
    """Place a car that crosses the street: seen from the side."""
    random, weather, canvas = street.random, street.weather, street.canvas
    length, height = random.uniform(3.6, 4.8), random.uniform(1.35, 1.8)
    x = random.uniform(-street.half_road, street.half_road)
    body, facing = _vivid(random), random.choice((-1.0, 1.0))
    glass = _mix((34, 38, 44), weather.horizon, random.uniform(0.1, 0.5))

    def outline(points: Sequence[Point]) -> list[Point]:
        """Project (along, up) shares of the length and the height."""
        return [street.camera.project(x + facing * u * length, v * height, z) for u, v in points]

    def paint() -> None:
        hull = outline([(-0.5, 0.18), (-0.5, 0.55), (-0.3, 0.62), (0.28, 0.62), (0.5, 0.5), (0.5, 0.18)])
        cabin = outline([(-0.42, 0.58), (-0.3, 1), (0.08, 1), (0.28, 0.58)])
        canvas.polygon(cabin, weather.seen(body, z, 1.08), _CAR)
        canvas.detail(outline([(-0.36, 0.62), (-0.27, 0.93), (-0.1, 0.93), (-0.1, 0.62)]), weather.seen(glass, z))
        canvas.detail(outline([(-0.06, 0.62), (-0.06, 0.93), (0.06, 0.93), (0.22, 0.62)]), weather.seen(glass, z))
        canvas.polygon(hull, weather.seen(body, z), _CAR)
        canvas.detail(
            outline([(-0.5, 0.18), (-0.5, 0.28), (0.5, 0.28), (0.5, 0.18)]),
            weather.seen(_scaled(body, 0.6), z),
        )
        for u in (-0.3, 0.3):
            (centre,), radius = outline([(u, 0.2)]), street.camera.pixels(0.33, z)
            canvas.ellipse(centre, radius, radius, weather.seen((24, 24, 26), z), _CAR)
            canvas.spot(centre, radius * 0.45, radius * 0.45, weather.seen((150, 150, 152), z))

    return _Thing(x=x, z=z, radius=length / 2, flatness=0.09, paint=paint)


def _person(street: _Street, x: float, z: float) -> _Thing:
    random, camera, weather, canvas = street.random, street.camera, street.weather, street.canvas
    tall = random.uniform(1.15, 1.9)
    coat, trousers = _vivid(random), _vivid(random)
    skin, hair = _pick(random, _SKINS), _scaled((120, 96, 66), random.uniform(0.2, 1.4))
    stride, swing = random.uniform(0.02, 0.2), random.uniform(-0.12, 0.12)
    skirt = random.random() < 0.25

    def paint() -> None:
        def limb(x0: float, y0: float, x1: float, y1: float, thick: float, color: Rgb, light: float) -> None:
            start, end = (
                camera.project(x + x0 * tall, y0 * tall, z),
                camera.project(x + x1 * tall, y1 * tall, z),
            )
            half = max(0.5 * _SCALE, camera.pixels(thick * tall, z))
            band = [
                (start[0] - half, start[1]),
                (end[0] - half, end[1]),
                (end[0] + half, end[1]),
                (start[0] + half, start[1]),
            ]
            canvas.polygon(band, weather.seen(color, z, light), _PERSON)

        for foot, light in ((-stride, 0.85), (stride, 1.0)):
            limb(foot, 0, 0.03 * math.copysign(1, foot), 0.5, 0.04, trousers, light)
        if skirt:
            limb(0, 0.3, 0, 0.52, 0.085, trousers, 1.0)
        limb(-0.11 - swing, 0.45, -0.1, 0.8, 0.028, coat, 0.8)
        limb(0, 0.46, 0, 0.82, 0.095, coat, 1.0)
        limb(0.11 + swing, 0.45, 0.1, 0.8, 0.028, coat, 0.9)
        head = camera.project(x, 0.92 * tall, z)
        radius = max(0.6 * _SCALE, camera.pixels(0.075 * tall, z))
        canvas.ellipse(head, radius * 0.85, radius, weather.seen(skin, z), _PERSON)
        canvas.spot((head[0], head[1] - radius * 0.5), radius * 0.85, radius * 0.55, weather.seen(hair, z))

    return _Thing(x=x, z=z, radius=tall * 0.22, paint=paint)


# --- the photograph ------------------------------------------------------------------------------

# How strong the grain of each class is, as a share of its brightness; leaves are the roughest.
_GRAIN = np.array([0.008, 0.035, 0.11, 0.05, 0.02, 0.04], np.float32)


def _photograph(picture: Image.Image, mask: NDArray[np.uint8], random: Random) -> NDArray[np.uint8]:
    """Add the grain of surfaces, light that varies over the picture, a tint, blur and sensor noise."""
    size = picture.size
    grain = random.standard_normal(mask.shape, dtype=np.float32)
    grain *= _GRAIN[mask] * np.float32(random.uniform(0.6, 1.4))
    # Stains on walls and roads, larger than the grain, and light that falls off to one side.
    grain += 0.035 * _noise(random, size, (24, 18)) * (mask != _SKY)
    grain += 0.06 * _noise(random, size, (1, 1))
    gain = np.float32(random.uniform(0.75, 1.2)) * random.normal(1, 0.05, 3).astype(np.float32)
    grain += 1
    pixels = np.asarray(picture) * grain[:, :, None]
    pixels *= gain
    pixels += random.uniform(-10, 16)
    soft = Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8)).filter(
        ImageFilter.BoxBlur(random.uniform(0.2, 0.7) * size[0] / 160)
    )
    noise = random.standard_normal((*mask.shape, 3), dtype=np.float32) * np.float32(random.uniform(1.5, 6))
    noise += np.asarray(soft)
    return noise.clip(0, 255).astype(np.uint8)


def _standing(street: _Street, x0: float, x1: float, y0: float, y1: float, z: float) -> list[Point]:
    """Project a rectangle that faces the camera."""
    return street.quad([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)])


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x0, y1), (x1, y1), (x1, y0)]


def _around(centre: Point, rx: float, ry: float) -> tuple[float, float, float, float]:
    return centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry
