"""Sky, skyline, ground and shadows of a scene."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipelines.demo.colours import LEAVES, WALLS, Rgb, jitter, mix, pick, scaled, smooth_noise
from pipelines.demo.street import BUILDING, FARTHEST, NEAREST, ROAD, TREE, Street, Thing, around, box


def paint_sky(street: Street) -> None:
    weather, size = street.weather, street.canvas.size
    depth = int(street.camera.centre[1]) + 1
    share = np.linspace(0, 1, depth, dtype=np.float32)[:, None] ** 0.8
    ramp = (1 - share) * np.array(weather.zenith, np.float32) + share * np.array(weather.horizon, np.float32)
    column = Image.fromarray(ramp.clip(0, 255).astype(np.uint8)[:, None])
    sky = column.resize((size[0], depth), Image.Resampling.NEAREST)
    if weather.clouds > 0.25:
        # Clouds lie flat: wider than they are high. They are soft, so that a small picture will do.
        small = (size[0] // 4, depth // 4 + 1)
        cover = smooth_noise(street.random, small, (4, 5)) + 0.5 * smooth_noise(street.random, small, (9, 14))
        opacity = ((cover - 1 + 1.4 * weather.clouds) * 150).clip(0, 210).astype(np.uint8)
        veil = Image.fromarray(opacity).resize(sky.size, Image.Resampling.BILINEAR)
        sky.paste(weather.seen(weather.cloud, 0), mask=veil)
    street.canvas.picture.paste(sky)


def paint_skyline(street: Street) -> None:
    """Paint the far end of the street: blocks and treetops along the horizon."""
    canvas, random, (_, horizon) = street.canvas, street.random, street.camera.centre
    x = 0.0
    while x < canvas.size[0]:
        width = canvas.size[0] * random.uniform(0.02, 0.09)
        far = random.uniform(100, FARTHEST)
        if random.random() < 0.55:
            top = horizon - street.camera.pixels(random.uniform(5, 32), far)
            color = street.weather.seen(jitter(random, pick(random, WALLS), 14), far)
            canvas.polygon(box(x, top, x + width, horizon + 1), color, BUILDING)
        elif random.random() < 0.7:
            rise = street.camera.pixels(random.uniform(5, 14), far)
            color = street.weather.seen(jitter(random, pick(random, LEAVES), 10), far)
            canvas.ellipse((x + width / 2, horizon), width * 0.7, rise, color, TREE)
        x += width


def paint_ground(street: Street) -> None:
    random, canvas, weather = street.random, street.canvas, street.weather
    grey = random.uniform(60, 130)
    road = jitter(random, (grey, grey, grey * 1.03), 6)
    paving = jitter(random, mix(pick(random, WALLS), (grey, grey, grey), 0.55), 14)
    horizon = street.camera.centre[1]
    canvas.polygon(box(0, horizon, canvas.size[0], canvas.size[1]), weather.seen(paving, FARTHEST), ROAD)
    # Bands of depth, far to near, each a little less hazy.
    edges = np.geomspace(FARTHEST, NEAREST, 14)
    for far, near in itertools.pairwise(edges):
        band = street.flat(-60, 60, near, far)
        canvas.detail(band, weather.seen(paving, far))
        canvas.detail(street.flat(-street.half_road, street.half_road, near, far), weather.seen(road, far))
    _paint_paving_joints(street, paving)
    _paint_patches(street, road)
    _paint_lines(street)


def _paint_paving_joints(street: Street, paving: Rgb) -> None:
    kerb = scaled(paving, street.random.uniform(0.6, 1.4))
    for side in (-street.half_road, street.half_road):
        street.canvas.detail(street.flat(side - 0.12, side + 0.12, NEAREST, 60), street.weather.seen(kerb, 8))
    step = street.random.uniform(1.0, 2.5)
    joint = scaled(paving, 0.82)
    for z in np.arange(3.0, 22.0, step):
        for x0, x1 in ((-30.0, -street.half_road), (street.half_road, 30.0)):
            street.canvas.detail(street.flat(x0, x1, z, z + 0.07), street.weather.seen(joint, z))


def _paint_patches(street: Street, road: Rgb) -> None:
    """Paint mended places and stains, darker or lighter than the road."""
    random = street.random
    for _ in range(int(random.integers(0, 5))):
        x, z = random.uniform(-street.half_road, street.half_road - 1), random.uniform(3, 30)
        patch = street.flat(x, x + random.uniform(0.5, 2), z, z + random.uniform(0.5, 6))
        street.canvas.detail(patch, street.weather.seen(scaled(road, random.uniform(0.75, 1.2)), z))


def _paint_lines(street: Street) -> None:
    random, weather, canvas = street.random, street.weather, street.canvas
    worn = random.uniform(0.5, 1.0)
    paint = scaled((228, 226, 214) if random.random() < 0.75 else (220, 180, 70), worn)
    lanes = 2 if random.random() < 0.6 else 3
    dash, gap = random.uniform(1.5, 4), random.uniform(2, 5)
    for lane in range(1, lanes):
        x = -street.half_road + 2 * street.half_road * lane / lanes
        for z in np.arange(NEAREST, 70, dash + gap):
            canvas.detail(street.flat(x - 0.08, x + 0.08, z, z + dash), weather.seen(paint, z))
    if random.random() < 0.35:
        z = random.uniform(5, 18)
        for x in np.arange(-street.half_road + 0.3, street.half_road - 0.3, 1.1):
            canvas.detail(street.flat(x, x + 0.55, z, z + 3), weather.seen(paint, z))


def cast_shadows(street: Street, things: Sequence[Thing]) -> None:
    """Darken the ground beside the houses on the sun's side, and under whatever stands on it."""
    canvas, weather, random = street.canvas, street.weather, street.random
    dark = Image.new("L", canvas.size)
    draw = ImageDraw.Draw(dark)
    depth = int(255 * (1 - weather.shadow))
    if weather.sun:
        near = NEAREST
        while near < 90:
            far = near * random.uniform(1.3, 2.2)
            reach = street.half_street * random.uniform(0.0, 1.5)
            edge = weather.sun * street.half_street
            draw.polygon(street.flat(edge - weather.sun * reach, 3 * edge, near, far), fill=depth)
            near = far
    for thing in things:
        x, y = street.camera.project(thing.x - weather.sun * thing.radius * 0.4, 0, thing.z)
        across = street.camera.pixels(thing.radius * (1.3 if weather.sun else 1.15), thing.z)
        draw.ellipse(around((x, y), across, thing.flatness * across), fill=min(255, depth + 50))
    # The sky and the skyline are no ground.
    dark.paste(0, (0, 0, canvas.size[0], int(street.camera.centre[1])))
    canvas.picture.paste((0, 0, 0), mask=dark.filter(ImageFilter.BoxBlur(1)))
