"""Overlays blend the right colour in, and contact sheets hold every picture and the legend."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pspnet_core.images.classes import CAMVID
from pspnet_core.images.masks import Ids
from pspnet_core.images.overlays import contact_sheet, overlay

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


def test_overlay_of_nothing_is_the_image() -> None:
    image, mask = draw_scene(1)
    np.testing.assert_array_equal(overlay(image, mask, SCENE_CLASSES.colors, alpha=0), image)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        overlay(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), COLORS, alpha)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="mask of shape"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), np.uint8), COLORS)


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


def test_legend_shows_the_classes_that_occur() -> None:
    image, mask = np.zeros((10, 10, 3), np.uint8), np.full((10, 10), 3, np.uint8)
    mask[0] = CAMVID.ignore
    legend = np.asarray(contact_sheet([(image, mask)], CAMVID, columns=1, tile_width=300))[316:]
    found = {tuple(color) for color in legend.reshape(-1, 3).tolist()}
    assert CAMVID.colors[3] in found
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


def test_as_many_captions_as_rows() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        contact_sheet([draw_scene(0), draw_scene(1)], SCENE_CLASSES, captions=["one"])


def test_two_masks_stand_beside_their_image() -> None:
    image, target = draw_scene(0)
    prediction = np.full_like(target, 2)
    one = np.asarray(contact_sheet([(image, target)], SCENE_CLASSES, columns=1, tile_width=80))
    other = np.asarray(contact_sheet([(image, prediction)], SCENE_CLASSES, columns=1, tile_width=80))
    both = np.asarray(contact_sheet([(image, target, prediction)], SCENE_CLASSES, columns=1, tile_width=80))
    assert both.shape[1] == 3 * 80 + 2 * 8
    np.testing.assert_array_equal(both[8:68, 8:168], one[8:68, 8:168])
    np.testing.assert_array_equal(both[8:68, 168:248], other[8:68, 88:168])


def test_the_legend_holds_the_classes_of_every_mask() -> None:
    image, blank = np.zeros((10, 10, 3), np.uint8), np.full((10, 10), CAMVID.ignore, np.uint8)
    sheet = contact_sheet([(image, blank, np.full((10, 10), 5, np.uint8))], CAMVID, columns=1, tile_width=100)
    legend = np.asarray(sheet)[116:]
    assert CAMVID.colors[5] in {tuple(color) for color in legend.reshape(-1, 3).tolist()}


def test_rows_of_unlike_lengths_are_refused() -> None:
    image, mask = draw_scene(0)
    with pytest.raises(ValueError, match=r"rows of \[2, 3\] pictures"):
        contact_sheet([(image, mask), (image, mask, mask)], SCENE_CLASSES)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        contact_sheet([], SCENE_CLASSES)
