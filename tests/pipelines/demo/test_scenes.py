"""Scenes are pure functions of their seed, exact, and colour alone does not give the classes away."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pspnet_core.metrics.confusion import ConfusionMatrix


@cache
def _scene(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene of the default size, once for all tests."""
    return draw_scene(seed)


def test_a_scene_is_a_pure_function_of_its_arguments() -> None:
    image, mask = draw_scene(7, width=96, height=64)
    again, mask_again = draw_scene(7, width=96, height=64)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert not np.array_equal(image, draw_scene(8, width=96, height=64)[0])


@pytest.mark.parametrize(("width", "height"), [(160, 120), (16, 16), (97, 33), (33, 97), (480, 360)])
def test_a_scene_has_the_size_asked_for(width: int, height: int) -> None:
    image, mask = draw_scene(3, width=width, height=height)
    assert image.shape == (height, width, 3)
    assert mask.shape == (height, width)
    assert image.dtype == mask.dtype == np.uint8
    assert mask.max() < len(SCENE_CLASSES)
    assert mask.flags.c_contiguous
    assert image.flags.writeable


def test_every_class_is_common_enough_to_learn() -> None:
    masks = [_scene(seed)[1] for seed in range(40)]
    share = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=6) / 40 / masks[0].size
    seen_in = np.mean([[index in mask for index in range(6)] for mask in masks], axis=0)
    assert (share > 0.005).all(), share
    assert (seen_in > 0.8).all(), seen_in


def test_what_stands_where() -> None:
    masks = np.stack([_scene(seed)[1] for seed in range(40)])
    sky, road = SCENE_CLASSES.names.index("Sky"), SCENE_CLASSES.names.index("Road")
    assert not (masks[:, :20] == road).any()
    assert not (masks[:, -20:] == sky).any()
    assert (masks[:, -10:] == road).mean() > 0.6


def test_the_same_seed_is_the_same_street_at_every_size() -> None:
    _, small = _scene(11)
    _, large = draw_scene(11, width=320, height=240)
    assert (large[::2, ::2] == small).mean() > 0.9


def _color_bins(seeds: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the colour, in 512 bins, and the class of each pixel of some scenes."""
    scenes = [_scene(seed) for seed in seeds]
    colors = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(np.int64) // 32
    return colors @ np.array([64, 8, 1]), np.concatenate([mask.ravel() for _, mask in scenes]).astype(np.int64)


def test_colour_alone_does_not_tell_the_class() -> None:
    """The best guess from a pixel's colour, learned on some scenes, stays poor on others."""
    colors, classes = _color_bins(range(40))
    counts = np.zeros((512, len(SCENE_CLASSES)), np.int64)
    np.add.at(counts, (colors, classes), 1)
    guess = counts.argmax(axis=1)
    held_out_colors, held_out_classes = _color_bins(range(40, 60))
    matrix = ConfusionMatrix(len(SCENE_CLASSES))
    matrix.update(guess[held_out_colors], held_out_classes, SCENE_CLASSES.ignore)
    assert matrix.miou < 0.35


@pytest.mark.parametrize(("seed", "width", "height"), [(-1, 160, 120), (0, 15, 120), (0, 160, 15)])
def test_impossible_scenes_are_refused(seed: int, width: int, height: int) -> None:
    with pytest.raises(ValueError, match="seeds are from 0"):
        draw_scene(seed, width=width, height=height)
