"""Source ``manifest``: lists of URIs, of images in any bucket.

A manifest is a text file with a URI on each line, or CSV or Parquet with a column ``uri`` and, where they are known,
``etag`` and ``bytes``. A row that says both is taken at its word; any other is looked up (a HEAD request). Relative
URIs start from the manifest's folder. The key of an image is its URI.
"""

import csv
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.schema import LISTING
from pipelines.sources.base import (
    ABSENT,
    BATCH_ROWS,
    DENIED,
    Damaged,
    ReadResult,
    Row,
    batched,
    parquet_damage_told,
    place_of,
    read_objects,
)
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.storage import THREADS, ObjectDenied, Store, StoredObject, open_store
from pipelines.storage.base import split_scheme
from pspnet_core.errors import ConfigError

SUFFIXES = (".txt", ".csv", ".parquet")
BLOCK = 2**20  # bytes of one read of a text
LOOKED_UP = 4096  # lines whose images are looked up together


class Entry(NamedTuple):
    """One line of a manifest; ``etag`` and ``bytes`` are None where it does not say."""

    uri: str
    etag: str | None = None
    bytes: int | None = None


class Manifest:
    """Images that lists name; there may be several lists."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``. What is not there has the etag ``ABSENT``, what may not be looked at ``DENIED``."""
        return batched(row for item in inputs.objects(SUFFIXES) for row in rows_named_by(item, inputs))

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``."""
        return read_objects(rows, threads=threads)


def rows_named_by(item: StoredObject, inputs: Inputs) -> Iterator[Row]:
    """The images of one manifest that are new enough; many are looked up at a time.

    Raises:
        ConfigError: it is no manifest, or a URI is none; also when all of many images that are looked up together are
            denied, as then the permissions are wrong and not one image.
    """
    folder = item.uri.rpartition("/")[0]
    entries = (
        entry._replace(uri=_absolute(entry.uri, folder), etag=(entry.etag or "").strip('"') or None)
        for entry in _entries(item)
    )
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(itertools.islice(entries, LOOKED_UP)):
            unknown = [entry for entry in some if not _is_known(entry)]
            found = dict(zip(unknown, pool.map(lambda entry: _looked_up(entry, inputs), unknown), strict=True))
            if len(found) > 1 and all(row is not None and row.etag == DENIED for row in found.values()):
                raise ConfigError(FIELD, item.uri, "none of the images that it names may be looked at: grant access")
            for entry in some:
                if _is_known(entry):
                    yield Row(entry.uri, entry.uri, str(entry.etag), int(entry.bytes or 0))
                elif (row := found[entry]) is not None:
                    yield row


def _is_known(entry: Entry) -> bool:
    return bool(entry.etag) and entry.bytes is not None


def _looked_up(entry: Entry, inputs: Inputs) -> Row | None:
    """The row of an image as it is now; None when it is too old."""
    store, path = place_of(entry.uri, entry.uri)
    try:
        found = store.look_up(path)
    except ObjectDenied:
        return Row(entry.uri, entry.uri, DENIED, 0)
    if found is None:
        return Row(entry.uri, entry.uri, ABSENT, 0)
    return Row(entry.uri, entry.uri, found.etag, found.bytes) if inputs.keeps(found.modified) else None


def _absolute(uri: str, folder: str) -> str:
    """A URI in the form in which listings write it."""
    relative = split_scheme(uri) == ("file", uri) and not uri.startswith(("/", "~"))
    return open_store(f"{folder}/{uri}" if relative else uri, field=FIELD).root


def _entries(item: StoredObject) -> Iterator[Entry]:
    store, path = place_of(item.uri, item.key)
    try:
        yield from _READERS[path.lower().rpartition(".")[2]](store, path)
    except ObjectDenied as error:
        raise _no_manifest(store, path, f"cannot be read ({error.message})") from error


def _text_entries(store: Store, path: str) -> Iterator[Entry]:
    return (Entry(line.strip()) for line in _lines(store, path) if line.strip())


def _csv_entries(store: Store, path: str) -> Iterator[Entry]:
    rows = csv.DictReader(_lines(store, path))
    try:
        if "uri" not in (rows.fieldnames or ()):
            raise _no_manifest(store, path, "has no column uri; name the columns in its first line")
        for number, row in enumerate(rows, 2):
            uri, etag, size = ((row.get(name) or "").strip() for name in ("uri", "etag", "bytes"))
            if size and not size.isdecimal():
                raise _no_manifest(store, path, f"row {number} has bytes={size}; give a whole number or nothing")
            if uri:
                yield Entry(uri, etag, int(size) if size else None)
    except csv.Error as error:
        raise _no_manifest(store, path, f"is no CSV ({error})") from error


def _parquet_entries(store: Store, path: str) -> Iterator[Entry]:
    try:
        with store.open(path) as stream, parquet_damage_told():
            file = pq.ParquetFile(stream)
            schema = pa.schema([LISTING.field(name) for name in Entry._fields if name in file.schema_arrow.names])
            if "uri" not in schema.names:
                raise _no_manifest(store, path, "has no column uri")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=schema.names):
                columns = [batch[field.name].cast(field.type).to_pylist() for field in schema]
                for row in zip(*columns, strict=True):
                    if row[0]:
                        yield Entry(**dict(zip(schema.names, row, strict=True)))
    except Damaged as error:
        raise _no_manifest(store, path, f"cannot be read ({error})") from error


_READERS = {"txt": _text_entries, "csv": _csv_entries, "parquet": _parquet_entries}
"""Suffix -> what reads such a manifest."""


def _lines(store: Store, path: str) -> Iterator[str]:
    """Lines of a UTF-8 text, as a stream."""
    with (
        store.open(path) as stream,
        io.BufferedReader(cast(io.RawIOBase, stream), BLOCK) as blocks,
        io.TextIOWrapper(blocks, "utf-8-sig", newline="") as text,
    ):
        try:
            yield from text
        except UnicodeDecodeError as error:
            raise _no_manifest(store, path, "is no text in UTF-8") from error


def _no_manifest(store: Store, path: str, remedy: str) -> ConfigError:
    return ConfigError(FIELD, store.uri_of(path), remedy)
