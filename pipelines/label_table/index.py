"""Index of the images in the label files: read from those files, kept in a few objects for the next run.

A ledger of 10 million images is 40,000 files of 256 rows; opening each takes minutes on object storage. So ``uri`` and
``etag`` of the rows of many files are also kept together, in hidden objects, the parts of the index. The label files
remain the truth: a part's rows of a file count only while the listing shows that file with the same etag. A file that
is new, or was written again, is read itself; one that is gone counts no more. Parts may be deleted at any time, and
one that is damaged is passed over: either costs nothing but time.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.listing import VERSION, in_runs
from pipelines.label_table.schema import Paths
from pipelines.storage import THREADS, ObjectChanged, ObjectError, ObjectMissing, Store
from pipelines.storage.arrow import damage_told, metadata_of, to_parquet
from pspnet_core.errors import ConfigError
from pspnet_core.threads import map_ahead

_PART_ROWS = 2**18  # about 30 MB in memory
_FEWEST_FILES = 64  # fewer are not worth an object: they are as quickly read themselves
_PARTS_AHEAD = 2
_FORMAT = b"label-index-1"  # enters the digests: parts of another format pass for damaged


class LabelFile(NamedTuple):
    """A label file, as it was listed, and ``uri, etag`` of its rows."""

    path: str
    etag: str
    rows: pa.Table


class LabelIndex:
    """The index over the label files of one model.

    Attributes:
        listed: numbers of the plan and the chunk of each label file that ``images`` has found, once it has begun.
    """

    def __init__(self, store: Store, paths: Paths) -> None:
        self.store, self.paths = store, paths
        self.listed: frozenset[tuple[int, int] | None] = frozenset()
        self.folder = f".index/model={paths.partition}/"

    def images(self) -> Iterator[pa.RecordBatch]:
        """``uri, etag`` of every row of every label file, in no fixed order.

        Files that no part knows are read themselves, and brought into the index when they are many.

        Raises:
            ConfigError: a file among the label files is none.
            TransientStorageError: storage does not answer.
        """
        unread = {item.key: item.etag for item in self.store.list(self.paths.masks, suffixes={".parquet"})}
        self.listed = frozenset(map(self.paths.chunk_of, unread))
        with ThreadPoolExecutor(THREADS) as pool:
            paths = [item.key for item in self.store.list(self.folder, suffixes={".parquet"})] if unread else []
            for part in map_ahead(pool, self._read_part, paths, depth=_PARTS_AHEAD):
                if part is not None:
                    yield from _known(part, unread).to_batches()
            files = map_ahead(pool, self._read_file, list(unread.items()), depth=2 * THREADS)
            there = (file for file in files if file is not None)
            for some in in_runs(there, lambda file: len(file.rows), _PART_ROWS):
                if len(some) >= _FEWEST_FILES:
                    self._write_part(some)
                yield from pa.concat_tables([file.rows for file in some]).combine_chunks().to_batches()

    def _read_file(self, listed: tuple[str, str]) -> LabelFile | None:
        """One label file; None when it is gone."""
        path, etag = listed
        try:
            return LabelFile(path, etag, read_label_file(self.store, path, VERSION.names).cast(VERSION))
        except ObjectMissing:
            return None

    def _read_part(self, path: str) -> pq.ParquetFile | None:
        """One part; None when it is gone, may not be read, or is not what it was when it was written."""
        try:
            data = self.store.read(path)
        except ObjectError:
            return None
        if _digest(data) != path.removesuffix(".parquet").rpartition("-")[2]:
            return None
        return pq.ParquetFile(pa.BufferReader(data))

    def _write_part(self, files: Sequence[LabelFile]) -> None:
        rows = pa.concat_tables([file.rows for file in files])
        data = to_parquet(rows, metadata={"files": [(file.path, file.etag, len(file.rows)) for file in files]})
        # Never the name of a part that is there: that one may be damaged.
        self.store.put_if_absent(f"{self.folder}{secrets.token_hex(8)}-{_digest(data)}.parquet", data)


def read_label_file(store: Store, path: str, columns: Collection[str]) -> pa.Table:
    """Some columns of one label file, whichever version of it is there.

    Raises:
        ObjectMissing, ObjectDenied: there is no such file; it may not be read.
        ConfigError: it is no label file.
        TransientStorageError: storage does not answer.
    """
    while True:
        try:
            with label_file_damage_told(store, path), store.open(path) as stream:
                # Threads of Arrow's own would cost more than they gain on so few rows.
                return pq.ParquetFile(stream).read(list(columns), use_threads=False).select(list(columns))
        except ObjectChanged:  # written again between two reads, by --retry-errors
            continue


def label_file_damage_told(store: Store, path: str) -> AbstractContextManager[None]:
    """Raise ConfigError for a file that does not belong among the label files, or is damaged."""
    remedy = "this is no label file: move it out of masks/"
    return damage_told(lambda reason: ConfigError(store.field, store.uri_of(path), f"{remedy} ({reason})"))


def _known(part: pq.ParquetFile, unread: dict[str, str]) -> pa.Table:
    """The rows of a part that come from files that are unread and unchanged; those files count as read then."""
    fresh, counts = [], []
    for path, etag, rows in metadata_of(part)["files"]:
        fresh.append(unread.get(path) == etag)
        counts.append(rows)
        if fresh[-1]:
            del unread[path]
    rows = part.read().replace_schema_metadata(None)
    return rows if all(fresh) else rows.filter(pa.array(np.repeat(fresh, counts)))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, person=_FORMAT).hexdigest()
