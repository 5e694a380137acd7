"""The Arrow schemas of everything that is written, and the paths where it lies.

The label table is described column by column in ``docs/schema.md``. Types are the same in every file whatever the
model, so that one glob reads across models.
"""

import datetime
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
METADATA_KEY = b"pspnet"

CLASS_STATISTIC = pa.struct(
    [
        pa.field("class_id", pa.int32()),
        pa.field("name", pa.string()),
        pa.field("pixels", pa.int64()),
        pa.field("fraction", pa.float64()),
        pa.field("confidence", pa.float32()),
    ]
)

MASKS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("mask_classes", pa.list_(pa.int32())),
        pa.field("mask_lengths", pa.list_(pa.int32())),
        pa.field("mask_png", pa.binary()),
        pa.field("confidence", pa.float32()),
        pa.field("class_stats", pa.list_(CLASS_STATISTIC)),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("labelled_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

# What a source lists, and one row of a plan.
LISTING = pa.schema([MASKS.field(name) for name in ("uri", "key", "etag", "bytes")])

CLASSES = pa.schema(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("r", pa.uint8(), nullable=False),
        pa.field("g", pa.uint8(), nullable=False),
        pa.field("b", pa.uint8(), nullable=False),
    ]
)

CLASS_STATS = pa.schema(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("images", pa.int64(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
        pa.field("fraction", pa.float64(), nullable=False),
        pa.field("confidence", pa.float32()),
        pa.field("run_id", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What the new rows of one run have in common.

    Attributes:
        run_id, made: columns ``run_id`` and ``labelled_at``.
        mask: the mask columns to fill: ``rle``, ``png`` or ``both``.
    """

    run_id: str
    made: datetime.datetime
    mask: str


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things lie below ``--output``, for one model; ``partition`` is ``<name>-<fingerprint>``."""

    partition: str

    @property
    def plans(self) -> str:
        """Folder of the plans."""
        return f"plans/model={self.partition}/"

    def plan(self, number: int) -> str:
        """One plan."""
        return f"{self.plans}{number:06d}.parquet"

    @property
    def masks(self) -> str:
        """Folder of the label table, all dates."""
        return f"masks/model={self.partition}/"

    def day(self, date: str) -> str:
        """Folder of the label table, one date."""
        return f"{self.masks}dt={date}/"

    def chunk(self, date: str, plan: int, chunk: int) -> str:
        """One chunk of the label table; the name follows from the plan alone."""
        return f"{self.day(date)}{plan:06d}-{chunk:06d}.parquet"

    @staticmethod
    def plan_of(path: str) -> int:
        """Number of the plan that a chunk of the label table belongs to."""
        return int(path.rpartition("/")[2].partition("-")[0])

    def class_stats(self, date: str, run_id: str) -> str:
        """Class statistics of one run."""
        return f"class_stats/model={self.partition}/dt={date}/{run_id}.parquet"

    @property
    def classes(self) -> str:
        """The class table."""
        return f"classes/model={self.partition}/classes.parquet"

    @staticmethod
    def run(run_id: str) -> str:
        """The record of one run."""
        return f"runs/{run_id}.json"

    @property
    def lease(self) -> str:
        """What tells who is at work."""
        return f".lease/model={self.partition}.json"


def to_parquet(
    table: pa.Table,
    *,
    row_groups: Sequence[tuple[int, int]] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> bytes:
    """A table as the bytes of a Parquet file.

    Args:
        row_groups: ``(start, stop)`` rows of each row group; by default one for all.
        metadata: kept as JSON under the key ``pspnet`` of the file's key-value metadata.
    """
    if metadata is not None:
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    # Masks do not repeat from row to row: dictionaries would only cost time there.
    repeating = [name for name in ("status", "error", "run_id") if name in table.schema.names]
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=repeating or False) as writer:
        for start, stop in row_groups if row_groups is not None else [(0, len(table))]:
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return sink.getvalue()


def metadata_of(file: pq.ParquetFile) -> dict[str, object]:
    """The ``pspnet`` metadata of a file that ``to_parquet`` wrote."""
    content: dict[str, object] = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])
    return content


def to_ipc(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream, the form in which chunks travel between stages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_ipc(data: bytes) -> pa.Table:
    """The table that ``to_ipc`` wrote."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def utc_now() -> datetime.datetime:
    """The present moment in UTC."""
    return datetime.datetime.now(datetime.timezone.utc)
