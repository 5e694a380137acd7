"""The ``Source`` protocol, the rows that sources list, and reading objects of any bucket by their URIs."""

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import pyarrow as pa

from pipelines.label_table.schema import LISTING
from pipelines.sources.inputs import Inputs
from pipelines.storage import ObjectError, Store, open_store
from pipelines.storage.base import split_scheme
from pspnet_core.errors import ImageError

ReadResult = bytes | ImageError
MAX_BYTES = 2**29  # a chunk travels in memory, and Arrow's binary columns end at 2 GiB
BATCH_ROWS = 2**16
"""Most rows of one batch of a listing."""

ABSENT = ""
"""Etag of an image that was not there when it was listed. Its row becomes an error row of kind ``Missing``; once there
is such an object, it has an etag of its own and is listed as a new version."""
DENIED = "denied"
"""Etag of an image that might not be looked at when it was listed; kind ``Denied``."""


class Damaged(Exception):
    """A file cannot be followed any further."""


class Row(NamedTuple):
    """One row of a ``LISTING`` table."""

    uri: str
    key: str
    etag: str
    bytes: int


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
        """Encoded bytes of some listed images, or why one has none (kinds ``Changed``, ``Missing``, ``Denied``...).

        Args:
            rows: of a ``LISTING`` table; best neighbours by key, as in a plan.
            threads: upper bound of concurrent reads.

        Raises:
            TransientStorageError: when the storage stays unreachable; that is no fault of an image.
        """


def batched(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Rows as a stream of batches."""
    stream = iter(rows)
    while some := list(itertools.islice(stream, BATCH_ROWS)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), LISTING, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=LISTING)


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a ``LISTING`` table, or of one that has more columns."""
    return list(map(Row, *(table[name].to_pylist() for name in Row._fields)))


@contextlib.contextmanager
def parquet_damage_told() -> Iterator[None]:
    """Raise ``Damaged`` for what Arrow raises on a bad Parquet file."""
    try:
        yield
    except pa.ArrowException as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        if error.errno is not None:  # the disk's own
            raise
        raise Damaged(str(error)) from error


def place_of(uri: str, key: str) -> tuple[Store, str]:
    """Where an object lies: the folder that its key is relative to, and its path there.

    What a manifest names has its own URI for a key, and is looked up from the top of its bucket, host or disk.
    """
    if uri != key:
        return _store(uri[: -len(key) - 1] or "/"), key
    scheme, rest = split_scheme(uri)
    if scheme == "file":
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
    wanted: dict[Store, list[tuple[int, str, str]]] = defaultdict(list)
    for index, row in enumerate(listed):
        if row.etag == ABSENT:
            results[index] = ImageError("Missing", f"there was no object {row.uri} when it was listed")
        elif row.etag == DENIED:
            results[index] = ImageError("Denied", f"{row.uri} could not be looked at when it was listed: grant access")
        elif row.bytes > MAX_BYTES:
            results[index] = too_large(row.bytes)
        else:
            store, path = place_of(row.uri, row.key)
            wanted[store].append((index, path, row.etag))
    for store, places in wanted.items():
        found = store.read_many([(path, etag) for _, path, etag in places], threads=threads)
        for (index, _, _), result in zip(places, found, strict=True):
            results[index] = explained(result) if isinstance(result, ObjectError) else result
    return [results[index] for index in range(len(listed))]


def too_large(size: int) -> ImageError:
    """Why an image of so many bytes is not read."""
    return ImageError("TooLarge", f"{size} bytes; at most {MAX_BYTES} are read")


def explained(error: ObjectError) -> ImageError:
    """The error of one object as an image's error."""
    return ImageError(error.kind, error.message)
