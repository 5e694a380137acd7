"""The Arrow schemas of everything that is written, and the paths where it lies.

The label table is described column by column in ``docs/schema.md``. Types are the same in every file whatever the
model, so that one glob reads across models.
"""

import datetime
import re
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1

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
class RowProvenance:
    """What the new rows of one run have in common.

    Attributes:
        run_id, made: columns ``run_id`` and ``labelled_at``.
        mask: the mask columns to fill: ``rle``, ``png`` or ``both``.
    """

    run_id: str
    made: datetime.datetime
    mask: str


_PLAN, _CHUNK = re.compile(r"(\d{6,9})\.parquet"), re.compile(r"dt=[^/]+/(\d{6,9})-(\d{6,9})\.parquet")

TABLES = ("plans/model=", "masks/model=", "class_stats/model=", "classes/model=")
"""How the paths of Parquet files below ``--output`` begin."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things lie below ``--output``, for one model; ``partition`` is ``<name>-<fingerprint>``."""

    partition: str

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self.partition.rpartition("-")[2]

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

    def plan_number(self, path: str) -> int | None:
        """Number of the plan at a path; None where it is none, such as a copy that a sync tool has left."""
        found = _PLAN.fullmatch(path.removeprefix(self.plans))
        return int(found[1]) if found else None

    def chunk_of(self, path: str) -> tuple[int, int] | None:
        """Numbers of the plan and the chunk of the label table at a path; None where it is none."""
        found = _CHUNK.fullmatch(path.removeprefix(self.masks))
        return (int(found[1]), int(found[2])) if found else None

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


def utc_now() -> datetime.datetime:
    """The present moment in UTC."""
    return datetime.datetime.now(datetime.timezone.utc)
