"""Packed shards: Parquet files of encoded images and masks, made to read one row at random or all in a row.

::

    shards/<number>.parquet   key, image, mask, split: rows of one split, encoded files as they are
    index.parquet             one row per packed pair: where it is, and hashes of its content
    classes.json              the class table; masks hold its class ids
    card.json, card.md        the data card; card.json is written last of all, so a folder without it is unfinished

Row groups are small (``GROUP_BYTES``, one row at least) and images and masks are not compressed once more, so that a
row costs one read of about its own size. A shard's footer holds its part of the index and of the card.
"""

import functools
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.datasets.dataset import Dataset, LayoutOptions, Pair, PairError, Sample, by_split
from pipelines.storage import ObjectMissing, Store
from pipelines.storage.arrow import METADATA_KEY, to_parquet
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable

GROUP_BYTES = 256 * 1024
"""Images and masks of a row group, in bytes, unless one row has more."""
OPEN_SHARDS = 64
"""Footers that a process remembers."""

INDEX_FILE, CLASSES_FILE, CARD_FILE, CARD_TEXT = "index.parquet", "classes.json", "card.json", "card.md"

SHARD = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("image_hash", pa.string(), nullable=False),
        pa.field("mask_hash", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRow:
    """One row of the index; ``bytes`` are those of image and mask together."""

    key: str
    split: str
    shard: int
    row: int
    bytes: int
    image_hash: str
    mask_hash: str


def shard_path(number: int) -> str:
    """Return the path of a shard."""
    return f"shards/{number:06d}.parquet"


class ShardWriter:
    """Collects rows into the bytes of one shard, a row group at a time."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        plain = {"key": "zstd", "image": "none", "mask": "none", "split": "zstd"}
        self._writer = pq.ParquetWriter(
            self._sink, SHARD, compression=plain, use_dictionary=False, write_statistics=["key", "split"]
        )
        self._rows: list[dict[str, object]] = []
        self._bytes = 0

    def add(self, key: str, image: bytes, mask: bytes, split: str) -> None:
        """Append a row."""
        size = len(image) + len(mask)
        if self._rows and self._bytes + size > GROUP_BYTES:
            self._flush()
        self._rows.append({"key": key, "image": image, "mask": mask, "split": split})
        self._bytes += size

    def finish(self, metadata: str) -> bytes:
        """Return the whole file, with ``metadata`` in its footer."""
        self._flush()
        self._writer.add_key_value_metadata({METADATA_KEY.decode(): metadata})
        self._writer.close()
        return self._sink.getvalue()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SHARD), row_group_size=len(self._rows))
        self._rows, self._bytes = [], 0


def shard_metadata(store: Store, path: str) -> str:
    """Read the metadata in a shard's footer; raises as ``Store.open``."""
    with store.open(path) as stream:
        content: bytes = pq.read_metadata(stream).metadata[METADATA_KEY]
    return content.decode()


class ShardRows:
    """Reads pairs that lie in shards, as ``<shard>/<row>``."""

    def fetch(self, store: Store, pair: Pair) -> Sample:
        """As ``Reader.fetch``: one read of the row's group, and one of the footer where it is not known yet."""
        path, row = _place(pair.image)
        try:
            return self._read(store, path, row)
        except (pa.ArrowException, OSError, LookupError) as error:  # the last for a row or a column that is not there
            remedy = f"is damaged ({error}); remove it and run jobs/prepare.py again with the same flags"
            raise PairError("data", store.uri_of(path), remedy) from error

    def _read(self, store: Store, path: str, row: int) -> Sample:
        metadata, starts = _footer(store, path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        with store.open(path) as stream:
            # The columns lie side by side: with pre_buffer Arrow fetches both in one read, which a buffered stream
            # would split where it is larger than the buffer.
            file = pq.ParquetFile(getattr(stream, "raw", stream), metadata=metadata, pre_buffer=True)
            rows = file.read_row_group(group, columns=["image", "mask"], use_threads=False)
        image, mask = (rows[name][row - int(starts[group])].as_py() for name in ("image", "mask"))
        return Sample(image, mask)

    def block(self, pair: Pair) -> str:
        """As ``Reader.block``: the shard."""
        return _place(pair.image)[0]


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _footer(store: Store, path: str) -> tuple[pq.FileMetaData, NDArray[np.int64]]:
    """Read a shard's metadata, and the first row of each row group."""
    with store.open(path) as stream:
        metadata = pq.read_metadata(stream)
    rows = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=np.int64)
    return metadata, np.cumsum(rows) - rows


def write_index(entries: Iterable[IndexRow]) -> bytes:
    """Return the index as a Parquet file."""
    return to_parquet(pa.Table.from_pylist([asdict(entry) for entry in entries], schema=INDEX))


def read_shards(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``shards``: what ``jobs/prepare.py`` writes.

    Raises:
        ConfigError: the folder is not finished, or is something else.
    """
    if not store.exists(CARD_FILE):
        remedy = "not there, so the shards are not complete; run jobs/prepare.py again with the same flags"
        raise ConfigError("data", store.uri_of(CARD_FILE), remedy)
    try:
        table, listed = store.read(CLASSES_FILE), store.read(INDEX_FILE)
    except ObjectMissing as error:
        raise ConfigError("data", error.uri, "not there; prepare the data once more into an empty folder") from error
    try:
        content, index = json.loads(table), pq.read_table(io.BytesIO(listed), schema=INDEX)
    except (ValueError, pa.ArrowException, OSError) as error:
        remedy = f"is damaged ({error}); prepare the data once more into an empty folder"
        raise ConfigError("data", store.root, remedy) from error
    classes = ClassTable.from_json(content)
    pairs = (_pair_of(IndexRow(**row)) for row in index.to_pylist())
    return Dataset(store=store, classes=classes, splits=by_split(pairs), reader=ShardRows())


def _pair_of(entry: IndexRow) -> Pair:
    place = f"{shard_path(entry.shard)}/{entry.row}"
    version = f"{entry.image_hash} {entry.mask_hash}"
    return Pair(key=entry.key, image=place, mask=place, split=entry.split, version=version, bytes=entry.bytes)


def _place(path: str) -> tuple[str, int]:
    file, _, row = path.rpartition("/")
    return file, int(row)
