"""A chunk outside the model's actor: its bytes are read from storage, and its finished rows written there.

Kept apart from ``segmenting.py`` so that the processes of these two stages need not load torch.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.label_table.ledger import Ledger, Plan
from pipelines.label_table.schema import LISTING, SCHEMA_VERSION, Stamp
from pipelines.labelling.stages.clocks import Start
from pipelines.labelling.stages.coordinator import Coordinator
from pipelines.process.redaction import redacted
from pipelines.process.retrying import Retries
from pipelines.sources import find_source
from pipelines.storage import Store
from pipelines.storage.arrow import from_ipc, to_ipc, to_parquet
from pspnet_core import __version__
from pspnet_core.errors import ImageError
from pspnet_core.images.classes import ClassTable

ChunkRow = dict[str, Any]
"""A row of Ray Data: ``chunk`` (its number), ``payload`` (an IPC stream) and counters."""

PATIENCE = Retries(attempts=12, longest_wait=16.0)
"""With the output, while chunks are under way: a bit over two minutes, so that an outage of one costs no run."""

ENCODED = pa.schema([*LISTING, pa.field("data", pa.binary()), pa.field("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage needs to know about the run.

    Attributes:
        ledger: over an output that is waited for with ``PATIENCE``.
        stamp: what its rows have in common.
        pixels: the largest image, in pixels.
    """

    ledger: Ledger
    stamp: Stamp
    model: str
    classes: ClassTable
    pixels: int
    coordinator: Coordinator

    @property
    def output(self) -> Store:
        """Where the label table goes."""
        return self.ledger.store

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self.ledger.paths.partition.rpartition("-")[2]


class Read:
    """Stage 1, on a CPU task: the chunk's rows of the plan and the bytes of its images."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.plan = work, plan

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Add ``payload``: an ``ENCODED`` table.

        An empty one when another driver has written the chunk already, or the run is to stop.
        """
        work, chunk = self.work, int(row["id"])
        start = Start.now()
        if not work.coordinator.admits(chunk):
            return handed_back(chunk)
        target = work.ledger.paths.chunk(self.plan.date, self.plan.number, chunk)
        rows = work.ledger.read_chunk(self.plan, chunk)
        if work.output.exists(target):
            return encoded(chunk, ENCODED.empty_table(), images=len(rows), since=start)
        return encoded(chunk, fetched(self.plan.order.source, rows), images=len(rows), since=start)


class Write:
    """Stage 3, on a CPU task: one Parquet object per chunk, put if absent; "already there" is success."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.plan = work, plan

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Write the chunk; what is left of the row is a handful of numbers."""
        start = Start.now()
        with self.work.coordinator.writing(int(row["chunk"])):
            table = from_ipc(row["payload"])
            # Where another driver was faster, it counts them.
            mine = not len(table) or self._put(table, row)
        return counters(row, since=start, counted=mine)

    def _put(self, table: pa.Table, row: ChunkRow) -> bool:
        """Whether it was this call that wrote the chunk."""
        path = self.work.ledger.paths.chunk(self.plan.date, self.plan.number, int(row["chunk"]))
        return self.work.output.put_if_absent(path, to_parquet(table, metadata=file_metadata(self.work, row)))


def fetched(source: str, rows: pa.Table, *, threads: int = 16) -> pa.Table:
    """An ``ENCODED`` table: rows of a listing with the bytes of their images, or why there are none.

    ``bytes`` becomes the size of what was read: not every format tells it in its listing.
    """
    results = find_source(source).read(rows, threads=threads)
    data = pa.array([None if isinstance(result, ImageError) else result for result in results], pa.binary())
    errors = pa.array([str(result) if isinstance(result, ImageError) else None for result in results], pa.string())
    sizes = pc.coalesce(pc.binary_length(data).cast(pa.int64()), rows["bytes"])
    table = pa.table([*(rows[name] for name in ("uri", "key", "etag")), sizes], schema=LISTING)
    return table.append_column("data", data).append_column("error", errors)


def encoded(chunk: int, table: pa.Table, *, images: int, since: Start) -> ChunkRow:
    """A chunk on its way from the first stage to the second; ``since`` is when the first began."""
    size = int(pc.sum(pc.binary_length(table["data"])).as_py() or 0)
    row = {"chunk": chunk, "payload": to_ipc(table), "images": images, "bytes": size}
    return row | since.spent("read")


def handed_back(chunk: int) -> ChunkRow:
    """A chunk that the run begins no more, on its way past the other stages."""
    row = {"chunk": chunk, "payload": to_ipc(ENCODED.empty_table()), "images": 0, "bytes": 0}
    return row | {"wall_read": 0.0, "cpu_read": 0.0}


def counters(row: ChunkRow, *, since: Start, counted: bool) -> ChunkRow:
    """What is left of a chunk after the last stage; not ``counted`` are images that somebody else wrote."""
    left = _without_payload(row)
    if not counted:
        left |= {"labelled": 0, "errors": 0, "kinds": ""}
    return left | since.spent("write")


def file_metadata(work: Work, row: ChunkRow) -> dict[str, object]:
    """What explains a label file that is met alone.

    ``counters`` are the chunk's until here, so that they outlive whoever finishes the plan. What it takes to write the
    file is not among them: that is known only when it is written.
    """
    return {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "model": redacted(work.model),
        "fingerprint": work.fingerprint,
        "classes": work.classes.to_json(),
        "run_id": work.stamp.run_id,
        "counters": _without_payload(row),
    }


def _without_payload(row: ChunkRow) -> ChunkRow:
    return {key: value for key, value in row.items() if key != "payload"}
