"""Files that are damaged on purpose: by their bytes, and by their structure, so that the damage gets past checksums.

A mutation takes a file and a source of chance. Those of ``BYTES`` fit all files; a new format is one row of
``STRUCTURE``: how a file falls into pieces, or what else there is to change in it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.buckets import parquet, tar
from tests.support.sound_images import SOUND, chunk

Mutation = Callable[[bytes, Random], bytes]
Piece = tuple[bytes, bytes]
"""The name of a piece of a file, and its content."""

EXTREMES = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
MOST_BYTES = 2**20
"""Larger a file is not made."""


# --- of any bytes --------------------------------------------------------------------------------


def _place(data: bytes, chance: Random) -> int:
    """Where to change something; headers are short, so half of the changes go there."""
    return chance.randrange(min(len(data), 96 if chance.random() < 0.5 else len(data)) + 1)


def _number(number: int, width: int, order: Literal["little", "big"]) -> bytes:
    return int(number % 2 ** (8 * width)).to_bytes(width, order)


def flipped(data: bytes, chance: Random) -> bytes:
    """Some bits are others."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 4, 32]) if data else 0):
        changed[min(_place(data, chance), len(data) - 1)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: Random) -> bytes:
    """The file ends early, or a piece of it is missing."""
    place = _place(data, chance)
    return data[:place] if chance.random() < 0.4 else data[:place] + data[place + chance.choice([1, 2, 4, 100]) :]


def inserted(data: bytes, chance: Random) -> bytes:
    """Something is between."""
    place, size = _place(data, chance), chance.choice([1, 2, 4, 100])
    return data[:place] + (chance.randbytes(size) if chance.random() < 0.5 else bytes(size)) + data[place:]


def repeated(data: bytes, chance: Random) -> bytes:
    """A piece is there twice, or many times."""
    place, size = _place(data, chance), chance.choice([1, 4, 64, 1024])
    return data[:place] + data[place : place + size] * chance.choice([2, 3, 200]) + data[place + size :]


def swapped(data: bytes, chance: Random) -> bytes:
    """Two pieces have changed places."""
    first, second = sorted((_place(data, chance), _place(data, chance)))
    size = min(chance.choice([1, 4, 64]), second - first)
    ends = data[second : second + size], data[first : first + size]
    return data[:first] + ends[0] + data[first + size : second] + ends[1] + data[second + size :]


def extreme(data: bytes, chance: Random) -> bytes:
    """A number, such as a length, is an extreme one."""
    width = chance.choice([1, 2, 4, 8])
    number = _number(chance.choice(EXTREMES), width, "little" if chance.random() < 0.5 else "big")
    place = _place(data, chance)
    return data[:place] + number + data[place + width :]


BYTES: Sequence[Mutation] = (flipped, cut, inserted, repeated, swapped, extreme)


# --- of pieces -----------------------------------------------------------------------------------


def of_pieces(split: Callable[[bytes], list[Piece]], join: Callable[[Piece], bytes]) -> Mutation:
    """Pieces are dropped, doubled, swapped, or changed inside; lengths and checksums are right again afterwards."""

    def mutate(data: bytes, chance: Random) -> bytes:
        pieces = split(data)
        if not pieces:
            return data
        here, there = chance.randrange(len(pieces)), chance.randrange(len(pieces))
        name, content = pieces[here]
        match chance.choice(["drop", "double", "many", "swap", "inside", "inside", "inside", "name"]):
            case "drop":
                del pieces[here]
            case "double":
                pieces.insert(there, pieces[here])
            case "many":
                pieces[here:here] = [pieces[here]] * chance.choice([10, 300])
            case "swap":
                pieces[here], pieces[there] = pieces[there], pieces[here]
            case "inside":
                pieces[here] = name, chance.choice(BYTES)(content, chance)
            case _:
                pieces[here] = flipped(name, chance), content
        return b"".join(map(join, pieces))

    return mutate


def _png_pieces(data: bytes) -> list[Piece]:
    pieces, at = [(b"", data[:8])], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        pieces.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return pieces


def _png_piece(piece: Piece) -> bytes:
    return chunk(*piece) if piece[0] else piece[1]


def _jpeg_pieces(data: bytes) -> list[Piece]:
    pieces, at = [(b"", data[:2])], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):
        size = max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        pieces.append((data[at : at + 2], data[at + 4 : at + 2 + size]))
        at += 2 + size
    return [*pieces, (b"", data[at:])]


def _jpeg_piece(piece: Piece) -> bytes:
    name, content = piece
    return name + struct.pack(">H", min(len(content) + 2, 65_535)) + content if name else content


def _riff_pieces(data: bytes) -> list[Piece]:
    pieces, at = [(b"", data[:12])], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        pieces.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return pieces


def _riff_piece(piece: Piece) -> bytes:
    name, content = piece
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) if name else content


def _tar_pieces(data: bytes) -> list[Piece]:
    pieces, at = list[Piece](), 0
    while at < len(data):
        block = data[at : at + tarfile.BLOCKSIZE]
        with contextlib.suppress(ValueError):
            size = int(block[124:135].strip(b"\0 ") or b"0", 8)
            size = min(-(-size // 512) * 512, len(data))
            pieces.append((block, data[at + 512 : at + 512 + size]))
            at += 512 + size
            continue
        pieces.append((block, b""))
        at += 512
    return pieces


def _tar_piece(piece: Piece) -> bytes:
    head, content = piece
    return mended(head) + content


def mended(head: bytes) -> bytes:
    """A header of an archive with the right checksum."""
    if len(head) != tarfile.BLOCKSIZE or not any(head):
        return head
    total = sum(head[:148]) + sum(head[156:]) + 8 * 32
    return head[:148] + b"%06o\0 " % total + head[156:]


def _line_piece(piece: Piece) -> bytes:
    return piece[1] + b"\n"


def _lines(data: bytes) -> list[Piece]:
    return [(b"", line) for line in data.split(b"\n")]


# --- of formats ----------------------------------------------------------------------------------

_FIELDS = {"name": (0, 100), "size": (124, 12), "time": (136, 12), "type": (156, 1), "link": (157, 100),
           "magic": (257, 8), "prefix": (345, 155), "sparse": (386, 97)}  # fmt: skip


def tar_field(data: bytes, chance: Random) -> bytes:
    """A field of an archive's header says something else."""
    pieces = _tar_pieces(data)
    if not pieces:
        return data
    here = chance.randrange(len(pieces))
    place, width = _FIELDS[chance.choice(list(_FIELDS))]
    number = chance.choice(EXTREMES)
    values = [
        b"%011o\0" % (number % 8**11),
        b"\x80" + (number % 256**11).to_bytes(11, "big"),
        b"\xff" * 12,
        chance.randbytes(width),
        bytes([chance.choice(b"0123457xgLKSVXN\0")]),
        chance.choice([b"../../x.jpg", b"/etc/x.jpg", b"\xff\xfe.jpg", b"a" * 100, b".jpg", b""]),
    ]
    head, content = pieces[here]
    head = head[:place] + chance.choice(values)[:width].ljust(width, b"\0") + head[place + width :]
    pieces[here] = head[: tarfile.BLOCKSIZE], content
    return b"".join(map(_tar_piece, pieces))


def tiff_tag(data: bytes, chance: Random) -> bytes:
    """A tag has another number, type, count or value."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    directory = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[directory : directory + 2], order)
    if not 0 < count < 200:
        return extreme(data, chance)
    entry = directory + 2 + 12 * chance.randrange(count)
    place, width = chance.choice([(0, 2), (2, 2), (4, 4), (8, 4), (8, 2)])
    number = chance.choice([*EXTREMES, chance.randrange(20), 256, 258, 259, 273, 279, 320])
    return data[: entry + place] + _number(number, width, order) + data[entry + place + width :]


def parquet_footer(data: bytes, chance: Random) -> bytes:
    """The footer says something else, and its length is right."""
    size = int.from_bytes(data[-8:-4], "little")
    if not 0 < size <= len(data) - 8:
        return flipped(data, chance)
    footer = chance.choice(BYTES)(data[-8 - size : -8], chance)
    return data[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def inside_gzip(mutations: Sequence[Mutation]) -> Mutation:
    """The content is another one, and its checksum is right."""

    def mutate(data: bytes, chance: Random) -> bytes:
        try:
            content = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return data
        return gzip.compress(chance.choice(mutations)(content, chance), 1)

    return mutate


_ODD_TEXTS = (b"\0", b"\x1b[31m", b"\xff\xfe", b'"', b",,,", b"\r", b"../../../etc/passwd", b"file:///etc/passwd",
              b"s3://bucket/x.jpg", b"http://127.0.0.1:9/x.jpg", b"tape://a/b.jpg", b"a" * 9000, b"-5", b"9" * 30,
              "\u202egpj.x".encode(), b"1e309", b"NaN")  # fmt: skip


def odd_text(data: bytes, chance: Random) -> bytes:
    """Some field of a line is odd."""
    lines = data.split(b"\n")
    here = chance.randrange(len(lines))
    fields = lines[here].split(b",")
    fields[chance.randrange(len(fields))] = chance.choice(_ODD_TEXTS)
    lines[here] = b",".join(fields)
    return b"\n".join(lines)


_TAR = (of_pieces(_tar_pieces, _tar_piece), tar_field, tar_field)
_TEXT = (of_pieces(_lines, _line_piece), odd_text, odd_text)

STRUCTURE: dict[str, Sequence[Mutation]] = {
    ".png": (of_pieces(_png_pieces, _png_piece),),
    ".jpg": (of_pieces(_jpeg_pieces, _jpeg_piece),),
    ".webp": (of_pieces(_riff_pieces, _riff_piece),),
    ".tif": (tiff_tag,),
    ".tar": _TAR,
    ".tgz": (inside_gzip((*_TAR, *BYTES)),) * 2,
    ".parquet": (parquet_footer,),
    ".txt": _TEXT,
    ".csv": _TEXT,
}
"""By suffix; of a suffix that is not here there are ``BYTES`` alone."""


def mutated(data: bytes, suffix: str, chance: Random) -> bytes:
    """The file with one change or some."""
    for _ in range(chance.choice([1, 1, 2, 3, 6])):
        known = STRUCTURE.get(suffix, BYTES) if chance.random() < 0.6 else BYTES
        data = chance.choice(known)(data, chance)[:MOST_BYTES]
    return data


# --- what is mutated -----------------------------------------------------------------------------


def image_seeds() -> list[tuple[str, bytes]]:
    """Suffix and content of sound images of every format, small ones."""
    sounds = [sound() for sound in SOUND.values()]
    files = [sound.data for sound in sounds if sound.pixels is not None and len(sound.data) < 40_000]
    return [(_suffix(data), data) for data in files]


def _suffix(data: bytes) -> str:
    suffixes = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"BM": ".bmp", b"GI": ".gif"}
    return suffixes.get(data[:2], ".tif")


def archive_seeds(images: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Suffix and content of archives of these images, of each form of tar, and with what else there may be."""
    members = [*images.items(), ("a/" * 60 + "long.jpg", next(iter(images.values()))), ("label.json", b"{}")]
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return [(suffix, tar(members, f"x{suffix}", form=form)) for suffix in (".tar", ".tgz") for form in forms]


def parquet_seeds(images: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Suffix and content of Parquet files of these images, encoded in several ways."""
    contents, keys = list(images.values()), list(images)
    structs = [{"bytes": data, "path": None} for data in contents]
    tables = [
        pa.table({"image": contents}),
        pa.table({"image": structs, "key": keys}),
        pa.table({"bytes": pa.array(contents, pa.large_binary()), "key": pa.array(keys).dictionary_encode()}),
    ]
    plain = [parquet(table, row_group_size=2) for table in tables]
    return [(".parquet", data) for data in (*plain, *map(_compressed, tables))]


def _compressed(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", data_page_version="2.0", write_page_index=True)
    return sink.getvalue()


def manifest_seeds(uris: Sequence[str], size: int) -> list[tuple[str, bytes]]:
    """Suffix and content of lists of these images, some of which tell versions and sizes."""
    table = pa.table({"uri": list(uris), "etag": ["1-1"] * len(uris), "bytes": [size] * len(uris)})
    rows = [f"{uri},1-1,{size}" for uri in uris]
    return [
        (".txt", "\n".join(uris).encode()),
        (".csv", "\n".join(["uri,etag,bytes", *rows]).encode()),
        (".csv", "\n".join(["uri", *uris]).encode()),
        (".parquet", parquet(table)),
        (".parquet", parquet(table.select(["uri"]))),
    ]
