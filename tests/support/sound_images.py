"""Image files as people have them, each a row of ``SOUND``: the file, and its pixels or the kind of its error.

A new sort of file is one function and one row; it is decoded in all ways, and labelled by the job.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

HEIGHT, WIDTH = 22, 31
_ACROSS, _DOWN = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
RGB: Pixels = np.dstack([8 * _ACROSS, 11 * _DOWN, 4 * _ACROSS + 5 * _DOWN]).astype(np.uint8)
GREY: Pixels = np.ascontiguousarray(RGB[..., 2])
TURNED: Pixels = np.ascontiguousarray(np.rot90(RGB, -1))
"""What is upright where the orientation is 6."""
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'

# By the IJG's library, release 8, of the gradient below.
_ARITHMETIC = base64.b64decode(
    b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYn"
    b"KSopGR8tMC0oMCUoKSj/2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgo"
    b"KCgoKCgoKCj/yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANGWkenTf2THOu7/AHpF5K78HH/5"
    b"QIJXUvvF4mL4/wCXG6TFfsmRhTITHV1oHITdF89f84D/2Q=="
)


class Sound(NamedTuple):
    """A file, and what is to become of it.

    Attributes:
        pixels: (H, W, 3) RGB; None where there are none.
        kind: of the error; empty where there are pixels.
        within: how far each value may be from those told, for what loses some of them.
    """

    data: bytes
    pixels: Pixels | None = None
    kind: str = ""
    within: int = 1


def spread(grey: NDArray[Any]) -> Pixels:
    """Grey as RGB."""
    return np.repeat(grey[..., None], 3, 2).astype(np.uint8)


def encoded(pixels: NDArray[Any], kind: str, mode: str | None = None, **options: Any) -> bytes:
    """A file as Pillow writes it."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


# --- JPEG ----------------------------------------------------------------------------------------


def jpeg(**options: Any) -> bytes:
    """The picture as a JPEG that loses little."""
    return encoded(RGB, "JPEG", **{"quality": 98, "subsampling": 0, **options})


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segment(marker: int, content: bytes) -> bytes:
    """The JPEG with another segment in front."""
    return jpeg()[:2] + segment(marker, content) + jpeg()[2:]


def exif(kind: int, count: int, value: bytes, order: str = "<", tag: int = ORIENTATION) -> bytes:
    """EXIF of one tag; a value of more than four bytes comes behind."""
    place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", 26)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIHHHI", 42, 8, 1, tag, kind, count)
    return b"Exif\0\0" + head + place + bytes(4) + (value if len(value) > 4 else b"")


def told(kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    """The JPEG with that EXIF."""
    return with_segment(0xE1, exif(kind, count, value, order))


def thumbnail() -> bytes:
    """Where a camera puts one: a JPEG in the EXIF."""
    small = encoded(RGB[::4, ::4], "JPEG")
    return with_segment(0xE1, exif(3, 1, b"\1\0") + small)


def lossless() -> bytes:
    """A JPEG whose frame claims the lossless process."""
    return jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x10")


def of_bits(bits: int) -> bytes:
    """A JPEG whose frame claims samples of so many bits."""
    return jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11" + bytes([bits]))


def gradient() -> Pixels:
    """What the arithmetic-coded JPEG shows."""
    across, down = np.meshgrid(np.arange(24), np.arange(16))
    return np.dstack([10 * across, 15 * down, 4 * across + 5 * down]).astype(np.uint8)


def cmyk() -> bytes:
    """A JPEG of inks, inverted, as Adobe's programs write it."""
    inks = np.dstack([255 - RGB, np.zeros_like(GREY)])
    buffer = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def mpo() -> bytes:
    """Two pictures of a camera with two lenses."""
    buffer = io.BytesIO()
    other = Image.fromarray(255 - RGB)
    Image.fromarray(RGB).save(buffer, "MPO", save_all=True, append_images=[other], quality=98, subsampling=0)
    return buffer.getvalue()


_J = 8  # how far the values of a JPEG may be off

JPEGS: Mapping[str, Callable[[], Sound]] = {
    "plain": lambda: Sound(jpeg(), RGB, within=_J),
    "progressive": lambda: Sound(jpeg(progressive=True), RGB, within=_J),
    "restarts": lambda: Sound(jpeg(restart_marker_blocks=1), RGB, within=_J),
    "arithmetic": lambda: Sound(_ARITHMETIC, gradient(), within=40),
    "grey": lambda: Sound(encoded(GREY, "JPEG", quality=98), spread(GREY), within=_J),
    "of inks": lambda: Sound(cmyk(), RGB, within=_J),
    "two pictures": lambda: Sound(mpo(), RGB, within=_J),
    "two pictures, their index damaged": lambda: Sound(mpo().replace(b"MPF\0", b"MPF\0\xff"), RGB, within=_J),
    "garbage behind": lambda: Sound(jpeg() + b"\r\n", RGB, within=_J),
    "a film behind": lambda: Sound(jpeg() + bytes(4096) + b"ftypmp42", RGB, within=_J),
    "garbage in front": lambda: Sound(b"\r\n" + jpeg(), kind="Unreadable"),
    "no end": lambda: Sound(jpeg()[:-2], RGB, within=_J),
    "no end, progressive": lambda: Sound(jpeg(progressive=True)[:-2], RGB, within=_J),
    "cut between scans": lambda: Sound(_cut_at_scan(), kind="Truncated"),
    "cut in a scan": lambda: Sound(jpeg(progressive=True)[:-30], kind="Truncated"),
    "half an end": lambda: Sound(jpeg()[:-1], RGB, within=_J),
    "no end, grey": lambda: Sound(encoded(GREY, "JPEG", quality=98)[:-2], spread(GREY), within=_J),
    "no end, but restarts": lambda: Sound(jpeg(restart_marker_blocks=1)[:-2], RGB, within=_J),
    "no end, turned": lambda: Sound(told(3, 1, b"\6\0")[:-2], TURNED, within=_J),
    "cut in the last rows": lambda: Sound(jpeg()[:-30], kind="Truncated"),
    "cut in the last rows, with restarts": lambda: Sound(jpeg(restart_marker_blocks=1)[:-30], kind="Truncated"),
    "cut between restarts": lambda: Sound(_cut_at_restart(), kind="Truncated"),
    "a thumbnail in front": lambda: Sound(thumbnail(), RGB, within=_J),
    "a comment of 64k": lambda: Sound(with_segment(0xFE, b"c" * 65_533), RGB, within=_J),
    "a segment that nobody knows": lambda: Sound(with_segment(0xEC, b"\0" * 100), RGB, within=_J),
    "a damaged profile": lambda: Sound(with_segment(0xE2, b"ICC_PROFILE\0\1\7" + b"x" * 99), RGB, within=_J),
    "comments without end": lambda: Sound(jpeg()[:2] + segment(0xFE, b"") * 300_000 + jpeg()[2:], kind="TooLarge"),
    "many large comments": lambda: Sound(jpeg()[:2] + segment(0xFE, b"c" * 65_533) * 40 + jpeg()[2:], RGB, within=_J),
    "12 bits": lambda: Sound(of_bits(12), kind="Unreadable"),
    "16 bits, lossless": lambda: Sound(lossless(), kind="Unreadable"),
    "orientation as short": lambda: Sound(told(3, 1, b"\6\0"), TURNED, within=_J),
    "orientation as long": lambda: Sound(told(4, 1, b"\6\0\0\0"), TURNED, within=_J),
    "orientation as long of the other order": lambda: Sound(told(4, 1, b"\0\0\0\6", ">"), TURNED, within=_J),
    "orientation as byte": lambda: Sound(told(1, 1, b"\6"), TURNED, within=_J),
    "orientation as signed long": lambda: Sound(told(9, 1, b"\6\0\0\0"), TURNED, within=_J),
    "orientation twice": lambda: Sound(told(3, 2, b"\6\0\1\0"), TURNED, within=_J),
    "orientation three times": lambda: Sound(told(3, 3, b"\6\0\1\0\1\0"), TURNED, within=_J),
    "orientation 0": lambda: Sound(told(3, 1, b"\0\0"), RGB, within=_J),
    "orientation 9": lambda: Sound(told(3, 1, b"\x09\0"), RGB, within=_J),
    "orientation -6": lambda: Sound(told(9, 1, b"\xfa\xff\xff\xff"), RGB, within=_J),
    "orientation as text": lambda: Sound(told(2, 2, b"6\0"), RGB, within=_J),
    "orientation nowhere": lambda: Sound(told(3, 2**31, b"\6\0"), RGB, within=_J),
    "orientation as XMP": lambda: Sound(with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), TURNED, within=_J),
    "EXIF without an end": lambda: Sound(with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), RGB, within=_J),
    "EXIF of 64k": lambda: Sound(with_segment(0xE1, exif(3, 1, b"\6\0").ljust(65_533, b"\0")), TURNED, within=_J),
}


def _cut_at_restart() -> bytes:
    """A JPEG up to its last restart."""
    data = jpeg(restart_marker_blocks=1)
    return data[: max(data.rindex(bytes([0xFF, 0xD0 + number])) for number in range(8) if number in _restarts(data))]


def _cut_at_scan() -> bytes:
    """A progressive JPEG up to its last scan."""
    data = jpeg(progressive=True)
    return data[: data.rindex(b"\xff\xda")]


def _restarts(data: bytes) -> set[int]:
    return {number for number in range(8) if bytes([0xFF, 0xD0 + number]) in data}


# --- PNG -----------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes, *, wrong: bool = False) -> bytes:
    """A chunk of a PNG, if need be with a wrong checksum."""
    told = zlib.crc32(name + content) ^ wrong
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", told)


def png(*extra: bytes, behind: bytes = b"", wrong: bytes = b"", pixels: NDArray[Any] = RGB) -> bytes:
    """The picture as a PNG of 8 or 16 bits, with chunks in front of its pixels and behind them."""
    depth, color = 8 * pixels.itemsize, {2: 0, 3: 2}[pixels.ndim]
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0), wrong=wrong == b"IHDR"),
        *extra,
        chunk(b"IDAT", _deflated(pixels), wrong=wrong == b"IDAT"),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + behind + chunk(b"IEND", b"", wrong=wrong == b"IEND")


def _deflated(pixels: NDArray[Any] = RGB) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels))


def _with_pixels(content: bytes) -> bytes:
    """The PNG with other content of its pixels, each byte of which is a chunk, with a wrong checksum."""
    parts = b"".join(chunk(b"IDAT", content[at : at + 1], wrong=True) for at in range(len(content)))
    return png().replace(chunk(b"IDAT", _deflated()), parts)


def _with_damage(place: int) -> bytes:
    content = bytearray(_deflated())
    content[place] ^= 2
    return _with_pixels(bytes(content))


def inflating(size: int) -> bytes:
    """Compressed data that becomes so many zeros; its checksum, which nobody gets to, is wrong."""
    press = zlib.compressobj(9)
    first, next_ = (press.compress(bytes(2**20)) + press.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + next_ * (size // 2**20 - 1) + press.flush()


def _itxt(text: bytes, *, compressed: bool = False) -> bytes:
    content = zlib.compress(text) if compressed else text
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes([compressed, 0]) + b"en\0\0" + content)


def interlaced() -> bytes:
    """A PNG in seven passes (Adam7)."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for top, left, down, across in passes for row in RGB[top::down, left::across])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animated(kind: str, **options: Any) -> bytes:
    """The picture, and then another one."""
    buffer, other = io.BytesIO(), Image.fromarray(255 - RGB)
    Image.fromarray(RGB).save(buffer, kind, save_all=True, append_images=[other], **options)
    return buffer.getvalue()


_KEY = b"Comment\0\0"
_MEGABYTES = 3 * 2**20

PNGS: Mapping[str, Callable[[], Sound]] = {
    "plain": lambda: Sound(png(), RGB),
    "text that inflates": lambda: Sound(png(chunk(b"zTXt", _KEY + inflating(_MEGABYTES))), RGB),
    "text that inflates, behind": lambda: Sound(png(behind=chunk(b"zTXt", _KEY + inflating(_MEGABYTES))), RGB),
    "international text that inflates": lambda: Sound(
        png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + inflating(_MEGABYTES))), RGB
    ),
    "a profile that inflates": lambda: Sound(png(chunk(b"iCCP", b"profile\0\0" + inflating(_MEGABYTES))), RGB),
    "XMP that inflates": lambda: Sound(png(_itxt(XMP + bytes(_MEGABYTES), compressed=True)), TURNED),
    "text without end": lambda: Sound(png(*[chunk(b"zTXt", _KEY + inflating(2**30))] * 4), RGB),
    "text of many megabytes": lambda: Sound(png(*[chunk(b"tEXt", b"a\0" + b"b" * 2**20)] * 70), RGB),
    "chunks without end": lambda: Sound(png(chunk(b"tEXt", b"") * 2**18), kind="TooLarge"),
    "text of an unknown method": lambda: Sound(png(chunk(b"zTXt", b"Comment\0\7abc")), RGB),
    "a damaged profile": lambda: Sound(png(chunk(b"iCCP", b"profile\0\0abc")), RGB),
    "a profile without a name's end": lambda: Sound(png(chunk(b"iCCP", b"profile")), RGB),
    "short chunks": lambda: Sound(
        png(*(chunk(name, b"\0") for name in (b"gAMA", b"cHRM", b"pHYs", b"tRNS", b"acTL", b"fcTL"))), RGB
    ),
    "gamma": lambda: Sound(png(chunk(b"gAMA", struct.pack(">I", 45_455))), RGB),
    "a wrong checksum of a text": lambda: Sound(png(chunk(b"tEXt", b"a\0b", wrong=True)), RGB),
    "a wrong checksum of an unknown chunk": lambda: Sound(png(chunk(b"abCd", b"a", wrong=True)), RGB),
    "a wrong checksum of the end": lambda: Sound(png(wrong=b"IEND"), RGB),
    "a wrong checksum of the header": lambda: Sound(png(wrong=b"IHDR"), kind="Truncated"),
    "a wrong checksum of the pixels": lambda: Sound(png(wrong=b"IDAT"), RGB),
    "a wrong checksum of damaged pixels": lambda: Sound(_with_damage(300), kind="Truncated"),
    "a wrong checksum of damaged last pixels": lambda: Sound(_with_damage(-12), kind="Truncated"),
    "a wrong checksum of pixels without end": lambda: Sound(_with_pixels(_deflated()[:-4]), kind="Truncated"),
    "a needed chunk that nobody knows": lambda: Sound(png(chunk(b"CgBI", b"\x50\0\x20\2")), kind="Unreadable"),
    "no end": lambda: Sound(png()[:-12], RGB),
    "cut behind the pixels": lambda: Sound(png(behind=chunk(b"tEXt", bytes(99)))[:-40], RGB),
    "cut in the pixels": lambda: Sound(png()[:-60], kind="Truncated"),
    "garbage behind": lambda: Sound(png() + b"PK\3\4" * 99, RGB),
    "interlaced": lambda: Sound(interlaced(), RGB),
    "animated": lambda: Sound(animated("PNG"), RGB),
    "16 bits": lambda: Sound(png(pixels=RGB.astype(np.uint16) * 257), RGB),
    "16 bits, grey": lambda: Sound(png(pixels=GREY.astype(np.uint16) * 257), spread(GREY)),
    "1 bit": lambda: Sound(encoded(GREY > 99, "PNG"), spread(np.where(GREY > 99, 255, 0))),
    "grey with alpha": lambda: Sound(encoded(np.dstack([GREY, GREY]), "PNG"), spread(GREY)),
    "alpha": lambda: Sound(encoded(np.dstack([RGB, GREY]), "PNG"), RGB),
    "palette with alpha": lambda: Sound(encoded(GREY, "PNG", "P", transparency=bytes(range(256))), spread(GREY)),
    "orientation": lambda: Sound(png(chunk(b"eXIf", exif(3, 1, b"\6\0")[6:])), TURNED),
    "orientation as long": lambda: Sound(png(chunk(b"eXIf", exif(4, 1, b"\6\0\0\0")[6:])), TURNED),
    "orientation behind": lambda: Sound(png(behind=chunk(b"eXIf", exif(3, 1, b"\6\0")[6:])), TURNED),
    "orientation as XMP": lambda: Sound(png(_itxt(XMP)), TURNED),
    "orientation as compressed XMP": lambda: Sound(png(_itxt(XMP, compressed=True)), TURNED),
    "EXIF before XMP": lambda: Sound(png(chunk(b"eXIf", exif(3, 1, b"\1\0")[6:]), _itxt(XMP)), RGB),
    "damaged XMP": lambda: Sound(
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0abc"), chunk(b"iTXt", b"XML:com.adobe.xmp\0")), RGB
    ),
}


# --- TIFF ----------------------------------------------------------------------------------------

Order = Literal["<", ">"]
ORDERS: tuple[Order, ...] = ("<", ">")
Tags = dict[int, tuple[int, list[int]]]
_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 16: "Q"}


def tiff(pixels: NDArray[Any], photometric: int, *, order: Order = "<", big: bool = False, **more: Any) -> bytes:
    """A TIFF of one strip that is not compressed, or one for each plane.

    Args:
        pixels: (H, W), (H, W, bands), or (bands, H, W) with ``planes``; rows that are packed give ``bits``.
        more: ``bits`` of a value, ``planes``, and ``tags`` besides.
    """
    planes, bits = more.get("planes", False), more.get("bits", 8 * pixels.itemsize)
    bands = 1 if pixels.ndim == 2 else pixels.shape[0 if planes else 2]
    parts = [plane.astype(pixels.dtype.newbyteorder(order)).tobytes() for plane in (pixels if planes else [pixels])]
    start = 16 if big else 8
    places = [start + sum(map(len, parts[:number])) for number in range(len(parts))]
    kind = {"f": 3, "i": 2}.get(pixels.dtype.kind, 1)
    tags: Tags = {
        256: (3, [WIDTH]), 257: (3, [HEIGHT]), 258: (3, [bits] * bands), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, places), 277: (3, [bands]), 278: (3, [HEIGHT]), 279: (4, [len(part) for part in parts]),
        284: (3, [2 if planes else 1]), 339: (3, [kind] * bands), **more.get("tags", {}),
    }  # fmt: skip
    return _tiff_of(b"".join(parts), tags, order, big)


def tiled(side: int, content: bytes) -> bytes:
    """A TIFF of grey in one square tile, which may be larger than the image."""
    tags: Tags = {
        256: (3, [WIDTH]), 257: (3, [HEIGHT]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1]),
        322: (4, [side]), 323: (4, [side]), 324: (4, [8]), 325: (4, [len(content)]),
    }  # fmt: skip
    return _tiff_of(content, tags, "<", False)


def _one_tile(side: int) -> bytes:
    grey = np.zeros((side, side), np.uint8)
    grey[:HEIGHT, :WIDTH] = GREY
    return tiled(side, zlib.compress(grey.tobytes()))


def _tiff_of(content: bytes, tags: Tags, order: str, big: bool) -> bytes:
    """Header, content, and a directory with its longer values behind it."""
    mark, place, count, room = (b"II", "Q", "Q", 8) if big else (b"II", "I", "H", 4)
    mark = mark if order == "<" else b"MM"
    content += bytes(len(content) % 2)
    directory = (16 if big else 8) + len(content)
    size = struct.calcsize(f"={place}")
    after = directory + struct.calcsize(f"={count}") + len(tags) * (4 + 2 * size) + size
    entries, behind = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}{_TYPES[kind]}", *values)
        inline = value.ljust(room, b"\0")
        if len(value) > room:
            inline, behind = struct.pack(order + place, after + len(behind)), behind + value + bytes(len(value) % 2)
        entries += struct.pack(f"{order}HH{place}", tag, kind, len(values)) + inline
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, directory) if big else struct.pack(f"{order}HI", 42, directory)
    return mark + head + content + struct.pack(order + count, len(tags)) + entries + bytes(size) + behind


def packed(grey: Pixels) -> NDArray[np.uint8]:
    """Rows of 12 bits for each value."""
    wide = np.pad(grey.astype(np.uint32) * 4095 // 255, ((0, 0), (0, WIDTH % 2)))
    both = wide[:, ::2] << 12 | wide[:, 1::2]
    rows = np.dstack([both >> 16, both >> 8 & 255, both & 255]).astype(np.uint8).reshape(HEIGHT, -1)
    return rows[:, : (WIDTH * 3 + 1) // 2]


def saved(compression: str, pixels: NDArray[Any] = RGB, mode: str | None = None, **options: Any) -> bytes:
    """A TIFF as Pillow writes it."""
    return encoded(pixels, "TIFF", mode, compression=compression, **options)


def _orientated(kind: int, *values: int) -> bytes:
    return tiff(RGB, 2, tags={ORIENTATION: (kind, list(values))})


def _both_orders(name: str, sound: Callable[[Order], Sound]) -> dict[str, Callable[[], Sound]]:
    return {f"{name}, {order}": lambda order=order: sound(order) for order in ORDERS}  # type: ignore[misc]


_WIDE = GREY.astype(np.uint16) * 257
_FLOATS = GREY.astype(np.float32)

TIFFS: Mapping[str, Callable[[], Sound]] = {
    **_both_orders("plain", lambda order: Sound(tiff(RGB, 2, order=order), RGB)),
    **_both_orders("16 bits", lambda order: Sound(tiff(_WIDE, 1, order=order), spread(GREY))),
    **_both_orders("16 bits, RGB", lambda order: Sound(tiff(RGB.astype(np.uint16) * 257, 2, order=order), RGB)),
    **_both_orders(
        "16 bits, planes",
        lambda order: Sound(tiff(np.moveaxis(RGB, 2, 0).astype(np.uint16) * 257, 2, order=order, planes=True), RGB),
    ),
    **_both_orders("planes", lambda order: Sound(tiff(np.moveaxis(RGB, 2, 0), 2, order=order, planes=True), RGB)),
    **_both_orders("floats", lambda order: Sound(tiff(_FLOATS, 1, order=order), spread(GREY))),
    **_both_orders("floats up to 1", lambda order: Sound(tiff(_FLOATS / 255, 1, order=order), spread(GREY))),
    **_both_orders(
        "signed, 16 bits", lambda order: Sound(tiff((_WIDE // 2).astype(np.int16), 1, order=order), spread(GREY // 2))
    ),
    **_both_orders("signed, 32 bits", lambda order: Sound(tiff(_WIDE.astype(np.int32), 1, order=order), spread(GREY))),
    **_both_orders("8 bits, white is zero", lambda order: Sound(tiff(255 - GREY, 0, order=order), spread(GREY))),
    **_both_orders("of inks", lambda order: Sound(tiff(_inks(), 5, order=order), RGB)),
    **_both_orders("alpha", lambda order: Sound(tiff(np.dstack([RGB, GREY]), 2, order=order, tags=_ALPHA), RGB)),
    "16 bits, white is zero": lambda: Sound(tiff(65535 - _WIDE, 0), spread(GREY)),
    "12 bits": lambda: Sound(tiff(packed(GREY), 1, bits=12), spread(GREY)),
    "floats of 64 bits": lambda: Sound(tiff(_FLOATS.astype(np.float64), 1), kind="Unreadable"),
    "floats of 16 bits": lambda: Sound(tiff(_FLOATS.astype(np.float16), 1), kind="Unreadable"),
    "floats, RGB": lambda: Sound(tiff(RGB.astype(np.float32), 2), kind="Unreadable"),
    "floats up to 1, and one above": lambda: Sound(tiff(_shining(1.02), 1), _pixel(255)),
    "floats up to 1, and one of 3": lambda: Sound(tiff(_shining(3), 1), _pixel(255)),
    "floats up to 1, others are no data": lambda: Sound(_partly(9999), _third(0)),
    "floats up to 1, others are no data of 2": lambda: Sound(_partly(2), _third(0)),
    "floats up to 1, others huge, untold": lambda: Sound(_partly(3e38, ""), _third(255)),
    "floats, and others are no data": lambda: Sound(_partly(9999, level=1), _third(0)),
    "floats, and their no data is no number": lambda: Sound(_partly(7, "x", level=1), _third(7)),
    "a tile": lambda: Sound(_one_tile(48), spread(GREY)),
    "a tile of many pixels": lambda: Sound(tiled(30_000, inflating(2**20)), kind="TooLarge"),
    "a strip of more rows than there are": lambda: Sound(tiff(RGB, 2, tags={278: (4, [2**31])}), RGB),
    "big": lambda: Sound(tiff(RGB, 2, big=True), RGB),
    "big, of the other order": lambda: Sound(tiff(RGB, 2, big=True, order=">"), kind="Unreadable"),
    "a compression that nobody knows": lambda: Sound(tiff(RGB, 2, tags={259: (3, [34712])}), kind="Unreadable"),
    "lzw": lambda: Sound(saved("tiff_lzw"), RGB),
    "lzw of floats": lambda: Sound(saved("tiff_lzw", _FLOATS), spread(GREY)),
    "deflate": lambda: Sound(saved("tiff_adobe_deflate"), RGB),
    "packbits": lambda: Sound(saved("packbits"), RGB),
    "jpeg": lambda: Sound(saved("jpeg", quality=98), RGB, within=40),
    "fax": lambda: Sound(saved("group4", GREY > 99), spread(np.where(GREY > 99, 255, 0))),
    "palette": lambda: Sound(saved("raw", GREY, "P"), spread(GREY)),
    "YCbCr": lambda: Sound(saved("raw", RGB, "YCbCr"), RGB, within=4),
    "pages": lambda: Sound(animated("TIFF"), RGB),
    "tags that nobody knows": lambda: Sound(tiff(RGB, 2, tags={33_550: (3, [1, 2, 3]), 65_000: (4, [7])}), RGB),
    "cut": lambda: Sound(saved("tiff_lzw")[:-400], kind="Truncated"),
    "orientation": lambda: Sound(_orientated(3, 6), TURNED),
    "orientation as long": lambda: Sound(_orientated(4, 6), TURNED),
    "orientation as byte": lambda: Sound(_orientated(1, 6), TURNED),
    "orientation twice": lambda: Sound(_orientated(3, 6, 1), TURNED),
    "orientation 9": lambda: Sound(_orientated(3, 9), RGB),
    "orientation as XMP": lambda: Sound(tiff(RGB, 2, tags={700: (1, list(XMP))}), TURNED),
}
_ALPHA: Tags = {338: (3, [2])}


def _shining(corner: float) -> NDArray[np.float32]:
    """Fractions of white, of which one is another."""
    values = (_FLOATS / 255).astype(np.float32)
    values[0, 0] = corner
    return values


def _pixel(corner: int) -> Pixels:
    grey = GREY.copy()
    grey[0, 0] = corner
    return spread(grey)


def _partly(value: float, told: str | None = None, *, level: float = 255) -> bytes:
    """Floats of which a third is a value for missing data, as GDAL's tag tells it."""
    values = _FLOATS / np.float32(level)
    values[: HEIGHT // 3] = value
    text = list(f"{value if told is None else told}\0".encode())
    return tiff(values, 1, tags={42113: (2, text)})


def _third(level: int) -> Pixels:
    grey = GREY.copy()
    grey[: HEIGHT // 3] = level
    return spread(grey)


def _inks() -> Pixels:
    return np.dstack([255 - RGB, np.zeros_like(GREY)])


# --- others --------------------------------------------------------------------------------------


def bmp(*, upside_down: bool = False) -> bytes:
    """A BMP, if need be with its rows from the top."""
    data = bytearray(encoded(RGB, "BMP"))
    if upside_down:
        stride = -(-3 * WIDTH // 4) * 4
        rows = [bytes(data[54 + stride * row :][:stride]) for row in range(HEIGHT)]
        data[22:26] = struct.pack("<i", -HEIGHT)
        data[54:] = b"".join(reversed(rows))
    return bytes(data)


def run_length_bmp() -> bytes:
    """A BMP of 8 bits, of which equal neighbours are told together; here each value is alone."""
    runs = b"".join(b"".join(b"\1" + bytes([value]) for value in row) + b"\0\0" for row in GREY[::-1]) + b"\0\1"
    palette = b"".join(bytes([value] * 3) + b"\0" for value in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + 1024 + len(runs), 0, 0, 54 + 1024) + head + palette + runs


def webp(**options: Any) -> bytes:
    """A WebP that loses nothing."""
    return encoded(RGB, "WEBP", lossless=True, **options)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
_FORM = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
WAVE = b"RIFF" + struct.pack("<I", 40) + b"WAVE" + _FORM + b"data" + struct.pack("<I", 4) + bytes(4)

OTHERS: Mapping[str, Callable[[], Sound]] = {
    "bmp": lambda: Sound(bmp(), RGB),
    "bmp from the top": lambda: Sound(bmp(upside_down=True), RGB),
    "bmp of run lengths": lambda: Sound(run_length_bmp(), spread(GREY)),
    "bmp of a palette": lambda: Sound(encoded(GREY, "BMP", "P"), spread(GREY)),
    "gif": lambda: Sound(encoded(GREY, "GIF"), spread(GREY)),
    "gif, animated": lambda: Sound(_animated_gif(), spread(GREY)),
    "webp": lambda: Sound(webp(), RGB),
    "webp, animated": lambda: Sound(animated("WEBP", lossless=True), RGB),
    "webp, turned": lambda: Sound(webp(exif=exif(3, 1, b"\6\0")), TURNED),
    "webp, turned by a long": lambda: Sound(webp(exif=exif(4, 1, b"\6\0\0\0")), TURNED),
    "webp, turned by XMP": lambda: Sound(webp(xmp=XMP), TURNED),
    "webp, a damaged profile": lambda: Sound(webp(icc_profile=b"x" * 99), RGB),
    "webp, cut": lambda: Sound(webp()[:-20], kind="Truncated"),
    "webp, its beginning": lambda: Sound(webp()[:10], kind="Truncated"),
    "a sound": lambda: Sound(WAVE, kind="Unreadable"),
    "a film": lambda: Sound(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), kind="Unreadable"),
    "a film in pieces": lambda: Sound(b"RIFF\0\1\0\0AVI LIST" + bytes(99), kind="Unreadable"),
    "a document": lambda: Sound(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(99), kind="Unreadable"),
    "a page": lambda: Sound(b"<!DOCTYPE html><html><body>404</body></html>", kind="Unreadable"),
    "a pointer": lambda: Sound(POINTER, kind="Unreadable"),
    "JPEG 2000": lambda: Sound(encoded(RGB, "JPEG2000"), kind="Unreadable"),
    "zeros": lambda: Sound(bytes(4096), kind="Unreadable"),
    "text": lambda: Sound(b"hello", kind="Unreadable"),
    "text like a bmp": lambda: Sound(b"BMW cars", kind="Unreadable"),
    "nothing": lambda: Sound(b"", kind="Empty"),
}


def _animated_gif() -> bytes:
    buffer, other = io.BytesIO(), Image.fromarray(255 - GREY)
    Image.fromarray(GREY).save(buffer, "GIF", save_all=True, append_images=[other])
    return buffer.getvalue()


SOUND: dict[str, Callable[[], Sound]] = {
    f"{kind} {name}": sound
    for kind, table in {"jpg": JPEGS, "png": PNGS, "tif": TIFFS, "other": OTHERS}.items()
    for name, sound in table.items()
}
"""By the suffix that it goes by, and what it is."""
