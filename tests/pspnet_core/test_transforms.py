"""Augmentation: repeatable, image and mask moved alike, no class id invented."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.errors import ConfigError
from pspnet_core.transforms import (
    AugmentConfig,
    Mask,
    augment,
    random_blur,
    random_crop,
    random_mirror,
    random_rotate,
    random_scale,
)

MEAN = (120, 115, 105)
WILD = AugmentConfig(crop=(24, 20))
STILL = AugmentConfig(crop=(24, 20), scale=(1.0, 1.0), rotate=0.0, blur=0.0, mirror=0.0, mean=MEAN)
# The colour of each class in the block pictures; far apart, and from the padding.
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 255, 255]], np.uint8)
Bytes = NDArray[np.uint8]


def _noise(seed: int, height: int, width: int, dtype: Any = np.uint8, highest: int = 18) -> tuple[Bytes, Mask]:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, random.integers(0, highest + 1, (height, width)).astype(dtype)


def _blocks(seed: int, height: int = 64, width: int = 96, side: int = 24) -> tuple[Bytes, Mask]:
    """Squares whose colour tells their class."""
    grid = np.random.default_rng(seed).integers(0, len(COLORS), (-(-height // side), -(-width // side)))
    mask: Mask = grid.repeat(side, 0).repeat(side, 1)[:height, :width].astype(np.uint8)
    return COLORS[mask], mask


@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32]),
    ignore=st.sampled_from([0, 11, 255]),
)
@settings(deadline=None, derandomize=True)
def test_any_sample_gives_a_crop_of_known_ids_again_and_again(
    seed: int, size: tuple[int, int], crop: tuple[int, int], dtype: Any, ignore: int
) -> None:
    image, mask = _noise(seed, *size, dtype)
    before = image.copy(), mask.copy()
    config = dataclasses.replace(WILD, crop=crop, ignore=ignore)
    pixels, ids = augment(image, mask, config, seed)
    assert pixels.shape == (*crop, 3)
    assert pixels.dtype == np.uint8
    assert ids.shape == crop
    assert ids.dtype == dtype
    assert set(ids.ravel()) <= set(mask.ravel()) | {ignore}
    again = augment(image, mask, config, seed)
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


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_stay_aligned(seed: int) -> None:
    """Inside a block of the crop's mask, the crop's image has the colour of the block's class, padding included."""
    image, mask = _blocks(seed)
    config = dataclasses.replace(WILD, crop=(60, 72), blur=0.0, mean=MEAN)
    pixels, ids = augment(image, mask, config, seed)
    expected = np.array(MEAN, np.uint8) * np.ones((256, 1), np.uint8)
    expected[: len(COLORS)] = COLORS
    inside = _inside(ids, 2)
    assert inside.mean() > 0.3
    assert len(set(ids[inside])) >= 2
    np.testing.assert_allclose(pixels[inside].astype(int), expected[ids[inside]].astype(int), atol=1)


def _inside(ids: Mask, margin: int) -> NDArray[np.bool_]:
    """Pixels whose neighbours within ``margin`` all have their id."""
    inside = np.zeros(ids.shape, bool)
    inner = np.lib.stride_tricks.sliding_window_view(ids, (2 * margin + 1, 2 * margin + 1))
    inside[margin:-margin, margin:-margin] = (inner.min((2, 3)) == inner.max((2, 3))) & (ids.max() > 0)
    return inside


@pytest.mark.parametrize("change", [{"rotate": 10.0}, {"scale": (0.5, 2.0)}], ids=str)
def test_no_change_shifts_the_mask_against_the_image(change: dict[str, Any]) -> None:
    """The centre of a square moves alike in both: within the mask's rounding each time, exactly on average."""
    mask = np.zeros((60, 60), np.uint8)
    mask[10:22, 30:46] = 1
    image = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    config = dataclasses.replace(STILL, crop=(120, 120), mean=(0, 0, 0), ignore=0, **change)
    centres, shifts = set(), []
    for seed in range(40):
        pixels, ids = augment(image, mask, config, seed)
        centre = _centre(pixels[..., 0].astype(float))
        centres.add(tuple(np.round(centre, 1)))
        shifts.append(_centre(ids.astype(float)) - centre)
    assert len(centres) > 10
    assert np.abs(shifts).max() <= 0.6
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.1


def _centre(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    y, x = np.indices(weight.shape)
    return np.array([(weight * y).sum() / weight.sum(), (weight * x).sum() / weight.sum()])


@pytest.mark.parametrize("size", [(10, 8), (11, 9), (1, 1), (24, 9), (10, 20), (23, 19)])
def test_a_small_sample_is_centred_on_padding(size: tuple[int, int]) -> None:
    image, mask = _noise(1, *size)
    pixels, ids = augment(image, mask, STILL, 0)
    top, left = -(-(24 - size[0]) // 2), -(-(20 - size[1]) // 2)
    expected_pixels = np.full((24, 20, 3), MEAN, np.uint8)
    expected_ids = np.full((24, 20), 255, np.uint8)
    expected_pixels[top : top + size[0], left : left + size[1]] = image
    expected_ids[top : top + size[0], left : left + size[1]] = mask
    np.testing.assert_array_equal(pixels, expected_pixels)
    np.testing.assert_array_equal(ids, expected_ids)


def test_the_window_may_be_anywhere() -> None:
    """Each pixel's colour is its place, so the crop tells where it was cut; every place comes up."""
    y, x = np.indices((26, 23))
    image = np.stack([y, x, y], axis=-1).astype(np.uint8)
    mask = ((y + x) % 7).astype(np.uint8)
    starts = set()
    for seed in range(200):
        pixels, ids = augment(image, mask, STILL, seed)
        top, left = (int(value) for value in pixels[0, 0, :2])
        starts.add((top, left))
        np.testing.assert_array_equal(pixels, image[top : top + 24, left : left + 20])
        np.testing.assert_array_equal(ids, mask[top : top + 24, left : left + 20])
    assert starts == {(top, left) for top in range(3) for left in range(4)}


@pytest.mark.parametrize("seed", range(6))
def test_ids_of_16_bits_survive(seed: int) -> None:
    image, mask = _noise(seed, 30, 30, np.uint16, 65000)
    _, ids = augment(image, mask, dataclasses.replace(WILD, ignore=65535), seed)
    assert ids.dtype == np.uint16
    assert set(ids.ravel()) <= set(mask.ravel()) | {65535}
    assert ids[ids != 65535].max() > 255


def test_an_ignore_id_that_needs_16_bits_is_not_clipped() -> None:
    image, mask = _noise(0, 10, 10)
    _, ids = augment(image, mask, dataclasses.replace(STILL, ignore=1000), 0)
    assert ids.dtype == np.uint16
    assert ids[0, 0] == 1000
    assert set(ids.ravel()) == set(mask.ravel()) | {1000}


@pytest.mark.parametrize("seed", range(4))
def test_one_pixel(seed: int) -> None:
    image, mask = np.full((1, 1, 3), 200, np.uint8), np.full((1, 1), 3, np.uint8)
    pixels, ids = augment(image, mask, dataclasses.replace(WILD, mean=MEAN, blur=0.0), seed)
    assert set(ids.ravel()) == {3, 255}
    np.testing.assert_array_equal(pixels[ids == 3].min(), 200)
    assert (pixels[ids == 255] == MEAN).all()


def _sample(height: int = 50, width: int = 100) -> tuple[Image.Image, Image.Image]:
    image, mask = _noise(0, height, width)
    return Image.fromarray(image), Image.fromarray(mask)


def test_scales_are_spread_evenly_in_the_logarithm() -> None:
    factors = []
    for seed in range(300):
        image, mask = random_scale(_sample(), WILD, np.random.default_rng(seed))
        assert image.size == mask.size
        assert abs(image.size[0] - 2 * image.size[1]) <= 1
        factors.append(image.size[0] / 100)
    assert 0.5 <= min(factors) < 0.55
    assert 1.8 < max(factors) <= 2.0
    below = sum(factor < 1 for factor in factors) / len(factors)
    assert 0.4 < below < 0.6
    quarter = sum(factor < math.sqrt(0.5) for factor in factors) / len(factors)
    assert 0.17 < quarter < 0.33


def test_base_scales_every_sample() -> None:
    config = dataclasses.replace(STILL, base=0.5)
    image, mask = random_scale(_sample(), config, np.random.default_rng(0))
    assert image.size == mask.size == (50, 25)


def test_half_the_samples_are_rotated() -> None:
    sample = _sample()
    same = [random_rotate(sample, WILD, np.random.default_rng(seed))[0] is sample[0] for seed in range(200)]
    assert 70 < sum(same) < 130


def test_blur_touches_the_image_only() -> None:
    sample = _sample()
    image, mask = random_blur(sample, dataclasses.replace(STILL, blur=1.0), np.random.default_rng(0))
    assert mask is sample[1]
    assert np.asarray(image).std() < np.asarray(sample[0]).std()
    assert random_blur(sample, STILL, np.random.default_rng(0)) == sample


def test_mirror_swaps_left_and_right_in_both() -> None:
    sample = _sample()
    image, mask = random_mirror(sample, dataclasses.replace(STILL, mirror=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(sample[0])[:, ::-1])
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(sample[1])[:, ::-1])
    assert random_mirror(sample, STILL, np.random.default_rng(0)) == sample


def test_padding_has_the_rounded_mean() -> None:
    config = dataclasses.replace(STILL, crop=(60, 120), mean=(123.675, 116.28, 103.53))
    image, mask = random_crop(_sample(), config, np.random.default_rng(0))
    assert image.getpixel((0, 0)) == (124, 116, 104)
    assert mask.getpixel((0, 0)) == 255


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"crop": (0, 5)}, "crop"),
        ({"base": 0.0}, "base"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (math.nan, 1.0)}, "scale"),
        ({"rotate": -1.0}, "rotate"),
        ({"rotate": 181.0}, "rotate"),
        ({"blur": 1.1}, "blur"),
        ({"mirror": -0.1}, "mirror"),
        ({"ignore": -1}, "ignore"),
        ({"ignore": 65536}, "ignore"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: \S") as caught:
        dataclasses.replace(WILD, **change)
    assert caught.value.field == field
