"""Source ``manifest``: lists of URIs, of images in any bucket.

A manifest is a text file with a URI on each line, or CSV or Parquet with a column ``uri`` and, where they are known,
``etag`` and ``bytes``. A row that says both is taken at its word; any other is looked up (a HEAD request). Relative
URIs start from the manifest's folder. The key of an image is its URI; where that is signed, labels keep a digest of the
signature.
"""

import contextlib
import csv
import io
import itertools
import logging
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.schema import LISTING
from pipelines.process.redaction import holds_password, without_secrets
from pipelines.sources.base import (
    ABSENT,
    DENIED,
    FOREIGN,
    SECRET,
    UNKNOWN,
    Damaged,
    ReadResult,
    Row,
    batched,
    named,
    parquet_damage_told,
    place_of,
    read_objects,
    values_of,
)
from pipelines.sources.containers import members_of
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.storage import (
    THREADS,
    ObjectDenied,
    ObjectMissing,
    Store,
    StoredObject,
    TransientStorageError,
    open_store,
)
from pipelines.storage.base import split_scheme
from pspnet_core.errors import ConfigError, as_image_error, one_line

log = logging.getLogger(__name__)
SUFFIXES = (".txt", ".csv", ".parquet")
BLOCK = 2**20  # bytes of one read of a text
LOOKED_UP = 4096  # lines whose images are looked up together
SILENT = 4  # requests in a row without an answer, after which a place is asked whether it answers at all
LONGEST_LINE = 2**16  # characters
LONGEST_URI = 2**13  # characters; what goes on is cut off


class Entry(NamedTuple):
    """One line of a manifest; ``etag`` and ``bytes`` are None where it does not say."""

    uri: str
    etag: str | None = None
    bytes: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether the line says all that a listing would."""
        return bool(self.etag) and self.bytes is not None

    def row(self) -> Row:
        """The row of a line that does."""
        return named(self.uri, str(self.etag), int(self.bytes or 0))


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
        ConfigError: it is no manifest; or none of its first lines names what it may name, or may be looked at.
        TransientStorageError: nothing that its first lines name has an answer.
    """
    folder = item.uri.rpartition("/")[0]
    roots = (*_home(item.uri), *inputs.allow)
    foreign = ""
    with ThreadPoolExecutor(THREADS) as pool, contextlib.closing(_entries(item)) as found_there:
        entries = (_within(roots, _normalised(entry, folder)) for entry in found_there)
        for number in itertools.count():
            some = list(itertools.islice(entries, LOOKED_UP))
            if not some:
                break
            unknown = list(dict.fromkeys(entry.uri for entry in some if not entry.is_known))
            look_ups = _LookUps(inputs)
            found = dict(zip(unknown, pool.map(look_ups.row_of, unknown), strict=True))
            foreign = foreign or next((entry.uri for entry in some if entry.etag == FOREIGN), "")
            if number == 0:
                _check_first(item, some, found, look_ups)
            rows = (entry.row() if entry.is_known else found[entry.uri] for entry in some)
            yield from (row for row in rows if row is not None)
    if foreign:
        told = f"--allow {one_line(foreign).rpartition('/')[0]}"
        log.warning("%s names images outside its own place, which are rows of kind Denied: %s", item.uri, told)


def _check_first(
    item: StoredObject, some: Sequence[Entry], found: Mapping[str, Row | None], look_ups: "_LookUps"
) -> None:
    """Raise where the first lines are all refused, or nobody answers; one image alone may be to blame itself."""
    if all(entry.etag == FOREIGN for entry in some):
        place = one_line(some[0].uri).rpartition("/")[0]
        raise ConfigError(FIELD, item.uri, f"names images outside its own place: add --allow {place}")
    etags = {row.etag if row else "" for row in found.values()}
    if len(found) > 1 and etags == {DENIED}:
        raise ConfigError(FIELD, item.uri, "none of the images that it names may be looked at: grant access")
    if len(found) > 1 and etags == {UNKNOWN} and look_ups.away:
        assert look_ups.error
        raise look_ups.error


def _home(manifest: str) -> tuple[str, ...]:
    """What a manifest may name without being asked: what lies in its folder, in its bucket or on its host.

    Otherwise anyone who can write to a bucket could have any file of this machine read, and any address of its network.
    """
    scheme, rest = split_scheme(manifest)
    host = rest.partition("/")[0]
    if scheme == "file":
        return (manifest.rpartition("/")[0] or "/",)
    return (f"http://{host}", f"https://{host}") if scheme in ("http", "https") else (f"{scheme}://{host}",)


def _within(roots: Sequence[str], entry: Entry) -> Entry:
    """The entry, or one that is not read where it lies in none of these places, or holds a password."""
    if holds_password(entry.uri):
        return Entry(without_secrets(entry.uri), SECRET, 0)
    # On the web a path is made plain before it is asked for; in a bucket two dots are a name.
    plain = "".join(unquote(entry.uri).split())  # blanks vanish there, too
    leaves = not entry.uri.startswith("s3://") and ".." in plain.split("/")
    lies_there = any(f"{entry.uri}/".startswith(f"{root.rstrip('/')}/") for root in roots)
    return entry if lies_there and not leaves else Entry(entry.uri, FOREIGN, 0)


class _LookUps:
    """Images that are looked up together, in many threads; a place that does not answer is soon left alone.

    Attributes:
        away: places that do not answer.
        error: what the last request without an answer has raised.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.away: set[Store] = set()
        self.error: TransientStorageError | None = None
        self._silent: Counter[Store] = Counter()  # requests in a row without an answer

    def row_of(self, uri: str) -> Row | None:
        """The row of an image as it is now; None when it is too old."""
        unknown = named(uri, UNKNOWN, 0)
        try:
            store, path = place_of(uri, uri)
            if store in self.away:
                return unknown
            found = self._look_up(store, path)
        except ObjectDenied:
            return named(uri, DENIED, 0)
        except ObjectMissing:
            return named(uri, ABSENT, 0)
        except Exception as error:  # also of a URI that names no place, or that its driver does not take
            log.warning("%s cannot be looked up: %s", one_line(uri), as_image_error(error).message)
            return unknown
        if found is None:
            return named(uri, ABSENT, 0)
        return named(uri, found.etag, found.bytes) if self.inputs.keeps(found.modified) else None

    def _look_up(self, store: Store, path: str) -> StoredObject | None:
        try:
            found = store.look_up(path)
        except TransientStorageError as error:
            self.error = error
            self._silent[store] += 1
            if self._silent[store] >= SILENT and store.trouble():
                self.away.add(store)
            raise
        self._silent[store] = 0
        return found


def _normalised(entry: Entry, folder: str) -> Entry:
    """An entry with its URI in the form in which listings write it, or as it stands where it is none."""
    with contextlib.suppress(ConfigError, ValueError):
        entry = entry._replace(uri=_absolute(entry.uri, folder))
    return entry._replace(etag=(entry.etag or "").strip('"') or None)


def _absolute(uri: str, folder: str) -> str:
    relative = split_scheme(uri) == ("file", uri) and not uri.startswith(("/", "~"))
    return open_store(f"{folder}/{uri}" if relative else uri, field=FIELD).root


def _entries(item: StoredObject) -> Generator[Entry, None, None]:
    store, path = place_of(item.uri, item.key)
    try:
        yield from _READERS[path.lower().rpartition(".")[2]](store, path)
    except ObjectDenied as error:
        raise _no_manifest(store, path, f"cannot be read ({error.message})") from error


def _text_entries(store: Store, path: str) -> Iterator[Entry]:
    return (Entry(line.strip()[:LONGEST_URI]) for line in _lines(store, path) if line.strip())


def _csv_entries(store: Store, path: str) -> Iterator[Entry]:
    with contextlib.closing(_lines(store, path)) as lines:
        rows = csv.DictReader(lines)
        try:
            if "uri" not in (rows.fieldnames or ()):
                raise _no_manifest(store, path, "has no column uri; name the columns in its first line")
            for row in rows:
                uri, etag, size = ((row.get(name) or "").strip() for name in ("uri", "etag", "bytes"))
                if uri:
                    yield Entry(uri[:LONGEST_URI], etag, int(size) if re.fullmatch("[0-9]{1,18}", size) else None)
        except csv.Error as error:
            raise _no_manifest(store, path, f"is no CSV ({error})") from error


def _parquet_entries(store: Store, path: str) -> Iterator[Entry]:
    try:
        with store.open(path) as stream, parquet_damage_told():
            file = pq.ParquetFile(stream)
            schema = pa.schema([LISTING.field(name) for name in Entry._fields if name in file.schema_arrow.names])
            texts = [name for name in schema.names if pa.types.is_string(file.schema_arrow.field(name).type)]
            file = pq.ParquetFile(stream, metadata=file.metadata, read_dictionary=texts)  # which may repeat a large one
            if "uri" not in schema.names:
                raise _no_manifest(store, path, "has no column uri")
            for batch in file.iter_batches(batch_size=LOOKED_UP, columns=schema.names):
                columns = [_cast(batch[field.name], field.type) for field in schema]
                for row in zip(*columns, strict=True):
                    if row[0]:
                        yield _entry(**dict(zip(schema.names, row, strict=True)))
    except Damaged as error:
        raise _no_manifest(store, path, f"cannot be read ({error})") from error


def _entry(uri: str, etag: str | None = None, bytes: int | None = None) -> Entry:
    """An entry of values as a table may hold them."""
    return Entry(uri, etag, bytes if bytes is not None and bytes >= 0 else None)


def _cast(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """The values of a column; texts that are no UTF-8 are spelt out."""
    if not pa.types.is_string(kind):
        return list(column.cast(kind).to_pylist())
    known: dict[bytes | None, str | None] = {None: None}
    texts = []
    for value in values_of(column if pa.types.is_dictionary(column.type) else column.cast(kind).dictionary_encode()):
        if value not in known:
            known[value] = value.decode("utf-8", "backslashreplace")[:LONGEST_URI]
        texts.append(known[value])
    return texts


_READERS = {"txt": _text_entries, "csv": _csv_entries, "parquet": _parquet_entries}
"""Suffix -> what reads such a manifest."""


def _lines(store: Store, path: str) -> Generator[str, None, None]:
    """Lines of a UTF-8 text, as a stream; what is no UTF-8 is spelt out."""
    with (
        store.open(path) as stream,
        io.BufferedReader(cast(io.RawIOBase, stream), BLOCK) as blocks,
        io.TextIOWrapper(blocks, "utf-8-sig", errors="backslashreplace", newline="") as text,
    ):
        for number in itertools.count():
            line = text.readline(LONGEST_LINE)
            if number == 0 and "\0" in line:
                raise _no_manifest(store, path, "is no text in UTF-8")
            if len(line) == LONGEST_LINE:
                raise _no_manifest(store, path, f"has a line of more than {LONGEST_LINE} characters")
            if not line:
                return
            yield line


def _no_manifest(store: Store, path: str, remedy: str) -> ConfigError:
    return ConfigError(FIELD, store.uri_of(path), remedy)
