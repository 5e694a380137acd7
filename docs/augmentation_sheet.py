"""Draws ``docs/images/augmentation.png``: each change of the augmentation on a synthetic street, by eye.

    .venv/bin/python docs/augmentation_sheet.py

No data set is needed. The same versions of the libraries draw the same picture.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pspnet_core.images.overlays import contact_sheet
from pspnet_core.training.augment import AugmentConfig, Draw, apply, augment

OUTPUT = Path(__file__).with_name("images") / "augmentation.png"
SCENE = 16
CONFIG = AugmentConfig(crop=120, photometric=1.0)
ANY = dataclasses.replace(CONFIG, cat_max_ratio=1.0)

# A close look at the foot of the scene is all road; the second place has more to see.
CLOSE = Draw(scale=2.0, places=((0.99, 0.6), (0.4, 0.6)))

# One change each, at the end of its range.
SINGLE: dict[str, tuple[AugmentConfig, Draw]] = {
    "no change, from the middle": (ANY, Draw()),
    "scale 0.5, the rest is padding": (ANY, Draw(scale=0.5)),
    "scale 2": (ANY, Draw(scale=2.0)),
    "rotation 10 degrees": (ANY, Draw(angle=10.0, places=((0.5, 0.99),))),
    "mirror": (ANY, Draw(hflip=True)),
    "blur 1 pixel": (ANY, Draw(blur=1.0)),
    "window without the cap": (ANY, CLOSE),
    "the cap takes the next window": (CONFIG, CLOSE),
    "brightness -32": (ANY, Draw(brightness=-32.0)),
    "brightness +32": (ANY, Draw(brightness=32.0)),
    "contrast 0.5": (ANY, Draw(contrast=0.5)),
    "contrast 1.5": (ANY, Draw(contrast=1.5)),
    "saturation 0.5": (ANY, Draw(saturation=0.5)),
    "saturation 1.5": (ANY, Draw(saturation=1.5)),
    "hue -36 degrees": (ANY, Draw(hue=-36.0)),
    "hue +36 degrees": (ANY, Draw(hue=36.0)),
}
SEEDS = range(7)

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8] | NDArray[np.uint16]]


def draw_sheet() -> Image.Image:
    """The scene, each change alone, and crops as training sees them; every image beside its mask."""
    image, mask = draw_scene(SCENE, width=240, height=180)
    pairs: dict[str, Pair] = {"the sample": (image, mask)}
    pairs |= {title: apply(image, mask, config, draw) for title, (config, draw) in SINGLE.items()}
    pairs |= {f"all of it, seed {seed}": augment(image, mask, CONFIG, seed) for seed in SEEDS}
    return contact_sheet(list(pairs.values()), SCENE_CLASSES, columns=3, tile_width=CONFIG.crop, captions=list(pairs))


if __name__ == "__main__":
    # A palette makes the file a third of the size.
    draw_sheet().quantize(kmeans=2, dither=Image.Dither.NONE).save(OUTPUT, optimize=True)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1000} kB")
