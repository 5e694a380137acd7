"""Source ``parquet``: rows of Parquet files that hold encoded images, or name them.

The images are column ``image`` or ``bytes``: binary, or a struct with a binary field ``bytes``, as Hugging Face writes
it. A row's member name is its number from 0, or what its column ``key`` says. A file without such a column but with
``uri`` is read like a manifest. Of a file only its footer, the keys and the row groups with wanted images are read.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.sources.base import Damaged, ReadResult, Row, batched, parquet_damage_told, place_of, read_objects
from pipelines.sources.containers import members_of, read_members
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.sources.manifests import rows_named_by
from pipelines.storage import Store, StoredObject
from pspnet_core.errors import ConfigError, ImageError

log = logging.getLogger(__name__)
SUFFIXES = (".parquet",)
READ_ROWS = 64
"""Rows of a row group that are in memory at a time."""
IMAGE_COLUMNS, KEY_COLUMN, URI_COLUMN = ("image", "bytes"), "key", "uri"


class ParquetRows:
    """One row per image."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``; ``bytes`` is the mean of the row group. A damaged file is logged and left out."""
        return batched(members_of(inputs, SUFFIXES, lambda item: _images_of(item, inputs)))

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``; ``Missing`` is also a row without bytes."""
        named = pc.equal(rows["uri"], rows["key"])  # in a column of URIs, as in a manifest
        objects = iter(read_objects(rows.filter(named), threads=threads))
        members = iter(read_members(rows.filter(pc.invert(named)), SUFFIXES, _take))
        return [next(objects if is_named else members) for is_named in named.to_pylist()]


def _images_of(item: StoredObject, inputs: Inputs) -> Iterable[Row]:
    """One row per image of a file; raises as ``containers.Look``."""
    store, path = place_of(item.uri, item.key)
    try:
        with store.open(path) as stream, parquet_damage_told():
            file = pq.ParquetFile(stream)
            leaf = _image_leaf(file.schema_arrow)
            if leaf is not None:
                found = zip(_names(file), _mean_sizes(file.metadata, leaf), strict=True)
                return (Row(f"{item.uri}/{name}", f"{item.key}/{name}", item.etag, size) for name, size in found)
            if URI_COLUMN in file.schema_arrow.names:
                return rows_named_by(item, inputs)
    except Damaged as error:
        log.warning("%s is damaged (%s); it is left out", item.uri, error)
        inputs.damaged.append(item.uri)
        return ()
    raise ConfigError(FIELD, item.uri, "has no column image or bytes with encoded images, and no column uri")


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


def _names(file: pq.ParquetFile) -> Iterable[str]:
    """What the rows are called within the file."""
    numbers = map(str, range(file.metadata.num_rows))
    if KEY_COLUMN not in file.schema_arrow.names:
        return numbers
    keys = file.read([KEY_COLUMN])[KEY_COLUMN].cast(pa.string())
    return (number if key.as_py() is None else key.as_py() for number, key in zip(numbers, keys, strict=True))


def _mean_sizes(metadata: pq.FileMetaData, leaf: str) -> Iterator[int]:
    """About how many bytes each row's image has; the sizes themselves lie among the images."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(index) for index in range(group.num_columns))
        size = next(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
        yield from itertools.repeat(size // max(1, group.num_rows), group.num_rows)


def _take(store: Store, path: str, etag: str, members: Sequence[str]) -> Mapping[str, ReadResult]:
    """As ``containers.Take``."""
    try:
        with store.open(path) as stream, parquet_damage_told():
            file = pq.ParquetFile(stream)
            leaf = _image_leaf(file.schema_arrow)
            if leaf is None:  # another version than was listed, as will be noticed
                raise Damaged("no column with encoded images")
            return _row_bytes(file, leaf, _numbers(file, members))
    except Damaged as error:
        damage = ImageError("Truncated", f"{store.uri_of(path)} is damaged: {error}")
        return dict.fromkeys(members, damage)


def _numbers(file: pq.ParquetFile, members: Sequence[str]) -> dict[str, int]:
    """The row of each member; of two with one name it is the first."""
    wanted = set(members)
    found: dict[str, int] = {}
    for number, name in enumerate(_names(file)):
        if name in wanted:
            found.setdefault(name, number)
    return found


def _row_bytes(file: pq.ParquetFile, leaf: str, numbers: Mapping[str, int]) -> dict[str, ReadResult]:
    """The images of some rows, one row group at a time."""
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.cumsum([0, *counts])
    results: dict[str, ReadResult] = {}
    by_group = sorted(numbers.items(), key=lambda item: item[1])
    for group, items in itertools.groupby(by_group, lambda item: int(np.searchsorted(starts, item[1], "right")) - 1):
        wanted = {number - int(starts[group]): name for name, number in items}
        for place, data in enumerate(_column(file, leaf, group)):
            if place in wanted:
                missing = ImageError("Missing", f"row {place + int(starts[group])} holds no bytes")
                results[wanted[place]] = data.as_py() if data.is_valid else missing
    return results


def _column(file: pq.ParquetFile, leaf: str, group: int) -> Iterator[pa.Scalar]:
    """The images of one row group, a few in memory at a time."""
    for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
        column = batch[leaf.partition(".")[0]]
        yield from pc.struct_field(column, "bytes") if leaf.endswith(".bytes") else column
