"""What is labelled, what is pending, and the plan: the fence that keeps labels from being lost or doubled.

The label table is the ledger. A plan is one Parquet file, written if absent: one row group per chunk of images, and in
its metadata the run id, the date and the mask format. Chunk names follow from the plan alone, so whoever carries it out
(a retry, a second driver, one that was thought dead) writes the same objects, and only the first write of each counts.
Plan n+1 is made only when every chunk of plan n is there.
"""

import datetime
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.storage import Store
from pipelines.tables import LISTING, SCHEMA_VERSION, Paths, metadata_of, to_parquet, utc_now


@dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """A chunk ends before it would pass either limit; one image alone may be larger."""

    images: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run set out to do."""

    number: int
    run_id: str
    made: datetime.datetime
    order: "Order"
    chunks: int
    images: int

    @property
    def date(self) -> str:
        """The partition ``dt=`` of its labels."""
        return self.order.date


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a plan says besides its images; whoever finishes it keeps to this, not to flags of their own.

    Attributes:
        source, input: a row of ``SOURCES``, and the URI below which the plan's keys lie.
        date: the partition ``dt=``.
        mask: ``rle``, ``png`` or ``both``.
    """

    source: str
    input: str
    date: str
    mask: str


class Ledger:
    """The state of one model's labels below an output; holds nothing in memory but where to look."""

    def __init__(self, store: Store, paths: Paths) -> None:
        self.store, self.paths = store, paths

    def latest_plan(self) -> Plan | None:
        """The plan with the highest number."""
        numbers = [int(_stem(item.key)) for item in self.store.list(self.paths.plans, suffixes={".parquet"})]
        return self._read_plan(max(numbers)) if numbers else None

    def is_finished(self, plan: Plan) -> bool:
        """Whether the plan's run has its record, which is written last."""
        return self.store.exists(self.paths.run(plan.run_id))

    def missing_chunks(self, plan: Plan) -> list[int]:
        """Chunks of the plan that are not in the label table, ascending."""
        prefix = f"{plan.number:06d}-"
        names = (_stem(item.key) for item in self.store.list(self.paths.day(plan.date), suffixes={".parquet"}))
        done = {int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
        return [chunk for chunk in range(plan.chunks) if chunk not in done]

    def labelled(self) -> pa.Table:
        """``uri, etag`` of every row of the label table."""
        columns = ["uri", "etag"]
        files = [self.store.path_of(item.key) for item in self.store.list(self.paths.masks, suffixes={".parquet"})]
        if not files:
            return LISTING.empty_table().select(columns)
        return self._dataset(files).to_table(columns=columns)

    def pending(self, listing: pa.Table) -> pa.Table:
        """The rows of a listing that are not labelled yet, by key."""
        return (
            listing.join(self.labelled(), keys=["uri", "etag"], join_type="left anti")
            .sort_by("key")
            .select(LISTING.names)
        )

    def unlisted(self, listing: pa.Table) -> int:
        """How many images of a plan that is open are not in the listing (any more)."""
        latest = self.latest_plan()
        if latest is None or self.is_finished(latest):
            return 0
        with self.store.open(self.paths.plan(latest.number)) as file:
            planned = pq.read_table(file, columns=["uri", "etag"])
        return len(planned.join(listing.select(["uri", "etag"]), keys=["uri", "etag"], join_type="left anti"))

    def make_plan(self, pending: pa.Table, order: Order, limits: ChunkLimits, after: Plan | None) -> Plan:
        """Write the plan that follows ``after``; when another driver was faster, the plan it wrote.

        Raises:
            ValueError: when nothing is pending: a plan without chunks could never be finished.
        """
        if not len(pending):
            raise ValueError("a plan needs at least one image")
        number = after.number + 1 if after else 0
        bounds = chunk_bounds(pending["bytes"].to_numpy(), limits)
        made = utc_now()
        metadata = {
            "schema": SCHEMA_VERSION,
            "run_id": f"{made:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}",
            "made": made.isoformat(),
            "order": asdict(order),
        }
        self.store.put_if_absent(self.paths.plan(number), to_parquet(pending, row_groups=bounds, metadata=metadata))
        return self._read_plan(number)

    def read_chunk(self, plan: Plan, chunk: int) -> pa.Table:
        """The images of one chunk, as a ``LISTING`` table."""
        with self.store.open(self.paths.plan(plan.number)) as file:
            return pq.ParquetFile(file).read_row_group(chunk)

    def rows(self, plan: Plan, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the label table's rows of one plan, in the order of the chunks."""
        files = [self.store.path_of(self.paths.chunk(plan.date, plan.number, chunk)) for chunk in range(plan.chunks)]
        yield from self._dataset(files).to_batches(columns=list(columns))

    def _dataset(self, files: Sequence[str]) -> pyarrow.dataset.Dataset:
        return pyarrow.dataset.dataset(list(files), format="parquet", filesystem=self.store.filesystem)

    def _read_plan(self, number: int) -> Plan:
        with self.store.open(self.paths.plan(number)) as stream:
            file = pq.ParquetFile(stream)
            content: dict[str, Any] = metadata_of(file)
            return Plan(
                number=number,
                run_id=content["run_id"],
                made=datetime.datetime.fromisoformat(content["made"]),
                order=Order(**content["order"]),
                chunks=file.num_row_groups,
                images=file.metadata.num_rows,
            )


def chunk_bounds(sizes: NDArray[np.int64], limits: ChunkLimits) -> list[tuple[int, int]]:
    """Cut a sequence of images into chunks: ``(start, stop)`` of each, covering all, none empty.

    Args:
        sizes: encoded bytes of each image.
    """
    bounds: list[tuple[int, int]] = []
    start, filled = 0, 0
    for index, size in enumerate(sizes.tolist()):
        if index > start and (index - start >= limits.images or filled + size > limits.bytes):
            bounds.append((start, index))
            start, filled = index, 0
        filled += size
    return [*bounds, (start, len(sizes))] if len(sizes) else bounds


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".parquet")
