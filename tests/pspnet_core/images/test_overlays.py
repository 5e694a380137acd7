"""Overlays blend the right colour in, and contact sheets hold every picture and the legend."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pspnet_core.images.classes import CAMVID
from pspnet_core.images.masks import Ids
from pspnet_core.images.overlays import Row, contact_sheet, overlay

COLORS = ((200, 0, 0), (0, 100, 50))


def test_overlay_blends_and_leaves_the_ignored_alone() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    blended = overlay(image, np.array([[0, 1, 255]]), COLORS, alpha=0.5)
    assert blended.dtype == np.uint8
    assert blended.tolist() == [[[150, 50, 50], [50, 100, 75], [100, 100, 100]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_overlay_takes_any_integer_mask(dtype: type) -> None:
    mask: Ids = np.array([[0, 1]], dtype)
    assert overlay(np.zeros((1, 2, 3), np.uint8), mask, COLORS, alpha=1).tolist() == [
        [list(COLORS[0]), list(COLORS[1])]
    ]


@pytest.mark.parametrize(("width", "alpha", "part"), [(2, -0.1, "alpha"), (2, 1.1, "alpha"), (3, 0.5, "mask of shape")])
def test_impossible_overlays_are_refused(width: int, alpha: float, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, width), np.uint8), COLORS, alpha)


def test_sheet_holds_every_pair_and_the_legend() -> None:
    rows = [draw_scene(seed) for seed in range(3)]
    sheet = contact_sheet(rows, SCENE_CLASSES, columns=2, tile_width=80)
    assert sheet.mode == "RGB"
    # Two lines of two pairs of 80 x 60, with gaps of 8; below them the legend.
    assert sheet.width == 2 * (160 + 8) + 8
    assert sheet.height > 2 * 60 + 3 * 8
    pixels = np.asarray(sheet)
    assert (pixels[8:68, 8:168] != 255).any()
    assert (pixels[76:136, 176:336] == 255).all(), "the place of the fourth pair is empty"
    legend = pixels[144:].reshape(-1, 3).tolist()
    assert all(list(color) in legend for color in SCENE_CLASSES.colors)


def test_legend_shows_the_classes_that_occur_in_any_mask() -> None:
    image, road, fence = np.zeros((10, 10, 3), np.uint8), np.full((10, 10), 3, np.uint8), np.full((10, 10), 7, np.uint8)
    road[0] = CAMVID.ignore
    legend = np.asarray(contact_sheet([(image, road, fence)], CAMVID, columns=1, tile_width=300))[316:]
    found = {tuple(color) for color in legend.reshape(-1, 3).tolist()}
    assert {CAMVID.colors[3], CAMVID.colors[7]} < found
    assert CAMVID.colors[1] not in found


def test_pictures_of_any_size_and_a_narrow_sheet() -> None:
    rows = [draw_scene(0, width=64, height=16), draw_scene(1, width=16, height=64)]
    sheet = contact_sheet(rows, SCENE_CLASSES, columns=1, tile_width=40)
    assert sheet.width == 96
    assert sheet.height > 10 + 160


def test_captions_stand_above_the_pairs_and_move_nothing_else() -> None:
    rows = [draw_scene(seed) for seed in range(2)]
    plain = np.asarray(contact_sheet(rows, SCENE_CLASSES, columns=1, tile_width=80))
    captioned = np.asarray(contact_sheet(rows, SCENE_CLASSES, columns=1, tile_width=80, captions=["one", "two"]))
    strip = (captioned.shape[0] - plain.shape[0]) // 2
    assert captioned.shape[1] == plain.shape[1]
    np.testing.assert_array_equal(captioned[8 + strip : 68 + strip], plain[8:68])
    np.testing.assert_array_equal(captioned[76 + 2 * strip :], plain[76:])
    for top in (8, 76 + strip):
        assert (captioned[top : top + strip] < 128).any(), "letters"
    assert not np.array_equal(captioned[8 : 8 + strip], captioned[76 + strip : 76 + 2 * strip])


def test_two_masks_stand_beside_their_image() -> None:
    image, target = draw_scene(0)
    prediction = np.full_like(target, 2)
    one = np.asarray(contact_sheet([(image, target)], SCENE_CLASSES, columns=1, tile_width=80))
    other = np.asarray(contact_sheet([(image, prediction)], SCENE_CLASSES, columns=1, tile_width=80))
    both = np.asarray(contact_sheet([(image, target, prediction)], SCENE_CLASSES, columns=1, tile_width=80))
    assert both.shape[1] == 3 * 80 + 2 * 8
    np.testing.assert_array_equal(both[8:68, 8:168], one[8:68, 8:168])
    np.testing.assert_array_equal(both[8:68, 168:248], other[8:68, 88:168])


IMAGE, MASK = draw_scene(0)


@pytest.mark.parametrize(
    ("rows", "captions", "part"),
    [
        ([(IMAGE, MASK), (IMAGE, MASK)], ["one"], "argument 2"),
        ([(IMAGE, MASK), (IMAGE, MASK, MASK)], [], r"rows of \[2, 3\] pictures"),
        ([], [], "0 rows"),
    ],
)
def test_impossible_sheets_are_refused(rows: list[Row], captions: list[str], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        contact_sheet(rows, SCENE_CLASSES, captions=captions)
