"""Source ``manifest``: lists of URIs, of images in any bucket.

A manifest is a text file with a URI on each line, or CSV or Parquet with a column ``uri`` and, where they are known,
``etag`` and ``bytes``. A row that says both is taken at its word; any other is looked up (a HEAD request). Relative
URIs start from the manifest's folder. The key of an image is its URI. What ``Inputs.may_reach`` refuses has the etag
``DENIED``.
"""

import contextlib
import csv
import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.schema import LISTING
from pipelines.sources.base import (
    ABSENT,
    DENIED,
    UNKNOWN,
    Damaged,
    ReadResult,
    Row,
    batched,
    parquet_damage_told,
    place_of,
    read_objects,
)
from pipelines.sources.containers import members_of
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.storage import THREADS, ObjectDenied, Store, StoredObject, TransientStorageError, open_store
from pipelines.storage.base import split_scheme
from pspnet_core.errors import ConfigError, as_image_error, one_line

log = logging.getLogger(__name__)
SUFFIXES = (".txt", ".csv", ".parquet")
BLOCK = 2**20  # bytes of one read of a text
LOOKED_UP = 4096  # lines whose images are looked up together
SILENT = 4  # requests without an answer, after which a place is not asked again among these
LONGEST_LINE = 2**16  # characters


class Entry(NamedTuple):
    """One line of a manifest; ``etag`` and ``bytes`` are None where it does not say."""

    uri: str
    etag: str | None = None
    bytes: int | None = None


class Manifest:
    """Images that lists name; there may be several lists."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``. What is not there has the etag ``ABSENT``, what may not be looked at ``DENIED``, and what
        does not answer ``UNKNOWN``."""
        return batched(members_of(inputs.objects(SUFFIXES), lambda item: rows_named_by(item, inputs), inputs))

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``."""
        return read_objects(rows, threads=threads)


def rows_named_by(item: StoredObject, inputs: Inputs) -> Iterator[Row]:
    """The images of one manifest that are new enough; many are looked up at a time.

    Raises:
        ConfigError: it is no manifest; also when all of many images that are looked up together are denied, as then the
            permissions are wrong and not one image.
        TransientStorageError: none of many images that are looked up together has an answer.
    """
    folder = item.uri.rpartition("/")[0]
    entries = (_refused_or(_normalised(entry, folder), inputs, item.uri) for entry in _entries(item))
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(itertools.islice(entries, LOOKED_UP)):
            unknown = list(dict.fromkeys(entry.uri for entry in some if not _is_known(entry)))
            look_ups = _LookUps(inputs)
            found = dict(zip(unknown, pool.map(look_ups.row_of, unknown), strict=True))
            look_ups.check(item, list(found.values()))
            if all(entry.etag == DENIED for entry in some):
                example = one_line(some[0].uri)
                raise ConfigError(FIELD, item.uri, f"may name nothing of what it names ({example}): --allow that place")
            for entry in some:
                if _is_known(entry):
                    yield Row(entry.uri, entry.uri, str(entry.etag), int(entry.bytes or 0))
                elif (row := found[entry.uri]) is not None:
                    yield row


def _refused_or(entry: Entry, inputs: Inputs, manifest: str) -> Entry:
    """The entry, or one that cannot be read where its manifest may not name it."""
    return entry if inputs.may_reach(entry.uri, manifest) else entry._replace(etag=DENIED, bytes=0)


def _is_known(entry: Entry) -> bool:
    return bool(entry.etag) and entry.bytes is not None


class _LookUps:
    """Images that are looked up together, in many threads; a place that does not answer is soon left alone."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.silent: Counter[Store] = Counter()  # requests without an answer
        self.error: TransientStorageError | None = None

    def row_of(self, uri: str) -> Row | None:
        """The row of an image as it is now; None when it is too old."""
        unknown = Row(uri, uri, UNKNOWN, 0)
        try:
            store, path = place_of(uri, uri)
            if self.silent[store] >= SILENT:
                return unknown
            found = self._look_up(store, path)
        except ObjectDenied:
            return Row(uri, uri, DENIED, 0)
        except Exception as error:  # also of a URI that names no place, or that its driver does not bear
            log.warning("%s cannot be looked up: %s", one_line(uri), as_image_error(error).message)
            return unknown
        if found is None:
            return Row(uri, uri, ABSENT, 0)
        return Row(uri, uri, found.etag, found.bytes) if self.inputs.keeps(found.modified) else None

    def _look_up(self, store: Store, path: str) -> StoredObject | None:
        try:
            return store.look_up(path)
        except TransientStorageError as error:
            self.silent[store] += 1
            self.error = error
            raise

    def check(self, item: StoredObject, found: Sequence[Row | None]) -> None:
        """Raise where nobody has answered, or all have refused; one image alone may be to blame itself."""
        if len(found) > 1 and all(row and row.etag == DENIED for row in found):
            raise ConfigError(FIELD, item.uri, "none of the images that it names may be looked at: grant access")
        if self.error and len(found) > 1 and all(row and row.etag == UNKNOWN for row in found):
            raise self.error


def _normalised(entry: Entry, folder: str) -> Entry:
    """An entry with its URI in the form in which listings write it, or as it stands where it is none."""
    with contextlib.suppress(ConfigError, ValueError):
        entry = entry._replace(uri=_absolute(entry.uri, folder))
    return entry._replace(etag=(entry.etag or "").strip('"') or None)


def _absolute(uri: str, folder: str) -> str:
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
            for batch in file.iter_batches(batch_size=LOOKED_UP, columns=schema.names):
                columns = [_cast(batch[field.name], field.type) for field in schema]
                for row in zip(*columns, strict=True):
                    if row[0]:
                        yield Entry(**dict(zip(schema.names, row, strict=True)))
    except Damaged as error:
        raise _no_manifest(store, path, f"cannot be read ({error})") from error


def _cast(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """The values of a column; texts that are no UTF-8 are spelt out."""
    if not pa.types.is_string(kind):
        return list(column.cast(kind).to_pylist())
    texts = column.cast(pa.binary()).to_pylist()
    return [None if text is None else text.decode("utf-8", "backslashreplace") for text in texts]


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
            while line := text.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise _no_manifest(store, path, f"has a line of more than {LONGEST_LINE} characters")
                yield line
        except UnicodeDecodeError as error:
            raise _no_manifest(store, path, "is no text in UTF-8") from error


def _no_manifest(store: Store, path: str, remedy: str) -> ConfigError:
    return ConfigError(FIELD, store.uri_of(path), remedy)
