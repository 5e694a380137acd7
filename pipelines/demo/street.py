"""What every painter of a scene needs: the canvas, the camera, the light and the street itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipelines.demo.colours import Random, Rgb, jitter, mix
from pspnet_core.images.classes import Color

SKY, BUILDING, TREE, ROAD, CAR, PERSON = range(6)


# Scenes are drawn this many times larger and reduced, which smooths the edges of the picture.
SCALE = 2


# Nothing is drawn nearer than this, where the projection grows without bound.
NEAREST = 1.5


FARTHEST = 160.0


Point = tuple[float, float]


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


def _weather(random: Random) -> _Weather:
    kind = int(random.choice(len(_SKIES), p=_SKY_SHARES))
    zenith, horizon = (jitter(random, color, 16) for color in _SKIES[kind])
    sunny = kind in (0, 1, 4) and random.random() < 0.8
    return _Weather(
        zenith=zenith,
        horizon=horizon,
        cloud=mix(horizon, (250, 248, 245), random.uniform(0.0, 0.8)),
        clouds=random.uniform(0.0, 1.0),
        haze=random.uniform(60, 120) if random.random() < 0.15 else random.uniform(150, 500),
        sun=float(random.choice((-1.0, 1.0))) if sunny else 0.0,
        shadow=random.uniform(0.45, 0.65) if sunny else random.uniform(0.75, 0.9),
        night=kind == _DUSK,
    )


class Canvas:
    """A picture and its mask, painted together."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width * SCALE, height * SCALE)
        self.mask = Image.new("L", self.size, SKY)
        self._mask_draw = ImageDraw.Draw(self.mask)
        self.picture = Image.new("RGB", self.size)
        self._draw = ImageDraw.Draw(self.picture)

    def polygon(self, points: Sequence[Point], color: Color, label: int) -> None:
        self._draw.polygon(points, fill=color)
        self._mask_draw.polygon(points, fill=label)

    def ellipse(self, centre: Point, rx: float, ry: float, color: Color, label: int) -> None:
        box = around(centre, rx, ry)
        self._draw.ellipse(box, fill=color)
        self._mask_draw.ellipse(box, fill=label)

    def detail(self, points: Sequence[Point], color: Color) -> None:
        """Paint on the picture only: what is here already keeps its class."""
        self._draw.polygon(points, fill=color)

    def spot(self, centre: Point, rx: float, ry: float, color: Color) -> None:
        """Paint an ellipse on the picture only."""
        self._draw.ellipse(around(centre, rx, ry), fill=color)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that stands on the ground, painted in the order of depth.

    Its shadow is an ellipse: half its width, and half its height as a share of that.
    """

    x: float
    z: float
    radius: float
    flatness: float = 0.22
    paint: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Street:
    """What every painter needs: where to paint, how it projects, the light and the dice."""

    canvas: Canvas
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


def lay_out(random: Random, canvas: Canvas) -> Street:
    width, height = canvas.size
    half_road = random.uniform(3.5, 6.5)
    camera = _Camera(
        focal=width * random.uniform(0.7, 1.0),
        centre=(width * random.uniform(0.34, 0.66), height * random.uniform(0.4, 0.55)),
        height=random.uniform(1.5, 2.6),
    )
    return Street(
        canvas=canvas,
        camera=camera,
        weather=_weather(random),
        random=random,
        half_road=half_road,
        half_street=half_road + random.uniform(2.0, 5.0),
    )


def standing(street: Street, x0: float, x1: float, y0: float, y1: float, z: float) -> list[Point]:
    """Project a rectangle that faces the camera."""
    return street.quad([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)])


def box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x0, y1), (x1, y1), (x1, y0)]


def around(centre: Point, rx: float, ry: float) -> tuple[float, float, float, float]:
    return centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry
