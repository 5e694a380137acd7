"""Trees, cars and people of a scene."""

import math
from collections.abc import Sequence

from pipelines.demo.colours import LEAVES, SKINS, Random, Rgb, jitter, mix, pick, scaled, vivid
from pipelines.demo.street import CAR, PERSON, SCALE, TREE, Point, Street, Thing, standing


def place_things(street: Street) -> list[Thing]:
    """Throw the dice for everything that stands on the ground."""
    random = street.random
    things: list[Thing] = []
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


def _tree(street: Street, x: float, z: float) -> Thing:
    random, camera, weather, canvas = street.random, street.camera, street.weather, street.canvas
    trunk, crown = random.uniform(1.6, 3.2), random.uniform(1.2, 3.2)
    leaves = jitter(random, pick(random, LEAVES), 14)
    bark = jitter(random, (84, 68, 54), 12)
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
        canvas.polygon(stem, weather.seen(bark, z), TREE)
        for dx, dy, radius, tone in blobs:
            # Lit from above and from the side of the sun.
            light = tone * (1 - 0.25 * dy + 0.2 * dx * weather.sun)
            centre = (middle[0] + dx * size * slender, middle[1] + dy * size)
            canvas.ellipse(centre, radius * size * slender, radius * size, weather.seen(leaves, z, light), TREE)
        # Single leaves are seen on a near tree only.
        fleck = size * 0.045
        for dx, dy, tone in flecks if fleck > 0.5 else ():
            if dx * dx + dy * dy < 0.7:
                spot = (middle[0] + dx * size * slender, middle[1] + dy * size)
                canvas.spot(spot, fleck, fleck, weather.seen(leaves, z, tone))

    return Thing(x=x, z=z, radius=crown, paint=paint)


def _car(street: Street, x: float, z: float) -> Thing:
    """Place a car that drives or parks along the street: seen from behind or from the front."""
    random, weather, canvas = street.random, street.weather, street.canvas
    width, height, length = random.uniform(1.6, 1.95), random.uniform(1.35, 1.95), random.uniform(3.4, 4.6)
    body = vivid(random)
    glass = mix((34, 38, 44), weather.horizon, random.uniform(0.1, 0.5))
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
            canvas.polygon(tyre, weather.seen((24, 24, 26), z), CAR)
        side = street.quad([(flank, 0.25, z), (flank, waist, z), (flank, waist, back), (flank, 0.25, back)])
        canvas.polygon(side, weather.seen(body, z, 0.75), CAR)
        roof_edge = x + (flank - x) * taper
        cabin = street.quad(
            [
                (flank, waist, z + 0.2),
                (roof_edge, height, z + 0.7),
                (roof_edge, height, back - 1.4),
                (flank, waist, back - 0.8),
            ]
        )
        canvas.polygon(cabin, weather.seen(glass, z, 0.9), CAR)
        for sx in (x - half + 0.05, x + half - 0.3):
            canvas.polygon(standing(street, sx, sx + 0.25, 0, 0.4, z), weather.seen((22, 22, 24), z), CAR)
        roof = street.quad(
            [
                (x - half, waist, z),
                (x - half * taper, height, z + 0.4),
                (x + half * taper, height, z + 0.4),
                (x + half, waist, z),
            ]
        )
        canvas.polygon(roof, weather.seen(body, z, 1.08), CAR)
        inner = street.quad(
            [
                (x - half * 0.86, waist + 0.06, z),
                (x - half * taper * 0.86, height - 0.12, z + 0.35),
                (x + half * taper * 0.86, height - 0.12, z + 0.35),
                (x + half * 0.86, waist + 0.06, z),
            ]
        )
        canvas.detail(inner, weather.seen(glass, z))
        canvas.polygon(standing(street, x - half, x + half, 0.22, waist, z), weather.seen(body, z), CAR)
        canvas.detail(standing(street, x - half, x + half, 0.22, 0.42, z), weather.seen(scaled(body, 0.55), z))
        lamp = (250, 244, 214) if oncoming else (206, 40, 34)
        for sx in (x - half + 0.06, x + half - 0.36):
            canvas.detail(standing(street, sx, sx + 0.3, waist - 0.32, waist - 0.12, z), weather.seen(lamp, z))
        canvas.detail(standing(street, x - 0.25, x + 0.25, 0.45, 0.57, z), weather.seen((214, 210, 190), z))

    return Thing(x=x, z=z, radius=width * 0.62, paint=paint)


def _crossing_car(street: Street, z: float) -> Thing:
    """Place a car that crosses the street: seen from the side."""
    random, weather, canvas = street.random, street.weather, street.canvas
    length, height = random.uniform(3.6, 4.8), random.uniform(1.35, 1.8)
    x = random.uniform(-street.half_road, street.half_road)
    body, facing = vivid(random), random.choice((-1.0, 1.0))
    glass = mix((34, 38, 44), weather.horizon, random.uniform(0.1, 0.5))

    def outline(points: Sequence[Point]) -> list[Point]:
        """Project (along, up) shares of the length and the height."""
        return [street.camera.project(x + facing * u * length, v * height, z) for u, v in points]

    def paint() -> None:
        hull = outline([(-0.5, 0.18), (-0.5, 0.55), (-0.3, 0.62), (0.28, 0.62), (0.5, 0.5), (0.5, 0.18)])
        cabin = outline([(-0.42, 0.58), (-0.3, 1), (0.08, 1), (0.28, 0.58)])
        canvas.polygon(cabin, weather.seen(body, z, 1.08), CAR)
        canvas.detail(outline([(-0.36, 0.62), (-0.27, 0.93), (-0.1, 0.93), (-0.1, 0.62)]), weather.seen(glass, z))
        canvas.detail(outline([(-0.06, 0.62), (-0.06, 0.93), (0.06, 0.93), (0.22, 0.62)]), weather.seen(glass, z))
        canvas.polygon(hull, weather.seen(body, z), CAR)
        canvas.detail(
            outline([(-0.5, 0.18), (-0.5, 0.28), (0.5, 0.28), (0.5, 0.18)]),
            weather.seen(scaled(body, 0.6), z),
        )
        for u in (-0.3, 0.3):
            (centre,), radius = outline([(u, 0.2)]), street.camera.pixels(0.33, z)
            canvas.ellipse(centre, radius, radius, weather.seen((24, 24, 26), z), CAR)
            canvas.spot(centre, radius * 0.45, radius * 0.45, weather.seen((150, 150, 152), z))

    return Thing(x=x, z=z, radius=length / 2, flatness=0.09, paint=paint)


def _person(street: Street, x: float, z: float) -> Thing:
    random, camera, weather, canvas = street.random, street.camera, street.weather, street.canvas
    tall = random.uniform(1.15, 1.9)
    coat, trousers = vivid(random), vivid(random)
    skin, hair = pick(random, SKINS), scaled((120, 96, 66), random.uniform(0.2, 1.4))
    stride, swing = random.uniform(0.02, 0.2), random.uniform(-0.12, 0.12)
    skirt = random.random() < 0.25

    def paint() -> None:
        def limb(x0: float, y0: float, x1: float, y1: float, thick: float, color: Rgb, light: float) -> None:
            start, end = (
                camera.project(x + x0 * tall, y0 * tall, z),
                camera.project(x + x1 * tall, y1 * tall, z),
            )
            half = max(0.5 * SCALE, camera.pixels(thick * tall, z))
            band = [
                (start[0] - half, start[1]),
                (end[0] - half, end[1]),
                (end[0] + half, end[1]),
                (start[0] + half, start[1]),
            ]
            canvas.polygon(band, weather.seen(color, z, light), PERSON)

        for foot, light in ((-stride, 0.85), (stride, 1.0)):
            limb(foot, 0, 0.03 * math.copysign(1, foot), 0.5, 0.04, trousers, light)
        if skirt:
            limb(0, 0.3, 0, 0.52, 0.085, trousers, 1.0)
        limb(-0.11 - swing, 0.45, -0.1, 0.8, 0.028, coat, 0.8)
        limb(0, 0.46, 0, 0.82, 0.095, coat, 1.0)
        limb(0.11 + swing, 0.45, 0.1, 0.8, 0.028, coat, 0.9)
        head = camera.project(x, 0.92 * tall, z)
        radius = max(0.6 * SCALE, camera.pixels(0.075 * tall, z))
        canvas.ellipse(head, radius * 0.85, radius, weather.seen(skin, z), PERSON)
        canvas.spot((head[0], head[1] - radius * 0.5), radius * 0.85, radius * 0.55, weather.seen(hair, z))

    return Thing(x=x, z=z, radius=tall * 0.22, paint=paint)
