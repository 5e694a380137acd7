"""Stages 1 and 3: read a chunk's images from storage, and write its finished rows there.

The walk of a chunk: ``Read`` (a number becomes encoded images) -> ``Segment`` (rows of the label table) -> ``Write``
(one Parquet object). Each stage takes a ``Chunk`` and returns one with another table and larger totals; an executor
carries it from one to the next. Kept apart from ``segment.py`` so that processes of these two stages do not load torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.label_table.ledger import Ledger, Plan, PlanSpec
from pipelines.label_table.schema import LISTING, MASKS, SCHEMA_VERSION, RowProvenance
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.clocks import Start
from pipelines.labelling.stages.coordinator import ATTEMPTS, Coordinator
from pipelines.process.redaction import redacted
from pipelines.process.retrying import Retries
from pipelines.sources import find_source, read_listed
from pipelines.sources.base import DENIED, Row, is_named, rows_of
from pipelines.storage import Store
from pipelines.storage.arrow import to_parquet
from pspnet_core import __version__
from pspnet_core.errors import ImageError
from pspnet_core.images.classes import ClassTable

PATIENCE = Retries(attempts=12, longest_wait=16.0)
"""With the output, while chunks are under way: a bit over two minutes, so that an outage of one costs no run."""

LONGEST_TEXT = 2000
"""Characters of an error in the label table."""

ENCODED = pa.schema([*LISTING, pa.field("data", pa.binary()), pa.field("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What every stage needs to know about the run.

    Attributes:
        ledger: over an output that is waited for with ``PATIENCE``.
        provenance: what the run's rows have in common.
        model: URI.
        max_pixels: largest image, in pixels.
    """

    ledger: Ledger
    provenance: RowProvenance
    model: str
    classes: ClassTable
    max_pixels: int
    coordinator: Coordinator

    @property
    def output(self) -> Store:
        """Where the label table goes."""
        return self.ledger.store


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk on its way.

    Attributes:
        table: ``ENCODED`` before it is segmented, then ``MASKS``. Empty where there is nothing to do: the chunk has
            been written before, or the run is to stop.
        totals: its own, of the stages behind it.
    """

    number: int
    table: pa.Table
    totals: Totals


class Read:
    """Stage 1, on a CPU task: the chunk's rows of the plan and the bytes of its images."""

    def __init__(self, context: RunContext, plan: Plan) -> None:
        self.context, self.plan = context, plan

    def __call__(self, number: int) -> Chunk:
        """Read the images, unless the run is to stop or another driver has written the chunk already."""
        start = Start.now()
        attempt = self.context.coordinator.admit(number)
        if not attempt:
            return nothing_to_do(number)
        rows = self.context.ledger.read_chunk(self.plan, number)
        if self.context.output.exists(self.context.ledger.paths.chunk(self.plan.date, self.plan.number, number)):
            return encoded(number, ENCODED.empty_table(), images=len(rows), since=start)
        return read_images(number, self.plan.spec, rows, attempt=attempt, since=start)


class Write:
    """Stage 3, on a CPU task: one Parquet object per chunk, put if absent; "already there" is success."""

    def __init__(self, context: RunContext, plan: Plan) -> None:
        self.context, self.plan = context, plan

    def __call__(self, chunk: Chunk) -> Chunk:
        """Write the chunk; its table is gone then."""
        start = Start.now()
        with self.context.coordinator.writing(chunk.number) as attempt:
            chunk = writable(chunk, attempt)
            # Where another driver was faster, it counts them.
            mine = not len(chunk.table) or self._put(chunk)
        return written(chunk, since=start, counted=mine)

    def _put(self, chunk: Chunk) -> bool:
        """Whether it was this call that wrote the chunk."""
        path = self.context.ledger.paths.chunk(self.plan.date, self.plan.number, chunk.number)
        return self.context.output.put_if_absent(path, to_parquet(chunk.table, metadata=self._metadata(chunk)))

    def _metadata(self, chunk: Chunk) -> dict[str, object]:
        """What explains a label file that is met alone.

        ``totals`` are the chunk's until here, so that they outlive the run that finishes the plan. They leave out what
        it takes to write the file, which is known only when it is written.
        """
        return {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "model": redacted(self.context.model),
            "fingerprint": self.context.ledger.paths.fingerprint,
            "classes": self.context.classes.to_json(),
            "run_id": self.context.provenance.run_id,
            "totals": chunk.totals.to_json(),
        }


def read_images(number: int, spec: PlanSpec, rows: pa.Table, *, attempt: int, since: Start) -> Chunk:
    """A chunk of the images that some rows of a plan name.

    Args:
        attempt: which attempt at reading them this is, from 1. After ``ATTEMPTS`` they are ``Crashed``.
        since: when the stage began.
    """
    if attempt <= ATTEMPTS:
        return encoded(number, fetch(spec, rows), images=len(rows), since=since)
    crashed = ImageError("Crashed", f"reading its chunk ended the process {ATTEMPTS} times")
    chunk = encoded(number, _encoded_table(rows, [crashed] * len(rows)), images=len(rows), since=since)
    return replace(chunk, totals=chunk.totals + Totals(given_up=1))


def fetch(spec: PlanSpec, rows: pa.Table) -> pa.Table:
    """An ``ENCODED`` table: rows of a plan with the bytes of their images, or why there are none."""
    return _encoded_table(rows, read_listed(find_source(spec.source), rows, inputs=spec.input))


def _encoded_table(rows: pa.Table, results: Sequence[bytes | ImageError]) -> pa.Table:
    """``bytes`` becomes the size of what was read, because some formats list no sizes."""
    data = pa.array([None if isinstance(result, ImageError) else result for result in results], pa.binary())
    texts = [redacted(str(result))[:LONGEST_TEXT] if isinstance(result, ImageError) else None for result in results]
    errors = pa.array(texts, pa.string())
    sizes = pc.coalesce(pc.binary_length(data).cast(pa.int64()), rows["bytes"])
    names = [_kept(row, result) for row, result in zip(rows_of(rows), results, strict=True)]
    keys, etags = (pa.array(column, pa.string()) for column in (zip(*names, strict=True) if names else ((), ())))
    table = pa.table([rows["uri"], keys, etags, sizes], schema=LISTING)
    return table.append_column("data", data).append_column("error", errors)


def _kept(row: Row, result: bytes | ImageError) -> tuple[str, str]:
    """Key and etag of an image as labels keep them.

    A signature ends, that of a URI which the plan has kept: such an image is new once it is listed with another one.
    """
    if row.key == row.uri or not is_named(row.uri, row.key):
        return row.key, row.etag
    is_denied = isinstance(result, ImageError) and result.kind == "Denied"
    return row.uri, DENIED if is_denied else row.etag


def encoded(number: int, table: pa.Table, *, images: int, since: Start) -> Chunk:
    """A chunk that was read; ``since`` is when that began."""
    size = int(pc.sum(pc.binary_length(table["data"])).as_py() or 0)
    return Chunk(number=number, table=table, totals=Totals(images=images, bytes_read=size) + since.spent("read"))


def nothing_to_do(number: int) -> Chunk:
    """A chunk that the run does not begin any more, on its way past the other stages."""
    return Chunk(number=number, table=ENCODED.empty_table(), totals=Totals())


def writable(chunk: Chunk, attempt: int) -> Chunk:
    """The chunk as it can be written: after ``ATTEMPTS`` attempts as error rows only, which take next to no memory.

    After as many attempts at that it is given up unwritten: the run says at its end what is missing.
    """
    if attempt <= ATTEMPTS or not len(chunk.table):
        return chunk
    if attempt > 2 * ATTEMPTS:
        lost = replace(chunk.totals, labelled=0, kinds=Counter(), given_up=1)
        return replace(chunk, table=MASKS.empty_table(), totals=lost)
    crashed = f"Crashed: writing its chunk ended the process {ATTEMPTS} times"
    kept = {"status": "error", "error": crashed}
    columns = [
        chunk.table[field.name]
        if not field.nullable and field.name not in kept
        else pa.array([kept.get(field.name)] * len(chunk.table), field.type)
        for field in MASKS
    ]
    lost = replace(chunk.totals, labelled=0, kinds=Counter({"Crashed": len(chunk.table)}), given_up=1)
    return replace(chunk, table=pa.table(columns, schema=MASKS), totals=lost)


def written(chunk: Chunk, *, since: Start, counted: bool) -> Chunk:
    """A chunk behind the last stage; images that another run wrote are not ``counted``."""
    totals = chunk.totals if counted else replace(chunk.totals, labelled=0, kinds=Counter())
    return replace(chunk, table=MASKS.empty_table(), totals=totals + since.spent("write"))
