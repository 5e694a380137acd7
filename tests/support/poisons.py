"""Inputs that must not stop a night, each a function that plants one, and what it is to leave: one row or one omission.

A new poison is one function and one row of ``POISONS``. It is planted among good neighbours, on local disk and in a
bucket, unless it needs a file system (``ON_DISK``).
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import itertools
import os
import re
import socket
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.storage import Store
from tests.support import sound_images
from tests.support.buckets import parquet, put, tar
from tests.support.faultproxy import FaultProxy, Rule, refusal
from tests.support.webserver import serving

SIZE = (40, 32)
MANIFEST = "list.parquet"


def photo(seed: int, kind: str = "JPEG", **how: Any) -> bytes:
    """A small picture."""
    noise = np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, kind, **how)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Left:
    """What poisons are to leave.

    Attributes:
        rows: by key, a pattern of how the row's error begins; empty for one that is labelled.
        damaged: how many containers, names and folders are left out.
        left_out: how many objects and members are, by suffix.
    """

    rows: Mapping[str, str] = field(default_factory=dict)
    damaged: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Left) -> Left:
        return Left(
            rows={**self.rows, **other.rows},
            damaged=self.damaged + other.damaged,
            left_out=self.left_out + other.left_out,
        )


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where poisons are planted.

    Attributes:
        store: the folder that is the input, or that holds what a manifest names.
        server: URL of a web server that answers by the status in a path.
        proxy: in front of the bucket; on local disk there is none.
        entries: rows of the manifest.
        allow: what the manifest may name besides what lies with it.
    """

    store: Store
    server: str
    proxy: FaultProxy | None = None
    entries: list[dict[str, object]] = field(default_factory=list)
    allow: list[str] = field(default_factory=lambda: ["/dev"])

    @property
    def input(self) -> str:
        """What ``--input`` is to name."""
        return self.store.uri_of(MANIFEST if self.entries else "")

    @property
    def folder(self) -> Path:
        """The folder, on local disk."""
        return Path(self.store.root)

    def put(self, path: str, data: bytes) -> None:
        """Write an object."""
        put(self.store, path, data)

    def name(self, uri: str, *, told: bool = True) -> str:
        """Write a row into the manifest, with or without a version and a size; returns the key."""
        self.entries.append({"uri": uri, "etag": "10-1" if told else None, "bytes": 10 if told else None})
        return uri


Poison = Callable[[Ground], Left]


def image(name: str, data: bytes, error: str) -> Poison:
    """An object among images."""

    def plant(ground: Ground) -> Left:
        ground.put(name, data)
        return Left(rows={name: error})

    return plant


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A PNG of 8-bit grey with any header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def _in_memory_of_a_process(ground: Ground) -> Left:
    """Reading it gives EIO, as a bad sector does."""
    (ground.folder / "sector.jpg").symlink_to("/proc/self/mem")
    return Left(rows={"sector.jpg": "Failed: TransientStorageError: "})


def _broken_link(ground: Ground) -> Left:
    (ground.folder / "broken.jpg").symlink_to("nowhere")
    return Left(rows={"broken.jpg": "Missing: "})


def _far_future(ground: Ground) -> Left:
    path = ground.folder / "future.jpg"
    path.write_bytes(photo(50))
    os.utime(path, (3e11, 3e11))
    return Left(rows={"future.jpg": ""})


def _name_that_is_no_text(ground: Ground) -> Left:
    Path(os.fsdecode(os.fsencode(ground.folder) + b"/notes-\xe9.txt")).write_bytes(b"")
    return Left(damaged=1)


def _folders_in_folders(ground: Ground) -> Left:
    """Deeper than Python's stack, and than a path may be long."""
    here = os.open(ground.folder, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    return Left(damaged=1)


def _links_that_fork(ground: Ground) -> Left:
    """28 links, by which 2^14 ways lead to one file."""
    folders = [ground.folder / f"fork-{number:02}" for number in range(15)]
    for folder in folders:
        folder.mkdir()
    for folder, after in itertools.pairwise(folders):
        for way in "ab":
            (folder / way).symlink_to(after)
    (folders[-1] / "end.jpg").write_bytes(photo(51))
    return Left(rows={"fork-00/" + "a/" * 14 + "end.jpg": "", "fork-14/end.jpg": ""})


def _folder_named_like_a_glob(ground: Ground) -> Left:
    (ground.folder / "holiday [2024]").mkdir()
    (ground.folder / "holiday [2024]/x.jpg").write_bytes(photo(52))
    return Left(rows={"holiday [2024]/x.jpg": ""})


def _odd_files(ground: Ground) -> Left:
    """Nobody can wait for a pipe, nor read a device to its end; neither is a file."""
    os.mkfifo(ground.folder / "pipe.jpg")
    (ground.folder / "zero.jpg").symlink_to("/dev/zero")
    return Left()


def refused(status: int, code: str, error: str) -> Poison:
    """An object that is listed, and of which a GET has this answer."""

    def plant(ground: Ground) -> Left:
        assert ground.proxy
        ground.put(f"{code}.jpg", photo(60))
        ground.proxy.add(Rule(refusal(status, code), method="GET", path=f"/{code}.jpg"))
        return Left(rows={f"{code}.jpg": error})

    return plant


def archive(name: str, data: bytes, *others: str) -> Poison:
    """A container that cannot be listed, or not to its end; before that it holds members of other formats."""

    def plant(ground: Ground) -> Left:
        ground.put(name, data)
        return Left(damaged=1, left_out=Counter(others))

    return plant


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of an archive that claims anything."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def chained(count: int) -> bytes:
    """Extended headers that describe one another."""
    block = b"9 a=bcde\n".ljust(tarfile.BLOCKSIZE, b"\0")
    return (header("x", 9, tarfile.XHDTYPE) + block) * count + tar([("1.jpg", photo(1))])


def _hard_link(ground: Ground) -> Left:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as out:
        info = tarfile.TarInfo("real.jpg")
        info.size = len(photo(53))
        out.addfile(info, io.BytesIO(photo(53)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "real.jpg"
        out.addfile(link)
    ground.put("links.tar", sink.getvalue())
    return Left(rows={"links.tar/real.jpg": ""})


def _sparse_and_plain(ground: Ground) -> Left:
    """A sparse file, which is left out, and a plain one of its name behind it."""
    for name in ("sparse.tar", "sparse.tgz"):
        content = header("twice.jpg", 0, tarfile.GNUTYPE_SPARSE) + tar([("twice.jpg", photo(59))])
        ground.put(name, content if name.endswith(".tar") else gzip.compress(content))
    return Left(rows={"sparse.tar/twice.jpg": "", "sparse.tgz/twice.jpg": ""})


def sparse(name: str, blocks: int, data: bytes) -> bytes:
    """A sparse file of an archive whose map goes on for so many blocks."""
    head = bytearray(header(name, len(data), tarfile.GNUTYPE_SPARSE))
    head[482], head[483:495], head[148:156] = 1, b"%011o\0" % len(data), b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    block = (b"%011o\0" % 512 * 42).ljust(tarfile.BLOCKSIZE - 8, b"\0") + b"\1".ljust(8, b"\0")
    return bytes(head) + block * (blocks - 1) + block[:504] + bytes(8) + data.ljust(-len(data) % 512 + len(data), b"\0")


def _maps_of_sparse_files(ground: Ground) -> Left:
    """In the form of old GNU tar, and in that of pax, whose map lies in the content."""
    map_ = b"1000000000\n" + b"1\n" * 10_000
    told = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg", "GNU.sparse.realsize": "9"}
    info = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
    info.size, info.pax_headers = len(map_), told
    content = sparse("a.jpg", 300, b"x" * 700) + info.tobuf(tarfile.PAX_FORMAT)
    content += map_.ljust(-len(map_) % 512 + len(map_), b"\0") + tar([("behind.jpg", photo(62))])
    ground.put("maps.tar", content)
    ground.put("maps.tgz", gzip.compress(content))
    return Left(rows={"maps.tar/behind.jpg": "", "maps.tgz/behind.jpg": ""})


def records(content: bytes) -> bytes:
    """An archive that begins with an extended header of this content, which becomes 2^20 bytes with an end of ``=``."""
    return header("x", 2**20, tarfile.XHDTYPE) + (content * 2**20)[: 2**20 - 1] + b"=" + tar([])


def _names_without_end(ground: Ground) -> Left:
    """Some kilobytes for many megabytes of names."""
    names = [(f"{'n' * 2**19}{number}.jpg", b"x") for number in range(40)]
    ground.put("names.tgz", tar([*names, ("short.jpg", photo(61))], "names.tgz", form=tarfile.GNU_FORMAT))
    return Left(rows={"names.tgz/short.jpg": ""})


def _member_that_leads_out(ground: Ground) -> Left:
    """Hidden, as every name with a part that begins with a dot."""
    ground.put("out.tar", tar([("../../etc/x.jpg", photo(54)), ("in.jpg", photo(54))]))
    return Left(rows={"out.tar/in.jpg": ""})


def _key_that_leads_out(ground: Ground) -> Left:
    ground.put("key.parquet", parquet(pa.table({"image": [photo(55)], "key": ["../b.parquet/x"]})))
    return Left(rows={"key.parquet/../b.parquet/x": ""})


def _key_that_is_no_text(ground: Ground) -> Left:
    texts = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"]).buffers()[1:]])
    ground.put("bytes.parquet", parquet(pa.table({"image": [photo(56)], "key": texts})))
    return Left(rows={"bytes.parquet/\\xff\\xfe": ""})


def _two_columns_of_a_name(ground: Ground) -> Left:
    table = pa.Table.from_arrays([pa.array([photo(57)])] * 2, names=["image", "image"])
    ground.put("double.parquet", parquet(table))
    return Left(damaged=1)


def _no_image_column(ground: Ground) -> Left:
    ground.put("numbers.parquet", parquet(pa.table({"number": [1]})))
    return Left(damaged=1)


def _large_key(ground: Ground) -> Left:
    """A kilobyte for a gigabyte of keys; they are no names."""
    ground.put("keys.parquet", parquet(pa.table({"image": [b"x"] * 1000, "key": ["k" * 2**20] * 1000})))
    return Left(rows={f"keys.parquet/{number}": "Unreadable: " for number in range(1000)})


def _large_value(ground: Ground) -> Left:
    """A kilobyte for 18 values of 40 MB, which are no images; not all of them are held together."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x" * 40_000_000] * 18}), sink, compression="zstd")
    ground.put("values.parquet", sink.getvalue())
    return Left(rows={f"values.parquet/{number}": "Unreadable: |TooLarge: with the rows" for number in range(18)})


def entry(uri: str, error: str, *, told: bool = True) -> Poison:
    """A row of a manifest."""

    def plant(ground: Ground) -> Left:
        key = ground.name(uri.format(server=ground.server, closed=free_port()), told=told)
        if "127.0.0.1" in key:
            ground.allow.append(key)
        return Left(rows={key: error})

    return plant


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def _row_that_claims_too_little(ground: Ground) -> Left:
    """A body without a length, which goes on for longer than its row says."""
    ground.allow.append(ground.server)
    return Left(rows={ground.name(f"{ground.server}/200/endless.jpg"): "TooLarge: "})


def scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = photo(70, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


IMAGES: dict[str, Poison] = {
    "no bytes": image("empty.jpg", b"", "Empty: "),
    "text": image("text.jpg", b"hello", "Unreadable: "),
    "a cut image": image("cut.jpg", photo(1)[:-200], "Truncated: "),
    "a signature alone": image("begins.png", b"\x89PNG\r\n\x1a\n", "Truncated: "),
    "a huge claim": image("claims.png", png(2**31 - 1, 2**31 - 1), "TooLarge: "),
    "a tile of 900 million pixels": image(
        "tile.tif", sound_images.tiled(30_000, sound_images.inflating(900 * 2**20)), "TooLarge: .* in tiles of"
    ),
    "no pixels": image("none.png", png(10, 10), "Truncated: "),
    "a scan again and again": image("scans.jpg", scans(2000), "TooLarge: .* scans"),
    "text without end": image("text.png", sound_images.SOUND["png text without end"]().data, ""),
    "a damaged text": image("checksum.png", sound_images.SOUND["png a wrong checksum of a text"]().data, ""),
    "a sound": image("sound.jpg", sound_images.WAVE, "Unreadable: "),
    "an escape sequence in a name": image("a\x1b[31m\nb.jpg", b"hello", "Unreadable: "),
}
IMAGES_ON_DISK: dict[str, Poison] = {
    "a bad sector": _in_memory_of_a_process,
    "a broken link": _broken_link,
    "a time beyond the year 9999": _far_future,
    "a name that is no text": _name_that_is_no_text,
    "folders in folders": _folders_in_folders,
    "links that fork": _links_that_fork,
    "a folder named like a glob": _folder_named_like_a_glob,
    "pipes and devices": _odd_files,
}
ARCHIVES: dict[str, Poison] = {
    "no archive": archive("text.tar", b"hello"),
    "chained headers": archive("chained.tar", chained(1100)),
    "an absurd long name": archive("name.tar", header("x", 2**62, tarfile.GNUTYPE_LONGNAME) + b"x" * 4096),
    "an absurd extended header": archive("pax.tar", header("x", 2**40, tarfile.XHDTYPE) + b"x" * 4096),
    "an absurd member": archive("member.tar", header("x.bin", 2**60) + b"x" * 4096, ".bin"),
    "an absurd member, compressed": archive(
        "member.tar.gz", gzip.compress(header("x.bin", 2**60) + b"x" * 4096), ".bin"
    ),
    "a name that inflates": archive(
        "inflates.tgz", gzip.compress(header("x", 2**26, tarfile.GNUTYPE_LONGNAME) + b"x" * 2**26, 1)
    ),
    "a hard link": _hard_link,
    "a sparse file and a plain one": _sparse_and_plain,
    "names without end": _names_without_end,
    "a member that leads out": _member_that_leads_out,
    "maps of sparse files": _maps_of_sparse_files,
    "a map of a sparse file without end": archive("map.tgz", gzip.compress(sparse("x.jpg", 2**17 + 9, b""), 1)),
    "records in records": archive("records.tgz", gzip.compress(records(b"2 "), 1)),
    "a number without end": archive("digits.tgz", gzip.compress(records(b"1"), 1)),
    "large headers that describe one member": archive(
        "chain.tgz", gzip.compress((header("x", 2**19, tarfile.GNUTYPE_LONGNAME) + b"x" * 2**19) * 9, 1)
    ),
    "a long name for all": archive(
        "name-for-all.tgz",
        gzip.compress(header("x", 131_085, tarfile.XGLTYPE) + b"131085 path=" + b"p" * 2**17 + b"\n" + bytes(499)),
    ),
    "headers that describe all": archive(
        "shared.tgz", gzip.compress((header("x", 9, tarfile.XGLTYPE) + b"9 a=bcde\n".ljust(512, b"\0")) * 9000, 1)
    ),
}
TABLES: dict[str, Poison] = {
    "no table": archive("text.parquet", b"hello"),
    "a key that leads out": _key_that_leads_out,
    "a key that is no text": _key_that_is_no_text,
    "two columns of a name": _two_columns_of_a_name,
    "no image column": _no_image_column,
    "a large key": _large_key,
    "a large value": _large_value,
}
ENTRIES: dict[str, Poison] = {
    "a zero byte": entry("/dev/x\0y.jpg", "Missing: "),
    "a zero byte, to be looked up": entry("/dev/x\0z.jpg", "Missing: ", told=False),
    "an unknown scheme": entry("tape://a/b.jpg", "Denied: "),
    "an unknown scheme, to be looked up": entry("tape://a/c.jpg", "Denied: ", told=False),
    "no ftp server": entry("ftp://127.0.0.1:{closed}/a.jpg", "Failed: TransientStorageError: "),
    "no web server": entry("http://127.0.0.1:{closed}/a.jpg", "Failed: TransientStorageError: "),
    "no web server, to be looked up": entry("http://127.0.0.1:{closed}/b.jpg", "Failed: ", told=False),
    "a dead link": entry("{server}/410/a.jpg", "Missing: "),
    "a dead link, to be looked up": entry("{server}/410/b.jpg", "Missing: ", told=False),
    "a refusal": entry("{server}/451/a.jpg", "Denied: "),
    "a page that leads elsewhere": entry("{server}/302/a.jpg", "Denied: "),
    "a place that nobody allowed": entry("http://169.254.169.254/latest", "Denied: "),
    "a file that nobody allowed": entry("/etc/passwd", "Denied: ", told=False),
    "a failing server": entry("{server}/500/a.jpg", "Failed: TransientStorageError: "),
    "a device": entry("/dev/zero", "Missing: "),
    "a body without end": _row_that_claims_too_little,
}

POISONS: dict[str, dict[str, Poison]] = {
    "images": IMAGES,
    "webdataset": ARCHIVES,
    "parquet": TABLES,
    "manifest": ENTRIES,
}
"""By format."""
ON_DISK: dict[str, dict[str, Poison]] = {"images": IMAGES_ON_DISK}
"""Those that need a file system."""
IN_A_BUCKET: dict[str, dict[str, Poison]] = {
    "images": {
        "a customer's key": refused(400, "InvalidRequest", "Denied: .*InvalidRequest"),
        "a key that is disabled": refused(400, "KMS.DisabledException", "Denied: .*KMS"),
        "no permission": refused(403, "AccessDenied", "Denied: "),
        "an archive": refused(403, "InvalidObjectState", "Denied: .*restore it"),
        "a legal reason": refused(451, "UnavailableForLegalReasons", "Denied: "),
        "an internal error": refused(500, "InternalError", "Failed: TransientStorageError: "),
        "a code that speaks of all": refused(400, "ExpiredToken", "Failed: ConfigError: .*expired"),
    }
}
"""Those that need an S3 server."""


def poisons_of(source: str, *, on_disk: bool) -> dict[str, Poison]:
    """All that can be planted there."""
    return POISONS[source] | (ON_DISK if on_disk else IN_A_BUCKET).get(source, {})


def plant(ground: Ground, source: str, poisons: Mapping[str, Poison]) -> Left:
    """Plant them among good neighbours."""
    left = sum((poison(ground) for poison in poisons.values()), plant_neighbours(ground, source))
    if ground.entries:
        ground.put(MANIFEST, parquet(pa.Table.from_pylist(ground.entries)))
    return left


def check(result: Mapping[str, Any], left: Left) -> None:
    """One row for each image, those of the neighbours good, and every omission counted."""
    found = duckdb.execute("SELECT key, coalesce(error, '') FROM read_parquet(?)", [result["labels"]]).fetchall()
    rows = dict(found)
    assert len(found) == len(rows), "rows that are there twice"
    assert set(rows) == set(left.rows), sorted(set(rows) ^ set(left.rows))
    wrong = [(key, rows[key]) for key, error in left.rows.items() if not re.match(error or "$", rows[key])]
    assert not wrong, wrong
    counted = result["damaged"], result["left_out"]
    assert counted == (left.damaged, left.left_out), counted


def plant_neighbours(ground: Ground, source: str) -> Left:
    """Good images of a format."""
    good = {f"good-{number}.jpg": photo(number) for number in range(5)}
    if source == "webdataset":
        ground.put("good.tar", tar(list(good.items())))
        return Left(rows={f"good.tar/{name}": "" for name in good})
    if source == "parquet":
        ground.put("good.parquet", parquet(pa.table({"image": list(good.values()), "key": list(good)})))
        return Left(rows={f"good.parquet/{name}": "" for name in good})
    for name, data in good.items():
        ground.put(name, data)
    if source == "images":
        return Left(rows=dict.fromkeys(good, ""))
    return Left(rows={ground.name(ground.store.uri_of(name), told=False): "" for name in good})


class _ByPath(http.server.BaseHTTPRequestHandler):
    """Answers with the status that a path begins with; a body has no end."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()
        with contextlib.suppress(OSError):  # the reader has had enough
            while "endless" in self.path:
                self.wfile.write(b"x" * 2**16)
                time.sleep(0)

    def _answer(self) -> None:
        self.send_response(int(self.path.split("/")[1] or 404))
        self.send_header("Connection", "close")
        self.send_header("Location", "http://169.254.169.254/latest")  # for the statuses that redirect
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def web_server() -> contextlib.AbstractContextManager[str]:
    """The URL of a server for ``Ground``."""
    return serving(_ByPath)
