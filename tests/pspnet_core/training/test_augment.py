"""Augmentation: repeatable, image and mask moved alike, no class id invented, colours changed as they should be."""

from __future__ import annotations

import cmath
import colorsys
import dataclasses
import math
import runpy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.errors import ConfigError
from pspnet_core.training.augment import AugmentConfig, Draw, Mask, apply, augment, distort_colors, plan
from tests.support.paths import ROOT

MEAN = (120, 115, 105)
# Everything at once; and nothing but the crop.
WILD = AugmentConfig(crop=24, photometric=0.5)
STILL = AugmentConfig(crop=24, scale=(1.0, 1.0), rotate=0.0, cat_max_ratio=1.0, blur=0.0, hflip=0.0)
# Movements only, so that colours identify pixels.
MOVED = dataclasses.replace(STILL, scale=(0.5, 2.0), rotate=10.0, hflip=0.5)
SHEET = ROOT / "docs" / "augmentation_sheet.py"
Bytes = NDArray[np.uint8]

SIDES = st.integers(1, 40)
SIZES = st.tuples(SIDES, SIDES)
SEEDS = st.integers(0, 2**32)


def _noise(seed: int, height: int, width: int, dtype: Any = np.uint8, highest: int = 18) -> tuple[Bytes, Mask]:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, random.integers(0, highest + 1, (height, width)).astype(dtype)


def _places(height: int, width: int) -> tuple[Bytes, Mask]:
    """A sample in which colour and id both tell the pixel: red is 5 x, green 5 y, the id is y * W + x."""
    y, x = np.indices((height, width))
    return np.stack([5 * x, 5 * y, 0 * x], axis=-1).astype(np.uint8), (y * width + x).astype(np.uint16)


# --- what holds for every sample and seed ---------------------------------------------------------


@given(
    seed=SEEDS,
    size=SIZES,
    crop=SIDES,
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32]),
    ignore=st.sampled_from([0, 11, 255]),
    rotate=st.sampled_from([10.0, 180.0]),
)
def test_any_sample_gives_a_crop_of_known_ids_again_and_again(
    seed: int, size: tuple[int, int], crop: int, dtype: Any, ignore: int, rotate: float
) -> None:
    image, mask = _noise(seed, *size, dtype)
    before = image.copy(), mask.copy()
    config = dataclasses.replace(WILD, crop=crop, rotate=rotate)
    pixels, ids = augment(image, mask, config, seed, ignore=ignore)
    assert pixels.shape == (crop, crop, 3)
    assert pixels.dtype == np.uint8
    assert ids.shape == (crop, crop)
    assert ids.dtype == dtype
    assert set(ids.ravel()) <= set(mask.ravel()) | {ignore}
    again = augment(image, mask, config, seed, ignore=ignore)
    np.testing.assert_array_equal(pixels, again[0])
    np.testing.assert_array_equal(ids, again[1])
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_seeds_differ() -> None:
    image, mask = _noise(0, 40, 40)
    # Of one length each: NumPy takes (0, 1) and (0, 1, 0) for the same seed.
    seeds = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (7, 2, 5)]
    crops = {augment(image, mask, WILD, seed)[0].tobytes() for seed in seeds}
    assert len(crops) == len(seeds)


def test_the_result_may_be_written_to() -> None:
    image, mask = _noise(0, 24, 20)
    image.flags.writeable = mask.flags.writeable = False
    for config in (WILD, STILL):
        assert all(array.flags.writeable for array in augment(image, mask, config, 0))


def test_sizes_that_differ_are_refused() -> None:
    image, mask = _noise(0, 10, 12)
    with pytest.raises(ValueError, match="mask of shape"):
        augment(image, mask[:, :-1], STILL, 0)


# --- where the pixels go --------------------------------------------------------------------------


@given(seed=SEEDS, size=st.tuples(st.integers(8, 51), st.integers(8, 51)), crop=SIDES)
@settings(max_examples=80)
def test_every_pixel_has_the_colour_of_the_place_that_its_id_names(seed: int, size: tuple[int, int], crop: int) -> None:
    """Half a pixel is the mask's rounding; the rest is that of the colours, 1.5 levels of 5 to the pixel."""
    image, mask = _places(*size)
    pixels, ids = augment(image, mask, dataclasses.replace(MOVED, crop=crop), seed, ignore=65535)
    y, x = np.divmod(ids.astype(int), size[1])
    # Towards the rim the filter has neighbours on one side only, and the ramp bends.
    inner = (ids != 65535) & (y >= 3) & (y < size[0] - 3) & (x >= 3) & (x < size[1] - 3)
    shifts = pixels[inner][:, :2] / 5 - np.stack([x[inner], y[inner]], axis=-1)
    assert (np.abs(shifts) <= 0.5 + 0.3).all()


@given(seed=SEEDS, size=SIZES, crop=SIDES, rotate=st.sampled_from([0.0, 10.0, 180.0]), base=st.sampled_from([1.0, 0.7]))
def test_the_mask_is_the_map_read_pixel_by_pixel(
    seed: int, size: tuple[int, int], crop: int, rotate: float, base: float
) -> None:
    """Each pixel of the crop, walked back to the sample: mirrored, shifted, turned and scaled one after the other."""
    image, mask = _places(*size)
    config = dataclasses.replace(MOVED, crop=crop, rotate=rotate, image_scale=base)
    draw = plan(config, seed)
    _, ids = apply(image, mask, config, draw, ignore=65535)
    height, width = (max(1, round(side * base * draw.scale)) for side in size)
    top, left = (
        math.floor(place * (side - crop + 1)) if side >= crop else -math.ceil((crop - side) / 2)
        for place, side in zip(draw.places[0], (height, width), strict=True)
    )
    for row, column in np.ndindex(crop, crop):
        x = left + (crop - column - 0.5 if draw.hflip else column + 0.5)
        turned = (complex(x, top + row + 0.5) - complex(width, height) / 2) * cmath.exp(1j * math.radians(draw.angle))
        x = (turned.real + width / 2) * size[1] / width
        y = (turned.imag + height / 2) * size[0] / height
        if min(abs(x - round(x)), abs(y - round(y))) < 0.01:
            continue  # Between two pixels either is right.
        inside = 0 <= x < size[1] and 0 <= y < size[0]
        assert ids[row, column] == (mask[int(y), int(x)] if inside else 65535)


@pytest.mark.parametrize("base", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_image_is_that_of_the_whole_sample_resized_turned_and_cut(seed: int, base: float) -> None:
    image, mask = _noise(seed, 120, 161)
    config = dataclasses.replace(MOVED, crop=75, hflip=0.0, image_scale=base)
    draw = plan(config, seed)
    if base * draw.scale >= 1:
        draw = dataclasses.replace(draw, angle=0.0)  # see the next test
    pixels, ids = apply(image, mask, config, draw, mean=MEAN)
    size = round(161 * base * draw.scale), round(120 * base * draw.scale)
    whole = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    whole = whole.rotate(draw.angle, Image.Resampling.BILINEAR, fillcolor=MEAN)
    left, top = (
        math.floor(place * (side - 74)) if side >= 75 else -math.ceil((75 - side) / 2)
        for place, side in zip(draw.places[0][::-1], size, strict=True)
    )
    expected = Image.new("RGB", (75, 75), MEAN)
    expected.paste(whole, (-left, -top))
    # Image.rotate cuts off the corners that turn out of the frame; here they stay.
    y, x = np.indices((75, 75)) + np.array([top, left])[:, None, None]
    seen = (ids != 255) & (y >= 0) & (y < size[1]) & (x >= 0) & (x < size[0])
    difference = np.abs(pixels.astype(int) - np.asarray(expected))[seen]
    assert seen.mean() > 0.1
    # Pillow rounds after each of its two passes, and cuts off the fraction where it turns.
    assert difference.max() <= 2
    assert difference.mean() < 0.6


@pytest.mark.parametrize("seed", range(12))
def test_an_enlarged_and_turned_image_is_read_between_its_own_pixels(seed: int) -> None:
    image, mask = _noise(seed, 60, 71)
    draw = dataclasses.replace(plan(MOVED, seed), scale=1.7, angle=seed - 5.5, hflip=False)
    pixels, _ = apply(image, mask, dataclasses.replace(MOVED, crop=75), draw)
    width, height = round(71 * 1.7), round(60 * 1.7)
    left, top = math.floor(draw.places[0][1] * (width - 74)), math.floor(draw.places[0][0] * (height - 74))
    y, x = np.indices((75, 75)) + 0.5
    points = (x + left + 1j * (y + top) - complex(width, height) / 2) * np.exp(1j * math.radians(draw.angle))
    x, y = (points.real + width / 2) * 71 / width - 0.5, (points.imag + height / 2) * 60 / height - 0.5
    inside = (x > 0) & (y > 0) & (x < 70) & (y < 59)
    column, row = x[inside].astype(int), y[inside].astype(int)
    right, down = (x[inside] - column)[:, None], (y[inside] - row)[:, None]
    above = image[row, column] * (1 - right) + image[row, column + 1] * right
    below = image[row + 1, column] * (1 - right) + image[row + 1, column + 1] * right
    np.testing.assert_allclose(pixels[inside], above * (1 - down) + below * down, atol=0.6)
    assert inside.mean() > 0.5


def test_the_window_may_be_anywhere() -> None:
    """Each pixel's colour is its place, so the crop tells where it was cut; every place comes up."""
    image, mask = _places(26, 27)
    starts = set()
    for seed in range(200):
        pixels, ids = augment(image, mask, STILL, seed)
        left, top = (int(value) // 5 for value in pixels[0, 0, :2])
        starts.add((top, left))
        np.testing.assert_array_equal(pixels, image[top : top + 24, left : left + 24])
        np.testing.assert_array_equal(ids, mask[top : top + 24, left : left + 24])
    assert starts == {(top, left) for top in range(3) for left in range(4)}


def test_a_positive_angle_turns_counter_clockwise() -> None:
    image, mask = _noise(0, 20, 20)
    pixels, ids = apply(image, mask, dataclasses.replace(STILL, crop=20), Draw(angle=90.0))
    np.testing.assert_array_equal(ids, np.rot90(mask))
    np.testing.assert_array_equal(pixels, np.rot90(image))


# --- padding and ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(10, 8), (11, 9), (1, 1), (24, 9), (10, 20), (23, 19), (1, 20)])
def test_a_small_sample_is_centred_on_padding(size: tuple[int, int]) -> None:
    image, mask = _noise(1, *size)
    pixels, ids = augment(image, mask, STILL, 0, mean=MEAN)
    top, left = -(-(24 - size[0]) // 2), -(-(24 - size[1]) // 2)
    expected_pixels = np.full((24, 24, 3), MEAN, np.uint8)
    expected_ids = np.full((24, 24), 255, np.uint8)
    expected_pixels[top : top + size[0], left : left + size[1]] = image
    expected_ids[top : top + size[0], left : left + size[1]] = mask
    np.testing.assert_array_equal(pixels, expected_pixels)
    np.testing.assert_array_equal(ids, expected_ids)


@given(seed=SEEDS, size=SIZES)
def test_padding_is_the_mean_whatever_else_changes(seed: int, size: tuple[int, int]) -> None:
    """Neither blur nor distortion touch it, and it does not bleed into the sample."""
    config = dataclasses.replace(WILD, crop=40, blur=1.0, photometric=1.0)
    image, mask = np.full((*size, 3), 255, np.uint8), np.zeros(size, np.uint8)
    pixels, ids = augment(image, mask, config, seed, mean=MEAN)
    assert (pixels[ids == 255] == MEAN).all()
    # A white sample is white, or grey after the distortion, up to its rim.
    inside = pixels[ids == 0]
    assert len(np.unique(inside, axis=0)) <= 1
    assert (inside.max(-1) == inside.min(-1)).all()


@pytest.mark.parametrize(
    ("mean", "color"), [((123.675, 116.28, 103.53), [124, 116, 104]), ((-3.0, 300.0, 7.4), [0, 255, 7])]
)
def test_padding_has_the_rounded_mean(mean: tuple[float, ...], color: list[int]) -> None:
    image, mask = _noise(0, 10, 10)
    assert augment(image, mask, STILL, 0, mean=mean)[0][0, 0].tolist() == color


def test_a_window_that_turned_out_of_the_sample_is_padding() -> None:
    image, mask = np.zeros((10, 400, 3), np.uint8), np.zeros((10, 400), np.uint8)
    pixels, ids = apply(image, mask, STILL, Draw(angle=90.0, places=((0.5, 0.99),)), mean=MEAN)
    assert (ids == 255).all()
    assert (pixels == MEAN).all()


def test_an_ignore_id_that_needs_16_bits_is_not_clipped() -> None:
    image, mask = _noise(0, 10, 10)
    _, ids = augment(image, mask, STILL, 0, ignore=1000)
    assert ids.dtype == np.uint16
    assert ids[0, 0] == 1000
    assert set(ids.ravel()) == set(mask.ravel()) | {1000}


# --- the category limit -----------------------------------------------------------------------------


def _share(ids: Mask, ignore: int) -> float:
    """Share of the most frequent class among the labelled pixels; 1 where there are none."""
    _, counts = np.unique(ids[ids != ignore], return_counts=True)
    return float(counts.max() / counts.sum()) if counts.size else 1.0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_first_window_that_keeps_the_cap_is_taken(dtype: Any) -> None:
    """Against cutting every window and counting it; without any that keeps the limit the last one is taken."""
    grid = np.random.default_rng(5).choice(np.array([0, 0, 0, 1, 2, 255], dtype), (6, 8))
    mask = grid.repeat(16, 0).repeat(16, 1)
    image, _ = _noise(0, *mask.shape)
    config = dataclasses.replace(MOVED, cat_max_ratio=0.5, crop=26)
    taken = []
    for seed in range(60):
        draw = plan(config, seed)
        assert len(draw.places) == 10
        windows = [apply(image, mask, config, dataclasses.replace(draw, places=(place,))) for place in draw.places]
        kept = [index for index, (_, ids) in enumerate(windows[:-1]) if _share(ids, 255) <= config.cat_max_ratio]
        taken.append(kept[0] if kept else len(windows) - 1)
        pixels, ids = apply(image, mask, config, draw)
        np.testing.assert_array_equal(ids, windows[taken[-1]][1])
        np.testing.assert_array_equal(pixels, windows[taken[-1]][0])
    assert {0, 1, 2, 9} <= set(taken)


def test_a_window_without_labels_is_passed_over() -> None:
    image, mask = _places(60, 50)
    mask = (mask % 5).astype(np.uint8)
    mask[:30] = 255
    draw = Draw(places=((0.0, 0.0), (0.99, 0.0), (0.0, 0.0)))
    _, ids = apply(image, mask, dataclasses.replace(STILL, cat_max_ratio=0.9), draw)
    np.testing.assert_array_equal(ids, mask[36:, :24])


def test_a_cap_of_1_takes_the_first_window() -> None:
    image, mask = _places(60, 50)
    draw = Draw(places=((0.0, 0.0), (0.9, 0.9)))
    pixels, _ = apply(image, np.full_like(mask, 255), STILL, draw)
    np.testing.assert_array_equal(pixels, image[:24, :24])


# --- blur and colours -----------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_blur_spreads_a_point_like_a_gaussian_and_leaves_the_mask(deviation: float) -> None:
    image, mask = np.zeros((24, 24, 3), np.uint8), _noise(0, 24, 24)[1]
    image[12, 10] = 255
    pixels, ids = apply(image, mask, STILL, Draw(blur=deviation))
    y, x = np.indices((24, 24))
    bell = np.exp(-((y - 12) ** 2 + (x - 10) ** 2) / (2 * deviation**2))
    np.testing.assert_allclose(pixels[..., 1], 255 * bell / bell.sum(), atol=2)
    np.testing.assert_array_equal(ids, mask)


# Draws of colour changes alone.
COLORS = st.builds(
    Draw,
    brightness=st.floats(-32, 32),
    contrast=st.floats(0.5, 1.5),
    contrast_last=st.booleans(),
    saturation=st.floats(0.5, 1.5),
    hue=st.floats(-36, 36),
)


def _distorted(color: NDArray[np.float64], draw: Draw) -> NDArray[np.float64]:
    """One colour, step by step, by the standard library."""
    color = np.clip(color + draw.brightness, 0, 255)
    if not draw.contrast_last:
        color = np.clip(color * draw.contrast, 0, 255)
    hue, saturation, value = colorsys.rgb_to_hsv(*(color / 255))
    hue, saturation = (hue + draw.hue / 360) % 1, min(saturation * draw.saturation, 1.0)
    color = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    return np.clip(color * draw.contrast, 0, 255) if draw.contrast_last else color


@given(draw=COLORS, color=st.tuples(*[st.floats(0, 255)] * 3) | st.tuples(*[st.sampled_from([0.0, 7.0, 255.0])] * 3))
@settings(max_examples=100)
def test_distorted_colours_are_those_of_colorsys(draw: Draw, color: tuple[float, float, float]) -> None:
    colors = np.array(color)
    np.testing.assert_allclose(distort_colors(colors[None, None], draw)[0, 0], _distorted(colors, draw), atol=1e-3)


@given(draw=COLORS, seed=SEEDS)
@settings(max_examples=30)
def test_a_distorted_image_has_these_colours_and_its_mask_is_unchanged(draw: Draw, seed: int) -> None:
    """Pillow interpolates between the colours of a grid 16 levels wide: half a level off on average, never a step."""
    image, mask = _noise(seed, 24, 24)
    pixels, ids = apply(image, mask, STILL, draw)
    expected = np.array([_distorted(color, draw) for color in image.reshape(-1, 3).astype(float)])
    difference = np.abs(pixels.reshape(-1, 3) - expected)
    assert difference.mean() < 1
    assert difference.max() < 16
    np.testing.assert_array_equal(ids, mask)


def test_grey_stays_grey() -> None:
    """Between the colours of the grid it may get a little darker, never coloured."""
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    config = dataclasses.replace(STILL, crop=16)
    pixels, _ = apply(grey, np.zeros((16, 16), np.uint8), config, Draw(saturation=1.5, hue=30.0))
    assert np.ptp(pixels, axis=-1).max() <= 1
    np.testing.assert_allclose(pixels.astype(int), grey.astype(int), atol=4)


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"scale": (1.0, 1.5)}, {"scale"}),
        ({"rotate": 0.0}, {"angle"}),
        ({"blur": 0.0}, {"blur"}),
        ({"blur": 1.0}, {"blur"}),
        ({"hflip": 0.0}, {"hflip"}),
        ({"hflip": 1.0}, {"hflip"}),
        ({"photometric": 0.0}, {"brightness", "contrast", "saturation", "hue"}),
        ({"photometric": 1.0}, {"brightness", "contrast", "saturation", "hue"}),
        ({"cat_max_ratio": 1.0}, set()),
        ({"crop": 7, "image_scale": 0.5}, set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # the same in each process
)
def test_no_change_depends_on_whether_another_is_on(change: dict[str, Any], moved: set[str]) -> None:
    found = set()
    for seed in range(40):
        before = dataclasses.asdict(plan(WILD, seed))
        after = dataclasses.asdict(plan(dataclasses.replace(WILD, **change), seed))
        found |= {field for field, value in before.items() if after[field] != value}
    assert found == moved


def test_the_numbers_are_spread_as_they_should_be() -> None:
    config = dataclasses.replace(WILD, photometric=1.0)
    draws = [plan(config, seed) for seed in range(400)]

    def spread(values: list[float], low: float, high: float) -> None:
        """Evenly spread: every tenth of the range has its share, within four standard deviations."""
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        assert counts.sum() == len(values)
        assert np.abs(counts - len(values) / 10).max() < 4 * math.sqrt(0.09 * len(values))

    spread([math.log2(draw.scale) for draw in draws], -1, 1)
    spread([place for draw in draws for pair in draw.places for place in pair], 0, 1)
    ranges = {"angle": (-10, 10), "blur": (0.1, 1), "brightness": (-32, 32), "contrast": (0.5, 1.5)}
    ranges |= {"saturation": (0.5, 1.5), "hue": (-36, 36)}
    for field in (*ranges, "hflip", "contrast_last"):
        changed = [value for draw in draws if (value := getattr(draw, field)) != getattr(Draw(), field)]
        assert 0.4 < len(changed) / len(draws) < 0.6
        if field in ranges:
            spread(changed, *ranges[field])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shares_are_kept(share: float) -> None:
    config = dataclasses.replace(WILD, blur=share, hflip=share, photometric=share)
    draws = [plan(config, seed) for seed in range(400)]
    assert np.mean([draw.blur != 0 for draw in draws]) == pytest.approx(share, abs=0.06)
    assert np.mean([draw.hflip for draw in draws]) == pytest.approx(share, abs=0.06)
    # One distorted sample in 16 has all four colour changes left out.
    assert np.mean([draw.distorts for draw in draws]) == pytest.approx(share * 15 / 16, abs=0.06)


# --- configuration and documentation --------------------------------------------------------------


REFUSED: dict[str, list[Any]] = {
    "crop": [0],
    "image_scale": [0.0, math.inf],
    "scale": [(0.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1.0, math.inf)],
    "rotate": [-1.0, 181.0],
    "cat_max_ratio": [0.0, 1.1, math.nan],
    "blur": [1.1],
    "hflip": [-0.1],
    "photometric": [2.0],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_a_config_that_cannot_work_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: \S") as caught:
        dataclasses.replace(WILD, **{field: value})
    assert caught.value.field == field


def test_the_check_sheet_draws() -> None:
    """As committed, size for size; the letters depend on Pillow's font."""
    script = runpy.run_path(str(SHEET))
    with Image.open(script["OUTPUT"]) as committed:
        assert script["draw_sheet"]().size == committed.size
