"""Chunks as rows of Ray Data, and the stages that are tasks as functions of such rows; loads no torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import Chunk
from pipelines.storage.arrow import from_ipc, to_ipc

Row = dict[str, Any]
"""``number``, ``payload`` (an Arrow IPC stream) and ``totals`` (JSON) of a ``Chunk``."""


@dataclass(frozen=True)
class ReadRow:
    """Stage 1: from a row with an ``id`` to a chunk's row."""

    read: Callable[[int], Chunk]

    def __call__(self, row: Row) -> Row:
        """Read the chunk."""
        return row_of(self.read(int(row["id"])))


@dataclass(frozen=True)
class WriteRow:
    """Stage 3."""

    write: Callable[[Chunk], Chunk]

    def __call__(self, row: Row) -> Row:
        """Write the chunk."""
        return row_of(self.write(chunk_of(row)))


def row_of(chunk: Chunk) -> Row:
    """The row of a chunk."""
    return {"number": chunk.number, "payload": to_ipc(chunk.table), "totals": json.dumps(chunk.totals.to_json())}


def chunk_of(row: Row) -> Chunk:
    """The chunk of a row."""
    totals = Totals.from_json(json.loads(row["totals"]))
    return Chunk(number=int(row["number"]), table=from_ipc(row["payload"]), totals=totals)
