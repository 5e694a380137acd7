"""The mask codecs: whatever goes in comes out, in as few runs as there are, and nothing wraps round."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from pspnet_core.images import run_lengths
from pspnet_core.images.classes import CAMVID
from pspnet_core.images.decoding import decode_mask, open_image
from pspnet_core.images.masks import Ids, to_png

DTYPES = [np.dtype(name) for name in ("uint8", "int16", "uint16", "int32", "int64", "uint64")]


@st.composite
def masks(draw: st.DrawFn) -> Ids:
    """Masks of any integer type, of long runs as well as of single pixels."""
    dtype = draw(st.sampled_from(DTYPES))
    highest = min(65535, int(np.iinfo(dtype).max))
    shape = draw(npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))
    elements = st.integers(0, draw(st.sampled_from([1, 3, 255, highest])))
    mask: Ids = draw(npst.arrays(dtype, shape, elements=elements, fill=st.just(0)))
    return mask


@given(masks())
def test_runs_give_the_mask_back(mask: Ids) -> None:
    classes, lengths = run_lengths.encode(mask)
    assert classes.dtype == lengths.dtype == np.int32
    assert lengths.min() >= 1
    assert (classes[1:] != classes[:-1]).all()
    back = run_lengths.decode(classes, lengths, *mask.shape)
    np.testing.assert_array_equal(back, mask)
    assert back.dtype == (np.uint8 if mask.max() < 256 else np.uint16)


@given(masks(), st.integers(1, 8), st.sampled_from([None, CAMVID.palette()]))
def test_png_gives_the_mask_back(mask: Ids, orientation: int, palette: bytes | None) -> None:
    data = to_png(mask, palette, orientation=orientation)
    back = decode_mask(data)
    assert open_image(data).orientation == orientation
    np.testing.assert_array_equal(back, mask)
    assert back.dtype == (np.uint8 if mask.max() < 256 else np.uint16)


def test_a_mask_that_is_no_block_of_memory() -> None:
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-2]
    np.testing.assert_array_equal(run_lengths.decode(*run_lengths.encode(mask), 2, 3), mask)
    np.testing.assert_array_equal(decode_mask(to_png(mask)), mask)


def test_an_empty_mask_has_no_runs() -> None:
    classes, lengths = run_lengths.encode(np.zeros((0, 5), np.uint8))
    assert classes.size == lengths.size == 0
    assert run_lengths.decode(classes, lengths, 0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    "mask",
    [np.zeros((2, 2), np.float32), np.zeros(4, np.uint8), np.array([[-1]]), np.array([[65536]])],
    ids=["float", "flat", "negative", "above 16 bits"],
)
def test_what_is_no_mask_is_refused(mask: Ids) -> None:
    with pytest.raises(ValueError, match=r"mask is|class ids"):
        run_lengths.encode(mask)
    with pytest.raises(ValueError, match=r"mask is|class ids"):
        to_png(mask)


@pytest.mark.parametrize(
    ("classes", "lengths", "part"),
    [
        ([1, 2], [3, 2], "hold 5 pixels, the mask 2 x 3 = 6"),
        ([1, 2], [3, 4], "hold 7 pixels"),
        ([1, 2], [8, -2], "a run of -2"),
        ([1], [3, 3], "as many of each"),
        ([-1], [6], "class ids"),
        ([65536], [6], "class ids"),
        ([], [], "hold 0 pixels"),
    ],
)
def test_runs_that_fit_no_mask_are_refused(classes: list[int], lengths: list[int], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        run_lengths.decode(np.array(classes, np.int32), np.array(lengths, np.int32), 2, 3)


@pytest.mark.parametrize(
    ("palette", "ids", "colors"),
    [
        (CAMVID.palette(), [0, 10, 11], [[128, 128, 128], [0, 128, 192], [0, 0, 0]]),
        (bytes(range(256)) * 4, [0, 255], [[0, 1, 2], [253, 254, 255]]),
        (bytes(6), [0, 200], [[0, 0, 0], [0, 0, 0]]),
    ],
    ids=["of a table", "more than a PNG can hold", "short, which costs no ids"],
)
def test_a_palette_colours_the_png(palette: bytes, ids: list[int], colors: list[list[int]]) -> None:
    data = to_png(np.array([ids]), palette)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P"
    assert np.array(image.convert("RGB"))[0].tolist() == colors
    assert decode_mask(data).tolist() == [ids]


@pytest.mark.parametrize(("classes", "mode"), [(None, "L"), (256, "L"), (257, "I;16")])
def test_the_class_count_decides_the_depth(classes: int | None, mode: str) -> None:
    mask = np.array([[0, 7]], np.int64)
    data = to_png(mask, classes=classes)
    assert Image.open(io.BytesIO(data)).mode == mode
    np.testing.assert_array_equal(decode_mask(data), mask)


def test_an_id_beyond_the_class_count_is_refused() -> None:
    with pytest.raises(ValueError, match="id 300"):
        to_png(np.array([[300]]), classes=20)


def test_a_png_holds_at_least_a_pixel() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        to_png(np.zeros((0, 5), np.uint8))


def test_the_same_mask_gives_the_same_bytes() -> None:
    mask = np.arange(600, dtype=np.int32).reshape(20, 30)
    assert to_png(mask) == to_png(mask.astype(np.uint16))


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_the_highest_id_decides_the_type(highest: int, dtype: type) -> None:
    mask = np.array([[0, highest]])
    assert run_lengths.decode(*run_lengths.encode(mask), 1, 2).dtype == dtype
    assert np.asarray(Image.open(io.BytesIO(to_png(mask)))).dtype == dtype
