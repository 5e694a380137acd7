"""A chunk outside the model's actor: its bytes are read from storage, and its finished rows written there.

Kept apart from ``segmenting.py`` so that the processes of these two stages need not load torch.
"""

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.ledger import Ledger, Plan
from pipelines.sources import find_source
from pipelines.storage import Store
from pipelines.tables import LISTING, SCHEMA_VERSION, from_ipc, to_ipc, to_parquet
from pspnet_core import __version__
from pspnet_core.classes import ClassTable
from pspnet_core.errors import ImageError

ChunkRow = dict[str, Any]
"""A row of Ray Data: ``chunk`` (its number in the plan), ``payload`` (an IPC stream) and counters."""

ENCODED = pa.schema([*LISTING, pa.field("data", pa.binary()), pa.field("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage needs to know about the run."""

    input: Store
    output: Store
    ledger: Ledger
    plan: Plan
    model: str
    classes: ClassTable
    pixels: int


class Read:
    """Stage 1, on a CPU task: the chunk's rows of the plan and the bytes of its images."""

    def __init__(self, work: Work, *, threads: int = 16) -> None:
        self.work, self.threads = work, threads

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Add ``payload``: an ``ENCODED`` table; an empty one when another driver has written the chunk already."""
        work, chunk = self.work, int(row["id"])
        start = time.thread_time()
        target = work.ledger.paths.chunk(work.plan.date, work.plan.number, chunk)
        rows = work.ledger.read_chunk(work.plan, chunk)
        if work.output.exists(target):
            return {"chunk": chunk, "payload": to_ipc(ENCODED.empty_table()), "images": len(rows), "cpu_read": 0.0}
        results = find_source(work.plan.order.source).read(work.input, rows, threads=self.threads)
        data = pa.array([None if isinstance(result, ImageError) else result for result in results], pa.binary())
        errors = pa.array([str(result) if isinstance(result, ImageError) else None for result in results], pa.string())
        table = rows.cast(LISTING).append_column("data", data).append_column("error", errors)
        return {"chunk": chunk, "payload": to_ipc(table), "images": len(rows), "cpu_read": time.thread_time() - start}


class Write:
    """Stage 3, on a CPU task: one Parquet object per chunk, put if absent; "already there" is success."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Write the chunk; what is left of the row is a handful of numbers."""
        start = time.thread_time()
        counters = {key: value for key, value in row.items() if key != "payload"}
        table = from_ipc(row["payload"])
        if len(table) and not self._put(table, int(row["chunk"])):
            counters |= {"labelled": 0, "errors": 0}  # another driver was faster, and counts them
        return counters | {"cpu_write": time.thread_time() - start}

    def _put(self, table: pa.Table, chunk: int) -> bool:
        """Whether it was this call that wrote the chunk."""
        work = self.work
        path = work.ledger.paths.chunk(work.plan.date, work.plan.number, chunk)
        return work.output.put_if_absent(path, to_parquet(table, metadata=file_metadata(work)))


def file_metadata(work: Work) -> dict[str, object]:
    """What explains a label file that is met alone."""
    return {
        "schema": SCHEMA_VERSION,
        "version": __version__,
        "model": work.model,
        "fingerprint": work.ledger.paths.partition.rpartition("-")[2],
        "classes": work.classes.to_json(),
        "run_id": work.plan.run_id,
    }
