"""The decoders: every mode becomes RGB, and whatever is wrong with the data is an ImageError."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from pspnet_core.errors import ImageError
from pspnet_core.images import decoding as images
from pspnet_core.images.decoding import IMAGE_SUFFIXES, Views, decode_image, decode_mask, decode_views, open_image
from pspnet_core.images.orientation import UPRIGHT
from tests.support import sound_images

WIDTH, HEIGHT = 31, 22
BOMB = 20_000
KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
ORIENTATION = 0x0112


def _picture(seed: int = 0) -> Image.Image:
    """Return a smooth RGB picture with no symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Assemble a PNG by hand, for what Pillow does not write; ``rows`` start with their filter byte each."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def _views(data: bytes, **options: int) -> Views:
    return decode_views(data, lambda height, width: [(5, 5)], **options)


def _kind(data: bytes, *others: Callable[..., object], **options: int) -> str:
    """Return what ``decode_image``, ``decode_views`` and other functions say is wrong with a file, all the same."""
    kinds = set()
    decoders: list[Callable[..., object]] = [decode_image, _views, *others]
    for decode in decoders:
        with pytest.raises(ImageError) as caught:
            decode(data, **options)
        assert len(str(caught.value).splitlines()) == 1
        kinds.add(caught.value.kind)
    (kind,) = kinds
    return kind


def _samples() -> dict[str, bytes]:
    """Return one small valid file of each sort."""
    picture = _picture()
    frames = [_picture(seed) for seed in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    grey16 = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    alpha = picture.copy()
    alpha.putalpha(picture.convert("L"))
    return {
        "jpeg": _encode(picture, "JPEG"),
        "jpeg progressive": _encode(picture, "JPEG", progressive=True),
        "jpeg exif": _encode(picture, "JPEG", exif=exif),
        "jpeg grey": _encode(picture.convert("L"), "JPEG"),
        "jpeg cmyk": _encode(picture.convert("CMYK"), "JPEG"),
        "jpeg mpo": _encode(frames[0], "MPO", **animated),
        "png": _encode(picture, "PNG"),
        "png exif": _encode(picture, "PNG", exif=exif),
        "png 1": _encode(picture.convert("1"), "PNG"),
        "png grey": _encode(picture.convert("L"), "PNG"),
        "png grey transparent": _encode(picture.convert("L"), "PNG", transparency=7),
        "png 16": _encode(grey16, "PNG"),
        "png la": _encode(alpha.convert("LA"), "PNG"),
        "png rgba": _encode(alpha, "PNG"),
        "png palette": _encode(picture.quantize(32), "PNG"),
        "png palette transparent": _encode(picture.quantize(32), "PNG", transparency=bytes(range(32))),
        "png animated": _encode(frames[0], "PNG", **animated),
        "gif": _encode(picture, "GIF"),
        "gif animated": _encode(frames[0], "GIF", **animated),
        "webp": _encode(picture, "WEBP"),
        "webp lossless": _encode(alpha, "WEBP", lossless=True, exif=exif),
        "webp animated": _encode(frames[0], "WEBP", **animated),
        "tiff": _encode(picture, "TIFF"),
        "tiff lzw": _encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff 16": _encode(grey16, "TIFF"),
        "tiff int": _encode(picture.convert("I"), "TIFF"),
        "tiff float": _encode(picture.convert("F"), "TIFF"),
        "tiff cmyk": _encode(picture.convert("CMYK"), "TIFF"),
        "tiff lab": _encode(Image.merge("LAB", picture.split()), "TIFF"),
        "tiff rgba": _encode(alpha, "TIFF"),
        "bmp": _encode(picture, "BMP"),
        "bmp 1": _encode(picture.convert("1"), "BMP"),
        "bmp palette": _encode(picture.quantize(32), "BMP"),
        **{f"pixel {kind}": _encode(Image.new("RGB", (1, 1)), kind) for kind in KINDS},
    }


SAMPLES = _samples()


# --- good files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sort_of_file_becomes_rgb(name: str) -> None:
    pixels = decode_image(SAMPLES[name])
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(SAMPLES[name])))
    assert pixels.shape == (upright.height, upright.width, 3)
    if upright.mode not in ("I;16", "I", "F"):
        upright.info.pop("transparency", None)
        np.testing.assert_array_equal(pixels, np.asarray(upright.convert("RGB")))
    # Or opened first, or viewed in its own size.
    file = open_image(SAMPLES[name])
    assert file.nbytes >= 7 * pixels.nbytes // 3  # what Pillow holds, and the array
    np.testing.assert_array_equal(decode_image(file), pixels)
    found = decode_views(SAMPLES[name], lambda height, width: [(height, width)])
    assert (found.height, found.width) == pixels.shape[:2]
    np.testing.assert_array_equal(found.views[0], pixels)


@pytest.mark.parametrize(
    ("kind", "grey", "expected"),
    [
        *[
            (kind, np.array([0, 128, 129, 257, 32768, 65535], np.uint16), [0, 0, 1, 1, 128, 255])
            for kind in ("PNG", "TIFF")
        ],
        ("TIFF", np.array([-5, 0, 257, 65535, 2**31 - 1], np.int32), [0, 0, 1, 255, 255]),
        (
            "TIFF",
            np.array([-np.inf, -1, 0.4, 0.6, 254.6, 300, np.inf, np.nan], np.float32),
            [0, 0, 0, 1, 255, 255, 255, 0],
        ),
    ],
    ids=["16 bits", "16 bits of a TIFF", "32 bits as 16, clipped", "floats, clipped"],
)
def test_deep_grey_becomes_bytes(kind: str, grey: NDArray[np.generic], expected: list[int]) -> None:
    pixels = decode_image(_encode(Image.fromarray(grey[None]), kind))
    assert pixels[0].tolist() == [[value] * 3 for value in expected]


def test_sixteen_bit_rgb_keeps_its_high_bytes() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 256, 65535, 32768, 512, 1024)
    assert decode_image(_png(2, 1, 16, 2, rows)).tolist() == [[[0, 1, 255], [128, 2, 4]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = _encode(_picture(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)
    assert decode_image(data).shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_either_byte_order(order: str) -> None:
    mark = b"II" if order == "<" else b"MM"
    entries = struct.pack(order + "HHIHH", 0x0100, 3, 1, 9, 0) + struct.pack(order + "HHIHH", ORIENTATION, 3, 1, 6, 0)
    exif = b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, 2) + entries + bytes(4)
    upright = decode_image(_encode(_picture(), "PNG"))
    pixels = decode_image(_encode(_picture(), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(upright, -1))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0XX*\0\x08\0\0\0\x01\0",
        b"Exif\0\0" + struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, ORIENTATION, 3, 1, 9, 0, 0),
        b"Exif\0\0" + struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, ORIENTATION, 2, 1, 6, 0, 0),
    ],
    ids=["none", "short", "far away", "no entries", "no order", "no such orientation", "wrong type"],
)
def test_damaged_exif_leaves_the_pixels_as_they_are(exif: bytes) -> None:
    data = _encode(_picture(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.asarray(_picture()))


def test_suffixes_cover_the_formats() -> None:
    assert {".jpg", ".png", ".webp", ".tif", ".bmp", ".gif"} < IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_threads_do_not_disturb_each_other() -> None:
    names = list(SAMPLES) * 3
    expected = {name: decode_image(data) for name, data in SAMPLES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, pixels in zip(names, pool.map(lambda name: decode_image(SAMPLES[name]), names), strict=True):
            np.testing.assert_array_equal(pixels, expected[name])


# --- bad files -----------------------------------------------------------------------------------


CUT = ["jpeg", "jpeg progressive", "jpeg exif", "jpeg cmyk", "png", "png palette", "png 16"]
CUT_ELSEWHERE = ["gif", "webp", "tiff", "tiff lzw"]


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize(
    ("name", "share"),
    [
        *itertools.product(CUT, [0.02, 0.1, 0.3, 0.5, 0.7, 0.9]),
        *itertools.product(CUT_ELSEWHERE, [0.1, 0.5, 0.9]),
    ],
)
def test_a_cut_file(name: str, share: float) -> None:
    data = SAMPLES[name]
    assert _kind(data[: max(9, int(len(data) * share))]) == "Truncated"


@pytest.mark.parametrize("lacking", [2, 30])
@pytest.mark.parametrize("sort", ["jpeg", "jpeg progressive", "jpeg cmyk"])
def test_a_jpeg_without_an_end_is_decoded_twice_and_no_more(
    sort: str, lacking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, data = SAMPLES[sort], SAMPLES[sort][:-lacking]
    assert open_image(data).nbytes == open_image(whole).nbytes + 4 * WIDTH * HEIGHT
    expected, decoded, load = decode_image(whole), list[object](), ImageFile.ImageFile.load

    def counting(file: ImageFile.ImageFile) -> object:
        decoded.extend(file.tile)
        return load(file)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    if lacking == 2:
        np.testing.assert_array_equal(decode_image(data), expected)
    else:
        assert _kind(data) == "Truncated"
    assert len(decoded) == (2 if lacking == 2 else 4)  # which are two decoders


def test_a_tile_counts_though_it_is_larger_than_its_image() -> None:
    data = sound_images.tiled(1008, b"")
    assert open_image(data, max_pixels=1008**2).nbytes > 1008**2
    with pytest.raises(ImageError, match="TooLarge"):
        open_image(data, max_pixels=1008**2 - 1)


def _jpeg_bomb() -> bytes:
    data = bytearray(SAMPLES["jpeg"])
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, BOMB, BOMB)
    return bytes(data)


def _webp_bomb() -> bytes:
    data = bytearray(_encode(_picture(), "WEBP", lossless=True))
    bits = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, bits, 16382 | 16382 << 14)
    return bytes(data)


def _tiff_bomb() -> bytes:
    data = SAMPLES["tiff"]
    for tag, side in ((0x0100, WIDTH), (0x0101, HEIGHT)):
        entry = struct.pack("<HHII", tag, 4, 1, side)
        assert entry in data
        data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, BOMB))
    return data


BOMBS = {
    "jpeg": _jpeg_bomb(),
    "png": _png(BOMB, BOMB, 8, 2, bytes(64)),
    "webp": _webp_bomb(),
    "tiff": _tiff_bomb(),
    "bmp": SAMPLES["bmp"][:18] + struct.pack("<ii", BOMB, BOMB) + SAMPLES["bmp"][26:],
    "gif": SAMPLES["gif"][:6] + struct.pack("<HH", BOMB, BOMB) + SAMPLES["gif"][10:],
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pixel_bomb_is_refused_from_its_header(name: str) -> None:
    # None of these holds the pixels it promises: only the header can have said so.
    with pytest.raises(ImageError, match=r"^TooLarge: .*; at most 100000000 are decoded"):
        decode_image(BOMBS[name])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "Empty"),
        (SAMPLES["png"][:12], "Truncated"),
        (BOMBS["png"], "TooLarge"),
        (b"<html>404 not found</html>", "Unreadable"),
        (bytes(4096), "Unreadable"),
        (b"BMW cars", "Unreadable"),
        (_encode(_picture(), "PPM"), "Unreadable"),
        (_encode(_picture(), "ICO"), "Unreadable"),
    ],
    ids=["empty", "cut", "bomb", "html", "zeros", "like a bmp", "ppm", "ico"],
)
def test_what_is_wrong_with_a_header_is_told_by_all(data: bytes, kind: str) -> None:
    assert _kind(data, open_image, decode_mask) == kind


def test_the_limit_is_the_largest_size_allowed() -> None:
    pixels = WIDTH * HEIGHT
    assert decode_image(SAMPLES["png"], max_pixels=pixels).size == 3 * pixels
    assert _kind(SAMPLES["png"], max_pixels=pixels - 1) == "TooLarge"


def test_above_pillows_own_limits_ours_is_the_one() -> None:
    # Pillow would warn from 89 million pixels on and raise from 179 million on.
    for side in (9_700, 14_000):
        assert _kind(_png(side, side, 1, 0, bytes(64)), max_pixels=10**9) == "Truncated"
        assert _kind(_png(side, side, 1, 0, bytes(64)), max_pixels=10**6) == "TooLarge"


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_no_pixels_at_all(width: int, height: int) -> None:
    assert _kind(_png(width, height, 8, 2, b"")) in ("Unreadable", "Truncated")
    bmp = SAMPLES["bmp"][:18] + struct.pack("<ii", width, height) + SAMPLES["bmp"][26:]
    assert _kind(bmp) == "Unreadable"


def test_our_own_mistakes_are_not_taken_for_bad_data() -> None:
    with pytest.raises(TypeError):
        decode_image("a path, not bytes")  # type: ignore[arg-type]


Edit = tuple[str, int, bytes]

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "end"]),
        # Headers are short: half of the edits go there.
        st.one_of(st.integers(0, 64), st.integers(0, 4000)),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=8,
)


def _edit(data: bytes, edits: list[Edit]) -> bytes:
    changed = bytearray(data)
    for kind, place, value in edits:
        at = place % (len(changed) + 1)
        if kind == "set":
            changed[at : at + len(value)] = value
        elif kind == "cut":
            del changed[at : at + len(value)]
        elif kind == "insert":
            changed[at:at] = value
        else:
            del changed[at:]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(list(SAMPLES)), EDITS)
@settings(max_examples=150)
def test_any_damage_gives_an_array_or_an_image_error(name: str, edits: list[Edit]) -> None:
    data = _edit(SAMPLES[name], edits)
    for decode in (decode_image, decode_mask):
        try:
            assert decode(data, max_pixels=1_000_000).size > 0
        except ImageError as error:
            assert error.kind in ("Empty", "Unreadable", "Truncated", "TooLarge", "NotAMask")
            assert len(str(error).splitlines()) == 1


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "as rgb": {"keep_rgb": True},
    "coarse": {"quality": 5},
}
JPEGS = {sort: _encode(_picture().resize((97, 61)), "JPEG", **options) for sort, options in SETTINGS.items()}


@pytest.mark.parametrize("sort", JPEGS)
def test_jpeg_pixels_are_those_of_pillow_whatever_its_settings(sort: str) -> None:
    np.testing.assert_array_equal(decode_image(JPEGS[sort]), np.asarray(Image.open(io.BytesIO(JPEGS[sort]))))


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(list(JPEGS)), st.integers(2, 4000), st.binary(min_size=1, max_size=2))
@settings(max_examples=150)
def test_of_a_damaged_jpeg_the_pixels_are_those_of_pillow_too(sort: str, place: int, value: bytes) -> None:
    data, pixels = _edit(JPEGS[sort], [("set", place, value)]), 97 * 61
    expected = _pillows(data)
    if expected is not None and expected.size <= 3 * pixels:
        np.testing.assert_array_equal(decode_image(data, max_pixels=pixels), expected)
        return
    try:
        found = decode_image(data, max_pixels=pixels)
    except ImageError:
        return
    # Nothing but the mark of its end was damaged.
    np.testing.assert_array_equal(found, _pillows(JPEGS[sort]))


def _pillows(data: bytes) -> NDArray[np.uint8] | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]).convert("RGB"))
    except Exception:  # Pillow raises almost anything
        return None


@given(st.binary(max_size=200))
def test_random_bytes_are_no_image(data: bytes) -> None:
    assert _kind(data) in ("Empty", "Unreadable", "Truncated")


# --- masks ---------------------------------------------------------------------------------------


def _ids(*values: int, dtype: type = np.uint8) -> NDArray[np.unsignedinteger]:
    return np.array([values], dtype)


def test_grey_and_palette_masks_give_their_indices() -> None:
    ids = _ids(0, 3, 11, 255)
    np.testing.assert_array_equal(decode_mask(_encode(Image.fromarray(ids), "PNG")), ids)
    coloured = Image.fromarray(ids)
    coloured.putpalette(bytes(range(255, -1, -1)) * 3)
    assert coloured.mode == "P"
    for options in ({}, {"transparency": 3}):
        found = decode_mask(_encode(coloured, "PNG", **options))
        np.testing.assert_array_equal(found, ids)
        assert found.dtype == np.uint8
        assert found.flags.writeable


def test_sixteen_bit_masks() -> None:
    ids = _ids(0, 255, 256, 65535, dtype=np.uint16)
    found = decode_mask(_encode(Image.fromarray(ids), "PNG"))
    np.testing.assert_array_equal(found, ids)
    assert found.dtype == np.uint16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_mask_is_turned_as_an_image_is(mode: str, orientation: int) -> None:
    ids = np.array([[0, 1, 1], [0, 0, 1]], np.uint16 if mode == "I;16" else np.uint8)
    stored = Image.fromarray(ids.astype(bool) if mode == "1" else ids)
    if mode == "P":
        stored.putpalette([9, 9, 9, 0, 0, 0])
    assert stored.mode == mode
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = decode_mask(_encode(stored, "PNG", exif=exif))
    turn = UPRIGHT.get(orientation)
    shown = stored if turn is None else stored.transpose(turn)
    np.testing.assert_array_equal(found, np.array(shown))
    image = Image.fromarray(np.where(ids, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(found > 0, decode_image(_encode(image, "PNG", exif=exif))[..., 0] > 0)


@pytest.mark.parametrize("color", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize(
    ("depth", "packed", "ids"),
    [(1, b"\0\xb0", [1, 0, 1, 1]), (2, b"\0\x1b", [0, 1, 2, 3]), (4, b"\0\x07\xaf", [0, 7, 10, 15])],
    ids=["1 bit", "2 bits", "4 bits"],
)
def test_masks_of_few_bits_are_not_scaled(color: int, depth: int, packed: bytes, ids: list[int]) -> None:
    extra = [(b"PLTE", bytes(3 * 2**depth))] if color == 3 else []
    found = decode_mask(_png(4, 1, depth, color, packed, *extra))
    assert found.tolist() == [ids]
    assert found.dtype == np.uint8


@pytest.mark.parametrize("name", ["png rgba", "png", "png la", "jpeg grey", "tiff", "gif", "bmp 1"])
def test_what_is_no_mask(name: str) -> None:
    with pytest.raises(ImageError, match="NotAMask"):
        decode_mask(SAMPLES[name])
    with pytest.raises(ImageError, match="Truncated"):
        decode_mask(SAMPLES["png grey"][:60])


# --- fewer pixels --------------------------------------------------------------------------------


def _ramp(height: int, width: int, orientation: int = 1) -> bytes:
    """Return a JPEG that is brighter from left to right in red and from top to bottom in green, once upright."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    stored = Image.fromarray(picture)
    if orientation > 1:
        turn = UPRIGHT[orientation]
        back = {
            Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
            Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
        }
        stored = stored.transpose(back.get(turn, turn))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return _encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)


@contextmanager
def _decoded() -> Iterator[list[tuple[int, int]]]:
    """Width and height of what codecs are asked for, image after image."""
    sizes: list[tuple[int, int]] = []
    load = images._load

    def watched(image: Image.Image) -> None:
        sizes.append(image.size)
        load(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_load", watched)
        yield sizes


@pytest.mark.parametrize(
    ("views", "size"),
    [
        ([(300, 400)], (240, 160)),
        ([(81, 120)], (240, 160)),
        ([(80, 121)], (240, 160)),
        ([(80, 120)], (120, 80)),
        ([(40, 60)], (60, 40)),
        ([(20, 30), (40, 60), (30, 45)], (60, 40)),
        ([(1, 1)], (30, 20)),
    ],
)
def test_no_more_of_a_jpeg_is_decoded_than_its_largest_view_needs(
    views: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    with _decoded() as sizes:
        found = decode_views(_ramp(160, 240), lambda height, width: views)
    assert sizes == [size]
    assert (found.height, found.width) == (160, 240)
    assert [view.shape for view in found.views] == [(*view, 3) for view in views]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(160, 240), (161, 247)])
def test_a_view_of_a_turned_jpeg_is_that_of_all_its_pixels(height: int, width: int, orientation: int) -> None:
    data = _ramp(height, width, orientation)
    with _decoded() as sizes:
        found = decode_views(data, lambda height, width: [(height // 5, width // 5)])
    assert sizes == [((width + 3) // 4, (height + 3) // 4)[:: -1 if orientation >= 5 else 1]]
    assert (found.height, found.width) == (height, width)
    (view,) = found.views
    assert view.flags.writeable and view.flags.c_contiguous
    whole = Image.fromarray(decode_image(data))
    expected = np.asarray(whole.resize((width // 5, height // 5), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(view - expected).max() <= 4  # codec and rounding; a row too many would make it twice as much


@given(st.integers(1, 80), st.integers(1, 80), st.floats(0.05, 2), st.sampled_from(range(1, 9)))
@settings(max_examples=60)
def test_no_fewer_pixels_are_decoded_than_a_view_has(height: int, width: int, scale: float, orientation: int) -> None:
    view = (max(1, round(height * scale)), max(1, round(width * scale)))
    with _decoded() as sizes:
        decode_views(_ramp(height, width, orientation), lambda height, width: [view])
    ((across, down),) = sizes if orientation < 5 else [size[::-1] for size in sizes]
    assert down >= min(view[0], height) and across >= min(view[1], width)
