"""Source ``parquet``: rows of Parquet files that hold encoded images, or name them.

The images are column ``image`` or ``bytes``: binary, or a struct with a binary field ``bytes``, as Hugging Face writes
it. A row's member name is its number from 0, or what its column ``key`` says. A file without such a column but with
``uri`` is read like a manifest. Of a file only its footer, the keys and the row groups with wanted images are read.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.sources.base import (
    BATCH_ROWS,
    MOST_TOGETHER,
    Damaged,
    ReadResult,
    Row,
    batched,
    parquet_damage_told,
    place_of,
    read_objects,
    values_of,
)
from pipelines.sources.containers import members_of, read_members
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.sources.manifests import rows_named_by
from pipelines.storage import Store, StoredObject
from pspnet_core.errors import ConfigError, ImageError

SUFFIXES = (".parquet",)
READ_ROWS = 64
"""Rows of a row group that are in memory at a time; fewer where its images are large."""
READ_BYTES = 64 * 2**20
"""Bytes of so many rows, by the sizes in the footer."""
LONGEST_NAME = 1024
"""Bytes of a member's name, as of a key of S3; where the column says more, the row's number is its name."""
IMAGE_COLUMNS, KEY_COLUMN, URI_COLUMN = ("image", "bytes"), "key", "uri"


class ParquetRows:
    """One row per image."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``; ``bytes`` is the mean of the row group. Damage of a file is logged."""
        return batched(members_of(inputs.new_objects(SUFFIXES), lambda item: _images_of(item, inputs), inputs))

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``; ``Missing`` is also a row without bytes."""
        named = pc.equal(rows["uri"], rows["key"])  # in a column of URIs, as in a manifest
        objects = iter(read_objects(rows.filter(named), threads=threads))
        members = iter(read_members(rows.filter(pc.invert(named)), SUFFIXES, _take))
        return [next(objects if is_named else members) for is_named in named.to_pylist()]


def _images_of(item: StoredObject, inputs: Inputs) -> Iterator[Row]:
    """One row per image of a file; as ``containers.Look``."""
    store, path = place_of(item.uri, item.key)
    with store.open(path) as stream, parquet_damage_told():
        file = _opened(stream)
        if file.leaf:
            for name, size in zip(file.names(), file.mean_sizes(), strict=True):
                yield Row(f"{item.uri}/{name}", f"{item.key}/{name}", item.etag, size)
            return
        if URI_COLUMN not in file.rows.schema_arrow.names:
            raise ConfigError(FIELD, item.uri, "has no column image or bytes with encoded images, and no column uri")
    yield from rows_named_by(item, inputs)


def _image_leaf(schema: pa.Schema) -> str | None:
    """The path of the column with the images' bytes."""
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if _is_binary(kind):
                return name
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
                return f"{name}.bytes"
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _opened(stream: BinaryIO) -> "_File":
    """An open file, whose keys stay encoded by dictionary: it may repeat a large one in each row."""
    plain = pq.ParquetFile(stream)
    names = plain.schema_arrow.names
    rows = pq.ParquetFile(stream, metadata=plain.metadata, read_dictionary=[KEY_COLUMN] * (KEY_COLUMN in names))
    return _File(rows=rows, leaf=_image_leaf(plain.schema_arrow))


@dataclass(frozen=True, kw_only=True)
class _File:
    """An open file; ``leaf`` is the path of the column with its images, None where there is none."""

    rows: pq.ParquetFile
    leaf: str | None

    def names(self) -> Iterator[str]:
        """What the rows are called."""
        if KEY_COLUMN not in self.rows.schema_arrow.names:
            yield from map(str, range(self.rows.metadata.num_rows))
            return
        number = 0
        for batch in self.rows.iter_batches(BATCH_ROWS, columns=[KEY_COLUMN], use_threads=False):
            for key in values_of(batch[KEY_COLUMN]):
                yield _name(key, str(number))
                number += 1

    def mean_sizes(self) -> Iterator[int]:
        """About how many bytes each row's image has; the sizes themselves lie among the images."""
        for number in range(self.rows.metadata.num_row_groups):
            rows = self.rows.metadata.row_group(number).num_rows
            yield from itertools.repeat(max(0, self._leaf_of(number).total_uncompressed_size) // max(1, rows), rows)

    def _leaf_of(self, number: int) -> pq.ColumnChunkMetaData:
        group = self.rows.metadata.row_group(number)
        columns = (group.column(index) for index in range(group.num_columns))
        return next(column for column in columns if column.path_in_schema == self.leaf)

    def images(self, group: int) -> Iterator[bytes | None]:
        """The images of one row group, a few in memory at a time."""
        assert self.leaf
        leaf, rows = self._leaf_of(group), max(1, self.rows.metadata.row_group(group).num_rows)
        # A dictionary may repeat its largest value, of which nothing is known but the size of all, in each row.
        largest = leaf.total_uncompressed_size // (1 if leaf.has_dictionary_page else rows)
        count = max(1, min(READ_ROWS, READ_BYTES // max(1, largest)))
        for batch in self.rows.iter_batches(count, row_groups=[group], columns=[self.leaf], use_threads=False):
            column = batch[self.leaf.partition(".")[0]]
            column = pc.struct_field(column, "bytes") if self.leaf.endswith(".bytes") else column
            yield from (value.as_py() for value in column)


def _name(key: object, number: str) -> str:
    """The name of a row with this key; of one without, or with one that is too long, it is the row's number."""
    name = key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)
    return number if key is None or len(name) > LONGEST_NAME else name


def _take(store: Store, path: str, etag: str, members: Sequence[str]) -> Mapping[str, ReadResult]:
    """As ``containers.Take``."""
    try:
        with store.open(path) as stream, parquet_damage_told():
            file = _opened(stream)
            if file.leaf is None:  # another version than was listed, as will be noticed
                raise Damaged("no column with encoded images")
            return _row_bytes(file, _numbers(file, members))
    except Damaged as error:
        damage = ImageError("Truncated", f"{store.uri_of(path)} is damaged: {error}")
        return dict.fromkeys(members, damage)


def _numbers(file: _File, members: Sequence[str]) -> dict[str, int]:
    """The row of each member; of two with one name it is the first."""
    wanted = set(members)
    found: dict[str, int] = {}
    for number, name in enumerate(file.names()):
        if name in wanted:
            found.setdefault(name, number)
    return found


def _row_bytes(file: _File, numbers: Mapping[str, int]) -> dict[str, ReadResult]:
    """The images of some rows, one row group at a time."""
    counts = [file.rows.metadata.row_group(group).num_rows for group in range(file.rows.num_row_groups)]
    starts = np.cumsum([0, *counts])
    results: dict[str, ReadResult] = {}
    total = 0
    by_group = sorted(numbers.items(), key=lambda item: item[1])
    for group, items in itertools.groupby(by_group, lambda item: int(np.searchsorted(starts, item[1], "right")) - 1):
        wanted = {number - int(starts[group]): name for name, number in items}
        for place, data in enumerate(itertools.islice(file.images(group), max(wanted) + 1)):
            if place in wanted:
                total += len(data or b"")
                results[wanted[place]] = _checked(data, place + int(starts[group]), total)
    return results


def _checked(data: bytes | None, row: int, total: int) -> ReadResult:
    """What a row holds, or why it is not read; ``total`` bytes are read of its file with it."""
    if data is None:
        return ImageError("Missing", f"row {row} holds no bytes")
    if total > MOST_TOGETHER:  # the sizes that chunks are cut by are the footer's, which says little of repeated ones
        return ImageError("TooLarge", f"with the rows before it in its chunk more than {MOST_TOGETHER} bytes")
    return data
