"""The listing of an input on local disk, so that it may be larger than memory.

The listing is a Parquet file in a temporary folder (``TMPDIR``). DuckDB subtracts from it what is labelled and sorts
what is left; what does not fit into its share of memory goes to the same folder.

A version of an image is known by 128 bits, the MD5 of its ``uri`` and ``etag``: for 10^8 images the odds that any two
meet are 10^-23. They are worked out anew for each comparison and are never kept.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.schema import LISTING

T = TypeVar("T")
VERSION = pa.schema([LISTING.field(name) for name in ("uri", "etag")])
"""What tells one version of an image from every other."""

MEMORY = "1GB"
"""What DuckDB may hold in memory; more goes to disk."""

_THREADS = 4  # each of DuckDB's threads needs its share of the memory
_ROWS = 2**17  # of one row group, of one insertion, of one batch of an answer: some 20 MB
_ID = "md5_number(length(etag) || ':' || etag || uri)"  # the length keeps apart what is alike only when joined


class Listing:
    """A listing on local disk, of any length. Holds no memory between two calls; ``spool`` makes one.

    Attributes:
        images: how many there are.
    """

    def __init__(self, folder: str, batches: Iterable[pa.RecordBatch]) -> None:
        self._folder, self._file = folder, f"{folder}/listing.parquet"
        self.images = 0
        # Quick to write: it is read a few times at most.
        options = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(self._file, LISTING, **options) as writer:
            for rows in _together(batches, LISTING):
                writer.write_table(rows)
                self.images += len(rows)

    def pending(self, labelled: Iterable[pa.RecordBatch], limit: int) -> pa.Table:
        """What is not labelled yet, each version of an image once: the first ``limit`` of them by key.

        Args:
            labelled: ``uri, etag`` of what is labelled, in any order.

        Returns:
            A ``LISTING`` table, sorted by key (the bytes of its UTF-8).
        """
        with self._database() as database:
            _load_ids(database, labelled)
            found = database.sql(
                f"""
                WITH unlabelled AS (SELECT min(place) AS place FROM listing ANTI JOIN versions USING (id) GROUP BY id)
                SELECT uri, key, etag, bytes FROM listing JOIN unlabelled USING (place)
                ORDER BY key, uri, etag LIMIT {limit}
                """
            )
            return found.to_arrow_table(batch_size=_ROWS).cast(LISTING)

    def absent(self, images: Iterable[pa.RecordBatch]) -> int:
        """How many of some images (``uri, etag``) are not listed."""
        with self._database() as database:
            _load_ids(database, images)
            (count,) = database.execute("SELECT count(*) FROM versions ANTI JOIN listing USING (id)").fetchall()[0]
        return int(count)

    def _database(self) -> duckdb.DuckDBPyConnection:
        """A database with the view ``listing``: the columns of ``LISTING``, ``place`` (a row's number) and ``id``."""
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": self._folder,
            "threads": min(_THREADS, os.cpu_count() or 1),
            "preserve_insertion_order": False,  # takes memory, and what needs an order says so
        }
        database = duckdb.connect(config=settings)
        rows = database.read_parquet(self._file, file_row_number=True)
        rows.project(f"uri, key, etag, bytes, file_row_number AS place, {_ID} AS id").create_view("listing")
        return database


@contextlib.contextmanager
def spool(batches: Iterable[pa.RecordBatch]) -> Iterator[Listing]:
    """Write a listing to a temporary folder, which goes with the context.

    Args:
        batches: of ``LISTING``, in any order.
    """
    with tempfile.TemporaryDirectory(prefix="listing-") as folder:
        yield Listing(folder, batches)


def _load_ids(database: duckdb.DuckDBPyConnection, batches: Iterable[pa.RecordBatch]) -> None:
    """Make the table ``versions``: the ``id`` of each row of ``VERSION``."""
    database.execute("CREATE TEMP TABLE versions AS SELECT id FROM listing LIMIT 0")
    for rows in _together(batches, VERSION):
        database.register("batch", rows)
        database.execute(f"INSERT INTO versions SELECT {_ID} FROM batch")
        database.unregister("batch")


def _together(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of many rows out of batches that may have few."""
    return (pa.Table.from_batches(some, schema) for some in in_runs(batches, len, _ROWS))


def in_runs(items: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """Cut a stream into runs; each but the last ends with the item by which their sizes add up to ``enough``."""
    held: list[T] = []
    total = 0
    for item in items:
        held.append(item)
        total += size(item)
        if total >= enough:
            yield held
            held, total = [], 0
    if held:
        yield held
