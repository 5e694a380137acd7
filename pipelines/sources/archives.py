"""Source ``webdataset``: images in tar archives, plain or compressed with gzip.

An archive is a stream of headers, each followed by its member's bytes; there is no table of contents. To list one, its
headers are walked. To read members of a plain one, the headers are walked once per process, their places are kept, and
neighbouring members are fetched in one ranged read. A compressed one has no places: it is streamed once per chunk, of
which a chunk's members, being neighbours, need one stretch. No archive is ever held whole.
"""

import contextlib
import functools
import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from pipelines.sources.base import Damaged, ReadResult, Row, batched, place_of
from pipelines.sources.containers import check_unchanged, members_of, read_members
from pipelines.sources.inputs import Inputs
from pipelines.storage import Store, StoredObject
from pipelines.storage.base import is_hidden
from pipelines.storage.local import LocalStore
from pspnet_core.errors import ImageError, PspnetError, one_line
from pspnet_core.images.decoding import IMAGE_SUFFIXES

log = logging.getLogger(__name__)
PLAIN, COMPRESSED = ".tar", (".tar.gz", ".tgz")
SUFFIXES = (PLAIN, *COMPRESSED)
BLOCK = 4 * 2**20
"""Bytes of one request while the headers of a remote archive are walked."""
SPAN = 8 * 2**20
"""Neighbouring members are fetched together up to so many bytes."""
GAP = 128 * 2**10
"""So many bytes between two wanted members (their neighbours' labels, say) are rather fetched than skipped."""
KNOWN_ARCHIVES = 4
"""Archives whose members' places a process remembers."""
MOST_IMAGES = 2**20
"""Images of one archive; what it holds beyond that is damage, as every process that reads it holds their places."""
LONGEST_NAME = 1024
"""Characters of a member's name, as of a key of S3."""
LONGEST_HEADER = 2**20
"""Bytes of headers that describe the next member, such as a long name."""
LONGEST_EXTENDED = 2**25
"""Bytes of an extended header, which may hold a file's attributes, such as what a Mac keeps with it."""
LONGEST_SHARED = 2**16
"""Bytes of what headers say of all members that follow; each of these gets a copy."""
LONGEST_MAP = 2**26
"""Bytes of the map of a sparse file."""
_LONGEST = dict.fromkeys((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), LONGEST_EXTENDED)
_LONGEST |= dict.fromkeys((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK), LONGEST_HEADER)
"""By the type of a header that describes others."""
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")
_USED = re.compile(rb"path|linkpath|size|GNU\.sparse\.(name|size|realsize|major|minor)")
"""Keywords that say where a member lies, and what it is."""
_OVERRUNS = (RecursionError, OverflowError, MemoryError)
"""What reading headers raises that are chained, or claim absurd sizes."""


class _Place(NamedTuple):
    """Where a member's bytes lie."""

    start: int
    stop: int


class WebDataset:
    """Members of tar archives whose names are those of images."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``. Damage of an archive is logged; what can be read of it is listed."""
        return batched(members_of(inputs.new_objects(SUFFIXES), lambda item: _images_of(item, inputs), inputs))

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``; ``Truncated`` is what lies behind the damage of an archive."""
        return read_members(rows, SUFFIXES, functools.partial(_take, threads=threads))


def _images_of(item: StoredObject, inputs: Inputs) -> Iterator[Row]:
    """One row per image of an archive; as ``containers.Look``."""
    store, path = place_of(item.uri, item.key)
    known: set[int] = set()  # hashes of names: the names themselves would take as much memory as an archive says
    doubled, unplain = _Names(), _Names()
    try:
        for name, member, _ in _walk(store, path):
            if is_hidden(name):
                continue
            if not _is_image(name):
                inputs.omissions.add_format(name)
                continue
            if not _is_plain(member) or len(name) > LONGEST_NAME:
                unplain.add(name[:LONGEST_NAME])
            elif hash(name) in known:
                doubled.add(name)
            elif len(known) == MOST_IMAGES:
                raise Damaged(f"more than {MOST_IMAGES} images: split it")
            else:
                known.add(hash(name))
                yield Row(f"{item.uri}/{name}", f"{item.key}/{name}", item.etag, member.size)
        check_unchanged(store, path, item.etag)
    finally:
        doubled.tell(item.uri, "more than once; the first of each name is taken")
        unplain.tell(item.uri, "left out: links, sparse files, or names without end")


class _Names:
    """Names for a message: the first three, and how many more there are."""

    def __init__(self) -> None:
        self.first, self.count = list[str](), 0

    def add(self, name: str) -> None:
        """One more."""
        self.count += 1
        self.first += [one_line(name)] * (self.count <= 3)

    def tell(self, uri: str, what: str) -> None:
        """Log them, if there are any."""
        if self.count:
            more = f" and {self.count - 3} more" if self.count > 3 else ""
            log.warning("%s: %s %s", uri, ", ".join(self.first) + more, what)


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(IMAGE_SUFFIXES)) and not is_hidden(name)


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _take(store: Store, path: str, etag: str, members: Sequence[str], *, threads: int) -> Mapping[str, ReadResult]:
    """As ``containers.Take``."""
    if path.lower().endswith(COMPRESSED):
        return _streamed(store, path, members)
    known = _places(store, path, etag)
    results: dict[str, ReadResult] = dict.fromkeys(members, _gone(store, path))
    spans = _spans({name: known[name] for name in members if name in known})
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda span: _fetched(store, path, span), spans):
            results |= found
    return results


def _gone(store: Store, path: str) -> ImageError:
    return ImageError("Truncated", f"{store.uri_of(path)} is damaged before this member")


def _cut(store: Store, path: str) -> ImageError:
    return ImageError("Truncated", f"{store.uri_of(path)} ends within this member")


def _streamed(store: Store, path: str, members: Sequence[str]) -> Mapping[str, ReadResult]:
    """Members of a compressed archive, in one pass that ends with the last of them."""
    results: dict[str, ReadResult] = {}
    wanted = set(members)
    try:
        for name, member, archive in _walk(store, path):
            if name in wanted and _is_plain(member):
                wanted.remove(name)
                results[name] = _cut(store, path)
                with _damage_told():
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file has one
                    content = stream.read(member.size)
                if len(content) == member.size:
                    results[name] = content
                if not wanted:
                    break
    except Damaged:
        pass  # the listing logged it; the members that are still wanted lie behind it
    return results | dict.fromkeys(wanted, _gone(store, path))


@functools.lru_cache(maxsize=KNOWN_ARCHIVES)
def _places(store: Store, path: str, etag: str) -> Mapping[str, _Place]:
    """Places of the images of a plain archive, up to its end or its damage."""
    places: dict[str, _Place] = {}
    with contextlib.suppress(Damaged):  # the listing logged it
        for name, member, _ in _walk(store, path):
            if _is_image(name) and _is_plain(member) and len(places) < MOST_IMAGES:
                places.setdefault(name, _Place(member.offset_data, member.offset_data + member.size))
    check_unchanged(store, path, etag)  # raises, so that no other version's places are kept
    return places


def _spans(places: Mapping[str, _Place]) -> Iterator[dict[str, _Place]]:
    """Groups of neighbouring members, each to be fetched in one read."""
    span: dict[str, _Place] = {}
    first = last = _Place(0, 0)
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if span and (place.start - last.stop > GAP or place.stop - first.start > SPAN):
            yield span
            span = {}
        first, last = (first if span else place), place
        span[name] = place
    if span:
        yield span


def _fetched(store: Store, path: str, span: Mapping[str, _Place]) -> dict[str, ReadResult]:
    start, stop = min(place.start for place in span.values()), max(place.stop for place in span.values())
    # Into one buffer, as what `read` gives may be put together from several requests.
    buffer = memoryview(bytearray(stop - start))
    with io.BufferedReader(cast(io.RawIOBase, store.open(path))) as stream:
        stream.seek(start)
        filled = stream.readinto(buffer)
    results: dict[str, ReadResult] = {}
    for name, place in span.items():
        whole = place.stop - start <= filled
        results[name] = bytes(buffer[place.start - start : place.stop - start]) if whole else _cut(store, path)
    return results


def _walk(store: Store, path: str) -> Iterator[tuple[str, tarfile.TarInfo, "_Archive"]]:
    """Name and header of each file and link in an archive, in its order.

    Raises:
        Damaged: it cannot be followed any further.
        ObjectError: it has changed, is gone, or may not be read.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(store.open(path))
        if not isinstance(store, LocalStore):  # where a read is a request
            stream = stack.enter_context(io.BufferedReader(cast(io.RawIOBase, stream), BLOCK))
        compressed = path.lower().endswith(COMPRESSED)
        if compressed:
            stream = cast(BinaryIO, _Ending(stack.enter_context(gzip.GzipFile(fileobj=stream))))
        with _damage_told():
            # "r|" never seeks back; "r:" skips what it need not read. Names that are no UTF-8 are spelt out.
            archive = stack.enter_context(
                _Archive.open(
                    fileobj=cast(io.BufferedReader, stream),
                    mode="r|" if compressed else "r:",
                    encoding="utf-8",
                    errors="backslashreplace",
                )
            )
        while True:
            with _damage_told():
                member = archive.next()
                if member is not None and member.size < 0:  # which an extended header said: would be walked for ever
                    raise tarfile.ReadError("a member of negative size")
            if member is None:
                return
            archive.members = []  # type: ignore[attr-defined]  # or all headers would be kept
            archive.described = 0
            if not member.isdir():
                yield member.name.removeprefix("./").lstrip("/"), member, archive


class _Header(tarfile.TarInfo):
    """Header that raises on damage, which ``TarFile`` takes for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the mark that ends an archive
            raise tarfile.ReadError(f"{error} in place of a header") from error
        # Of a header that describes the next one, all that follows would be read as that, or all memory be filled.
        if not 0 <= header.size <= _LONGEST.get(header.type, header.size):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header

    def _proc_gnulong(self, archive: "_Archive") -> tarfile.TarInfo:
        archive.count(self.size)
        member: tarfile.TarInfo = super()._proc_gnulong(archive)  # type: ignore[misc]
        return member

    def _proc_pax(self, archive: "_Archive") -> tarfile.TarInfo:
        stream = archive.fileobj
        records = _used(stream.read(self._block(self.size)), archive.pax_headers)  # type: ignore[attr-defined]
        archive.count(len(records), is_shared=self.type == tarfile.XGLTYPE)
        archive.fileobj = _Again(records, stream)
        try:
            member: tarfile.TarInfo = super()._proc_pax(archive)  # type: ignore[misc]
            return member
        finally:
            archive.fileobj = stream

    def _proc_sparse(self, archive: "_Archive") -> tarfile.TarInfo:
        """Skip the map of a sparse file, which is left out; ``TarFile`` would keep it."""
        _, is_extended, size = self._sparse_structs  # type: ignore[attr-defined]
        for _ in range(0, LONGEST_MAP, tarfile.BLOCKSIZE):
            if not is_extended:
                break
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            is_extended = len(block) == tarfile.BLOCKSIZE and block[504]
        else:
            raise tarfile.ReadError(f"a sparse file with a map of more than {LONGEST_MAP} bytes")
        self.sparse = b""  # which says that it is one
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        self.size = size
        return self

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *_: object) -> None:
        """As ``_proc_sparse``; here the map is a part of the content, which is skipped as a whole, or of the header."""
        member.sparse = b""

    _proc_gnusparse_00 = _proc_gnusparse_10


class _Archive(tarfile.TarFile):
    """An archive whose headers are bounded together, as those of a compressed one cost nothing.

    Attributes:
        described: bytes of headers that describe the next member.
    """

    tarinfo = _Header
    described = 0

    def count(self, size: int, *, is_shared: bool = False) -> None:
        """Count a header that describes the next member, or all that follow; raises ReadError for one too many."""
        self.described += size
        shared = size + sum(len(key) + len(value) for key, value in self.pax_headers.items()) if is_shared else 0
        if self.described > LONGEST_HEADER or shared > LONGEST_SHARED:
            raise tarfile.ReadError("too many headers that describe others")


class _Again:
    """A stream from which something has been read, which it gives once more."""

    def __init__(self, data: bytes, stream: Any) -> None:
        self.data, self.stream = data, stream

    def read(self, size: int) -> bytes:
        """What was read, and then what follows."""
        data, self.data = self.data, b""
        return data or cast(bytes, self.stream.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _used(records: bytes, shared: Mapping[str, str]) -> bytes:
    """Return those records of an extended header that are made use of; ``shared`` is what former ones say of all.

    A record is ``<its length> <keyword>=<value>`` and a line break (POSIX.1-2008, pax).

    Raises:
        ReadError: damaged ones, with which ``tarfile`` may take hours or all memory.
    """
    place, used = 0, bytearray()
    is_binary = shared.get("hdrcharset") == "BINARY"
    while place < len(records) and records[place]:
        match, start = _RECORD.match(records, place), place
        place += int(match[1]) if match else 0
        if not match or place < match.end() or records[place - 1 : place] != b"\n":
            raise tarfile.ReadError("a damaged extended header")
        if match[2] == b"hdrcharset":
            is_binary = records[match.end() : place - 1] == b"BINARY"
        elif _USED.fullmatch(match[2]):
            used += records[start:place]
    # There has to be one, and in front, since ``tarfile`` looks for it from each digit of what comes before.
    return (b"21 hdrcharset=BINARY\n" if is_binary else b"20 hdrcharset=UTF-8\n") + used + b"\0"


class _Ending:
    """A stream that raises at its end: ``tarfile`` would go on skipping what a member claims to hold beyond it."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, at least one. Raises EOFError."""
        data = self.stream.read(size)
        if not data:
            raise EOFError("the file ends early")
        return data


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Raise ``Damaged`` for what ``tarfile`` and ``gzip`` raise on bad data."""
    try:
        yield
    except PspnetError:  # the storage's, some of which are ValueErrors too
        raise
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, *_OVERRUNS) as error:
        raise Damaged(str(error)[:200]) from error  # gzip shows all that it got
