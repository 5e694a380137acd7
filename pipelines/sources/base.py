"""The ``Source`` protocol, the rows that sources list, and reading objects of any bucket by their URIs."""

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.label_table.schema import LISTING
from pipelines.process.redaction import without_secrets
from pipelines.sources.inputs import Inputs
from pipelines.storage import ObjectMissing, Store, open_store
from pipelines.storage.arrow import damage_told
from pipelines.storage.base import Request, split_scheme
from pspnet_core.errors import ImageError

ReadResult = bytes | Exception
"""The bytes of an image, or why it has none: an ImageError or ObjectError, or what else its reading has raised."""
MAX_BYTES = 2**29  # a chunk travels in memory, and Arrow's binary columns end at 2 GiB
UNSIZED_BYTES = 2**26
"""Most bytes of an image whose size the listing did not tell."""
MOST_TOGETHER = 2**29
"""Most bytes of such images in a chunk, which has been cut without regard to them."""
BATCH_ROWS = 2**16
"""Most rows of one batch of a listing."""

ABSENT = ""
"""Etag of an image that was not there when it was listed. Its row becomes an error row of kind ``Missing``; once there
is such an object, it has an etag of its own and is listed as a new version."""
DENIED = "denied"
"""Etag of an image that might not be looked at when it was listed; kind ``Denied``."""
FOREIGN = "foreign"
"""Etag of an image that a manifest names and may not name; kind ``Denied``."""
SECRET = "secret"
"""Etag of an image whose URI holds a password; kind ``Denied``."""
UNKNOWN = "unknown"
"""Etag of an image whose storage did not answer when it was listed, or whose URI names none; kind ``Failed``."""


class Damaged(Exception):
    """A file cannot be followed any further."""


class Row(NamedTuple):
    """One row of a ``LISTING`` table."""

    uri: str
    key: str
    etag: str
    bytes: int


def named(uri: str, etag: str, size: int) -> Row:
    """The row of an image that a manifest names. Its key is the URI as it is read; ``uri``, which labels keep, gives
    nobody access."""
    return Row(without_secrets(uri), uri, etag, size)


def is_named(uri: str, key: str) -> bool:
    """Whether it is a manifest that names an image of these."""
    return uri == key or uri == without_secrets(key)


class Source(Protocol):
    """One input format. All that ``read`` needs is in the rows: a task that reads a plan knows no flags."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """All images of the inputs, as a stream of ``LISTING`` batches of at most ``BATCH_ROWS`` rows.

        An image that several inputs hold comes once. One that a format itself names twice may come twice; a plan
        has each ``(uri, etag)`` once. The order is that of the storage, and must not be relied on.
        ``bytes`` may be an estimate where the format does not tell the size of an image.

        Raises:
            ConfigError: an input is not there, may not be listed, or is of another format.
            TransientStorageError: storage does not answer.
        """

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """Encoded bytes of some listed images, or why one has none; no image's error keeps another from being read.

        Args:
            rows: of a ``LISTING`` table; best neighbours by key, as in a plan.
            threads: upper bound of concurrent reads.
        """


def batched(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Rows as a stream of batches."""
    stream = iter(rows)
    while some := list(itertools.islice(stream, BATCH_ROWS)):
        try:
            yield _batch(some)
        except (OverflowError, UnicodeEncodeError):  # what an answer of a server may hold
            yield _batch([_encodable(row) for row in some])


def _batch(rows: Sequence[Row]) -> pa.RecordBatch:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), LISTING, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _encodable(row: Row) -> Row:
    uri, key, etag = (text.encode("utf-8", "backslashreplace").decode() for text in (row.uri, row.key, row.etag))
    return Row(uri, key, etag, max(0, min(row.bytes, 2**62)))


def values_of(column: pa.Array) -> Iterator[Any]:
    """The values of a column that may be encoded by a dictionary, of which only those that occur are taken; texts as
    bytes, since they may be damaged."""
    if not pa.types.is_dictionary(column.type):
        yield from (value.as_py() for value in column)
        return
    places = pc.unique(column.indices).drop_null()
    values = column.dictionary.cast(pa.large_binary()).take(places).to_pylist()
    known = dict(zip(places.to_pylist(), values, strict=True))
    yield from (None if place is None else known[place] for place in column.indices.to_pylist())


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a ``LISTING`` table, or of one that has more columns."""
    return list(map(Row, *(table[name].to_pylist() for name in Row._fields)))


def parquet_damage_told() -> contextlib.AbstractContextManager[None]:
    """Raise ``Damaged`` for what Arrow raises on a bad Parquet file."""
    return damage_told(Damaged)


def place_of(uri: str, key: str) -> tuple[Store, str]:
    """Where an object lies: the folder that its key is relative to, and its path there.

    What a manifest names has its own URI for a key, and is looked up from the top of its bucket, host or disk.

    Raises:
        ConfigError: the URI names no place.
        ObjectMissing: no file can have such a name.
    """
    if not is_named(uri, key):
        return _store(uri[: -len(key) - 1] or "/"), key
    scheme, rest = split_scheme(key)
    if scheme == "file":
        if "\0" in rest:
            raise ObjectMissing(uri, f"{uri} is the name of no file")
        return _store("/"), rest.lstrip("/")
    top, _, path = rest.partition("/")
    return _store(f"{scheme}://{top}"), path


@functools.lru_cache(maxsize=1024)
def _store(root: str) -> Store:
    return open_store(root, field="input")


def read_objects(rows: pa.Table, *, threads: int) -> list[ReadResult]:
    """Images that are an object each; as ``Source.read``."""
    listed = rows_of(rows)
    results: dict[int, ReadResult] = {}
    wanted: dict[tuple[Store, bool], dict[int, Request]] = defaultdict(dict)
    for index, row in enumerate(listed):
        try:
            store, path = _readable(row)
            wanted[store, bool(row.bytes)][index] = path, row.etag, row.bytes or UNSIZED_BYTES
        except Exception as error:
            results[index] = error
    for (store, is_sized), requests in wanted.items():
        results |= (_read if is_sized else _read_unsized)(store, requests, threads)
    return [results[index] for index in range(len(listed))]


def _read(store: Store, requests: Mapping[int, Request], threads: int) -> dict[int, ReadResult]:
    return dict(zip(requests, store.read_many(list(requests.values()), threads=threads), strict=True))


def _read_unsized(store: Store, requests: Mapping[int, Request], threads: int) -> dict[int, ReadResult]:
    """As ``_read``, a few at a time, and no more of them than may be held together."""
    results: dict[int, ReadResult] = {}
    held, left = 0, iter(requests.items())
    while some := dict(itertools.islice(left, threads)):
        if held > MOST_TOGETHER:
            too_many = ImageError("TooLarge", f"its size was not told, and others of its chunk have {held} bytes")
            results |= dict.fromkeys(some, too_many)
            continue
        found = _read(store, some, threads)
        held += sum(len(result) for result in found.values() if isinstance(result, bytes))
        results |= found
    return results


def _readable(row: Row) -> tuple[Store, str]:
    """The place of an image, unless its row says already that it cannot be read."""
    if row.etag == ABSENT:
        raise ImageError("Missing", f"there was no object {row.uri} when it was listed")
    if row.etag == DENIED:
        raise ImageError("Denied", f"{row.uri} could not be looked at when it was listed: grant access")
    if row.etag == FOREIGN:
        raise ImageError("Denied", f"{row.uri} lies outside what its manifest may name: --allow that place")
    if row.etag == SECRET:
        raise ImageError("Denied", f"{row.uri} holds a password, which would be kept: put it into ~/.netrc")
    store, path = place_of(row.uri, row.key)  # which says more of a URI that names none
    if row.etag == UNKNOWN:
        raise ImageError("Failed", f"{row.uri} did not answer when it was listed")
    if row.bytes > MAX_BYTES:
        raise too_large(row.bytes)
    return store, path


def too_large(size: int) -> ImageError:
    """Why an image of so many bytes is not read."""
    return ImageError("TooLarge", f"{size} bytes; at most {MAX_BYTES} are read")
