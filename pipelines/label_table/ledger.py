"""What is labelled, what is pending, and the plan: the fence that keeps labels from being lost or doubled.

The label table is the ledger. A plan is one Parquet file, written if absent: one row group per chunk of images, and in
its metadata the run id, the date and the mask format. Chunk names follow from the plan alone, so every driver that
executes it (a retry, a second one, one that was thought dead) writes the same objects, and only the first write counts.
Plan n+1 is made only when every chunk of plan n is there.

A plan holds a bounded number of images: what is pending beyond that is left for the next one. So neither the driver nor
a task that looks up its chunk needs more memory or time when more is pending.

An object that is written must be there for whoever asks for it by its name; listings may lag behind for a while. Where
it matters they are not trusted: what they do not show is asked for.
"""

import contextlib
import datetime
import functools
import itertools
import logging
import secrets
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, StringConstraints

from pipelines.label_table.index import LabelIndex, read_label_file
from pipelines.label_table.listing import VERSION, Listing
from pipelines.label_table.schema import LISTING, SCHEMA_VERSION, Paths, RowProvenance, utc_now
from pipelines.process.reading_back import read_back
from pipelines.storage import THREADS, ObjectMissing, Store
from pipelines.storage.arrow import damage_told, metadata_json, to_parquet
from pspnet_core.errors import ConfigError
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)
PLAN_IMAGES = 2**20
"""Most images of one plan: some 200 MB on the driver while it is made."""

UNSIZED = 2**22
"""Bytes that an image is taken to have whose size the listing does not tell."""

PLAN_CHUNKS = 2**12
"""Most chunks of one plan, whose footer grows with them: 2 MB, which every process that reads chunks holds."""


LATEST = datetime.datetime(2200, 1, 1, tzinfo=datetime.timezone.utc)
"""No plan is made later, whatever a clock may say."""

SKEW = datetime.timedelta(minutes=5)
"""By how much the clocks of drivers may differ without a word."""


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
    spec: "PlanSpec"
    chunks: int
    images: int

    @property
    def date(self) -> str:
        """The partition ``dt=`` of its labels."""
        return self.spec.date

    @property
    def provenance(self) -> RowProvenance:
        """What its rows have in common."""
        return RowProvenance(run_id=self.run_id, made=self.made, mask=self.spec.mask)


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What a plan says besides its images; a driver that finishes it keeps to this, not to its own flags.

    Attributes:
        source: a row of ``SOURCES``.
        input: the URIs of the folders, globs and objects that were listed.
        date: the partition ``dt=``.
        mask: ``rle``, ``png`` or ``both``.
    """

    source: str
    input: Sequence[str]
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    mask: Annotated[str, StringConstraints(pattern="^(rle|png|both)$")]


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The metadata of a plan; names of objects are made of some of it."""

    schema: int
    run_id: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    made: Annotated[AwareDatetime, Field(lt=LATEST)]
    spec: PlanSpec


class Ledger:
    """The state of one model's labels below an output; holds nothing in memory but where to look."""

    def __init__(self, store: Store, paths: Paths) -> None:
        self.store, self.paths = store, paths

    def latest_plan(self) -> Plan | None:
        """The plan with the highest number.

        Raises:
            ConfigError: as ``read_plan``.
        """
        paths = (item.key for item in self.store.list(self.paths.plans, suffixes={".parquet"}))
        numbers = [number for path in paths if (number := self.paths.plan_number(path)) is not None]
        unlisted = itertools.takewhile(self._has_plan, itertools.count(max(numbers, default=-1) + 1))
        numbers += unlisted
        return self.read_plan(max(numbers)) if numbers else None

    def _has_plan(self, number: int) -> bool:
        return self.store.exists(self.paths.plan(number))

    def is_finished(self, plan: Plan) -> bool:
        """Whether the plan's run has its record, which is written last."""
        return self.store.exists(self.paths.run(plan.run_id))

    def missing_chunks(self, plan: Plan) -> list[int]:
        """Chunks of the plan that no listing of the label table shows, ascending."""
        there = self.store.list(self.paths.day(plan.date), suffixes={".parquet"})
        return _unlisted(plan, {self.paths.chunk_of(item.key) for item in there})

    def lost_chunks(self, plan: Plan) -> list[int]:
        """Chunks of the plan that are not in the label table, ascending."""
        missing = self.missing_chunks(plan)
        there = set(self._there(plan, missing))
        return [chunk for chunk in missing if chunk not in there]

    def _there(self, plan: Plan, chunks: Sequence[int]) -> list[int]:
        """Those of some chunks that are there when they are asked for."""

        def is_there(chunk: int) -> bool:
            return self.store.exists(self.paths.chunk(plan.date, plan.number, chunk))

        with ThreadPoolExecutor(THREADS) as pool:
            return [chunk for chunk, there in zip(chunks, pool.map(is_there, chunks), strict=True) if there]

    def pending(self, listing: Listing) -> pa.Table:
        """The rows of a listing that are not labelled yet, by key: as many as one plan may hold.

        Raises:
            As ``LabelIndex.images``.
        """
        return listing.pending(self._labelled() if listing.images else iter(()), PLAN_IMAGES)

    def _labelled(self) -> Iterator[pa.RecordBatch]:
        """``uri, etag`` of every row of the label table, also of those of the last plans that no listing shows yet."""
        index = LabelIndex(self.store, self.paths)
        yield from index.images()
        plan = self.latest_plan()
        while plan:
            there = self._there(plan, _unlisted(plan, index.listed))
            for chunk in there:
                with contextlib.suppress(ObjectMissing):  # deleted meanwhile
                    path = self.paths.chunk(plan.date, plan.number, chunk)
                    yield from read_label_file(self.store, path, VERSION.names).cast(VERSION).to_batches()
            # Where all were listed, what is older was, too.
            plan = self.read_plan(plan.number - 1) if there and plan.number else None

    def unlisted(self, listing: Listing) -> int:
        """How many images of a plan that is open are not in the listing (any more)."""
        latest = self.latest_plan()
        if latest is None or self.is_finished(latest):
            return 0
        with self.store.open(self.paths.plan(latest.number)) as stream:
            return listing.absent(pq.ParquetFile(stream).iter_batches(columns=VERSION.names))

    def make_plan(self, pending: pa.Table, spec: PlanSpec, limits: ChunkLimits, after: Plan | None) -> Plan:
        """Write the plan that follows ``after``; when another driver was faster, the plan it wrote.

        What would be more than ``PLAN_CHUNKS`` stays pending.

        Raises:
            ValueError: when nothing is pending: a plan without chunks could never be finished.
        """
        if not len(pending):
            raise ValueError("a plan needs at least one image")
        number = after.number + 1 if after else 0
        bounds = chunk_bounds(pending["bytes"].to_numpy(), limits)[:PLAN_CHUNKS]
        made = _moment(after)
        run_id = f"{made:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        metadata = {"schema": SCHEMA_VERSION, "run_id": run_id, "made": made.isoformat(), "spec": asdict(spec)}
        self.store.put_if_absent(self.paths.plan(number), to_parquet(pending, row_groups=bounds, metadata=metadata))
        return self.read_plan(number)

    def read_chunk(self, plan: Plan, chunk: int) -> pa.Table:
        """The images of one chunk, as a ``LISTING`` table.

        Raises:
            ConfigError: the plan is damaged.
        """
        path = self.paths.plan(plan.number)
        with self._damage_told(path):
            footer = _footer(_PlanFile(run_id=plan.run_id, path=path, store=self.store))
            with self.store.open(path) as stream:
                rows = pq.ParquetFile(stream, metadata=footer).read_row_group(chunk)
                return rows.select(LISTING.names).cast(LISTING)

    def rows(self, plan: Plan, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the label table's rows of one plan, in the order of the chunks; a few files at a time.

        There is one batch for each file, with the file's metadata in its schema.
        """
        paths = [self.paths.chunk(plan.date, plan.number, chunk) for chunk in range(plan.chunks)]
        with ThreadPoolExecutor(THREADS) as pool:
            for table in map_ahead(pool, lambda path: read_label_file(self.store, path, columns), paths, depth=THREADS):
                yield from table.combine_chunks().to_batches()

    def read_plan(self, number: int) -> Plan:
        """The plan with this number.

        Raises:
            ConfigError: the file of its name is none; without it nobody knows what is to be labelled.
        """
        path = self.paths.plan(number)
        with self._damage_told(path), self.store.open(path) as stream:
            file = pq.ParquetFile(stream)
            header = read_back(_Header, metadata_json(file.schema_arrow))
            return Plan(
                number=number,
                run_id=header.run_id,
                made=header.made,
                spec=header.spec,
                chunks=file.num_row_groups,
                images=file.metadata.num_rows,
            )

    def _damage_told(self, path: str) -> contextlib.AbstractContextManager[None]:
        def told(reason: str) -> ConfigError:
            remedy = f"is no plan ({reason}): restore it, or move it away if this tool did not write it"
            return ConfigError(self.store.field, self.store.uri_of(path), remedy)

        return damage_told(told)


def _unlisted(plan: Plan, listed: Collection[tuple[int, int] | None]) -> list[int]:
    """Chunks of a plan that are not among some of the label table (number of the plan, of the chunk)."""
    return [chunk for chunk in range(plan.chunks) if (plan.number, chunk) not in listed]


def _moment(after: Plan | None) -> datetime.datetime:
    """When a plan is made: now, or just after the one before, where the clock has been put back."""
    now = utc_now()
    earliest = after.made + datetime.timedelta(seconds=1) if after else now
    if earliest > now + SKEW:
        told = "the clock says %s, the last plan was made at %s: check it; the new plan takes the moment after that one"
        log.warning(told, now.isoformat(timespec="seconds"), earliest.isoformat(timespec="seconds"))
    return max(now, earliest)


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    """Where a plan lies. Two are the same when their run id is: no two plans share one."""

    run_id: str
    path: str = field(compare=False)
    store: Store = field(compare=False)


@functools.lru_cache(maxsize=2)
def _footer(plan: _PlanFile) -> pq.FileMetaData:
    """The footer of a plan, read once per process: it tells of every chunk, and a process reads many."""
    with plan.store.open(plan.path) as stream:
        return pq.read_metadata(stream)


def chunk_bounds(sizes: NDArray[np.int64], limits: ChunkLimits) -> list[tuple[int, int]]:
    """Cut a sequence of images into chunks: ``(start, stop)`` of each, covering all, none empty.

    Args:
        sizes: encoded bytes of each image; where they are not told they are taken for ``UNSIZED``.
    """
    bounds: list[tuple[int, int]] = []
    start, filled = 0, 0
    for index, size in enumerate(np.where(sizes > 0, sizes, UNSIZED).tolist()):
        if index > start and (index - start >= limits.images or filled + size > limits.bytes):
            bounds.append((start, index))
            start, filled = index, 0
        filled += size
    return [*bounds, (start, len(sizes))] if len(sizes) else bounds
