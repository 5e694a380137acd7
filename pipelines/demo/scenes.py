"""Procedural street scenes with exact masks, for the demo and the tests: no data set needed.

A scene is a street seen through a pinhole camera: rows of houses with windows, trees, cars and people
at their own depths, under a random sky. Colours, light, haze, shadows and noise are drawn at random for
each scene, so that colour alone does not give the class away: a sky may be as grey as a wall, a car as
green as a tree, and autumn trees are brown.

Shapes: ``H W`` pixels. World coordinates are in metres: ``x`` to the right and ``y`` up from the point
of the road below the camera, ``z`` ahead.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pipelines.demo.backdrop import cast_shadows, paint_ground, paint_sky, paint_skyline
from pipelines.demo.colours import Random, smooth_noise
from pipelines.demo.houses import paint_houses
from pipelines.demo.street import SCALE, SKY, Canvas, lay_out
from pipelines.demo.things import place_things
from pspnet_core.images.classes import ClassTable

SCENE_CLASSES = ClassTable(
    names=("Sky", "Building", "Tree", "Road", "Car", "Person"),
    colors=((70, 130, 180), (128, 64, 64), (107, 142, 35), (128, 64, 128), (0, 0, 160), (220, 20, 60)),
)
"""The classes of a scene; Road is all of the ground, pavements included. No pixel is unlabelled."""


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
    street = lay_out(random, Canvas(width, height))
    paint_sky(street)
    paint_skyline(street)
    paint_ground(street)
    things = place_things(street)
    cast_shadows(street, things)
    for side in (-1.0, 1.0):
        paint_houses(street, side)
    for thing in sorted(things, key=lambda thing: -thing.z):
        thing.paint()
    mask = np.array(street.canvas.mask)[::SCALE, ::SCALE].copy()
    return _photograph(street.canvas.picture.reduce(SCALE), mask, random), mask


# How strong the grain of each class is, as a share of its brightness; leaves are the roughest.
_GRAIN = np.array([0.008, 0.035, 0.11, 0.05, 0.02, 0.04], np.float32)


def _photograph(picture: Image.Image, mask: NDArray[np.uint8], random: Random) -> NDArray[np.uint8]:
    """Add the grain of surfaces, light that varies over the picture, a tint, blur and sensor noise."""
    size = picture.size
    grain = random.standard_normal(mask.shape, dtype=np.float32)
    grain *= _GRAIN[mask] * np.float32(random.uniform(0.6, 1.4))
    # Stains on walls and roads, larger than the grain, and light that falls off to one side.
    grain += 0.035 * smooth_noise(random, size, (24, 18)) * (mask != SKY)
    grain += 0.06 * smooth_noise(random, size, (1, 1))
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
