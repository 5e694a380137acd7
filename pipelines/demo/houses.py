"""The houses on both sides of a scene's street."""

import math

import numpy as np

from pipelines.demo.colours import WALLS, Rgb, jitter, mix, pick, scaled, vivid
from pipelines.demo.street import BUILDING, SCALE, Street


def paint_houses(street: Street, side: float) -> None:
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


def _paint_house(street: Street, side: float, near: float, far: float) -> None:
    random, weather = street.random, street.weather
    x = side * (street.half_street + random.uniform(0, 2))
    floors = int(random.integers(1, 8))
    storey = random.uniform(2.8, 3.6)
    top = floors * storey + 0.8
    wall = jitter(random, pick(random, WALLS), 20)
    light = street.lit(side)
    # The gable, which faces the camera and shows above or between the neighbours, then the front.
    gable = street.quad([(x, 0, near), (x, top, near), (x * 6, top, near), (x * 6, 0, near)])
    street.canvas.polygon(gable, weather.seen(wall, near, 0.8), BUILDING)
    front = street.quad([(x, 0, near), (x, top, near), (x, top, far), (x, 0, far)])
    street.canvas.polygon(front, weather.seen(wall, (near + far) / 2, light), BUILDING)
    if floors <= 3 and random.random() < 0.7:
        _paint_roof(street, x, top, near, far)
    _paint_courses(street, wall, light, x, storey, floors, near, far)
    _paint_windows(street, light, x, storey, floors, near, far)
    if floors > 1 and random.random() < 0.5:
        _paint_shop(street, x, storey, near, far)


def _paint_roof(street: Street, x: float, top: float, near: float, far: float) -> None:
    """Paint a pitched roof over the front, ridge along the street."""
    random = street.random
    rise, back = random.uniform(1.5, 3.5), x + math.copysign(3.5, x)
    tiles = jitter(random, ((120, 70, 56), (84, 84, 92), (98, 88, 70))[int(random.integers(3))], 12)
    gable = street.quad([(x, top, near), (back, top + rise, near), (back * 1.6, top, near)])
    street.canvas.polygon(gable, street.weather.seen(tiles, near, 0.75), BUILDING)
    slope = street.quad([(x, top, near), (back, top + rise, near), (back, top + rise, far), (x, top, far)])
    street.canvas.polygon(slope, street.weather.seen(tiles, near, street.lit(math.copysign(1, x))), BUILDING)


def _paint_courses(
    street: Street, wall: Rgb, light: float, x: float, storey: float, floors: int, near: float, far: float
) -> None:
    """Paint the lines between the storeys."""
    course = scaled(wall, street.random.uniform(0.75, 1.2))
    if street.camera.pixels(storey, near) < 8 * SCALE:
        return
    for floor in range(1, floors + 1):
        y = floor * storey + 0.5
        line = street.quad([(x, y, near), (x, y + 0.25, near), (x, y + 0.25, far), (x, y, far)])
        street.canvas.detail(line, street.weather.seen(course, near, light))


def _paint_windows(street: Street, light: float, x: float, storey: float, floors: int, near: float, far: float) -> None:
    """Paint rows of windows: dark, reflecting the sky, or lit from inside."""
    random, weather = street.random, street.weather
    bay, share = random.uniform(2.2, 4.0), random.uniform(0.4, 0.7)
    sill, head = storey * random.uniform(0.25, 0.4), storey * random.uniform(0.7, 0.9)
    # Windows of less than a pixel or so are left to the noise.
    if street.camera.pixels(head - sill, near) < 2 * SCALE:
        return
    glass = mix((40, 46, 54), weather.zenith, random.uniform(0.0, 0.7))
    glow = 0.45 if weather.night else 0.06
    for z in np.arange(near + 0.5, far - bay * share, bay):
        if street.camera.pixels(bay, z) * abs(x) / z < 0.8 * SCALE:
            break
        for floor in range(floors):
            y0, y1, z1 = floor * storey + sill, floor * storey + head, z + bay * share
            pane = street.quad([(x, y0, z), (x, y1, z), (x, y1, z1), (x, y0, z1)])
            if pane[1][1] < -street.camera.pixels(head - sill, z):
                break
            lit = random.random() < glow
            color = (246, 210, 130) if lit else scaled(glass, random.uniform(0.7, 1.3))
            street.canvas.detail(pane, weather.seen(color, z, 1.0 if lit else light))


def _paint_shop(street: Street, x: float, storey: float, near: float, far: float) -> None:
    """Paint a shop window with an awning or a sign above it."""
    random, weather = street.random, street.weather
    z0, z1 = near + 0.6, far - 0.6
    window = street.quad([(x, 0.4, z0), (x, storey * 0.75, z0), (x, storey * 0.75, z1), (x, 0.4, z1)])
    inside = (230, 205, 150) if weather.night else (58, 62, 66)
    street.canvas.detail(window, weather.seen(jitter(random, inside, 10), near))
    sign = street.quad([(x, storey * 0.78, z0), (x, storey, z0), (x, storey, z1), (x, storey * 0.78, z1)])
    street.canvas.detail(sign, weather.seen(vivid(random), near, street.lit(math.copysign(1, x))))
