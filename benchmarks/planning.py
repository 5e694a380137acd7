"""The start of a night: a listing minus the ledger, and the plan of what is left.

Listing and label files are made up: files of 256 rows, as they are written, but with empty mask columns, which nobody
reads here. What is measured runs in a process of its own, first without an index, then with the one that was left.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.meter import peak_bytes
from pipelines.label_table.ledger import PLAN_CHUNKS, ChunkLimits, Ledger, PlanSpec
from pipelines.label_table.listing import spool
from pipelines.label_table.schema import LISTING, MASKS, Paths, utc_now
from pipelines.storage import THREADS, open_store
from pipelines.storage.arrow import to_parquet
from pspnet_core.threads import map_ahead

CHUNK = 256
PATHS = Paths(partition="benchmark-0")
SPEC = PlanSpec(source="images", input=["s3://bucket/night"], date="2026-01-31", mask="rle")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one start took.

    Attributes:
        listing: seconds to take the listing in.
        subtraction: seconds from there to what is pending.
        plan: seconds to write the plan; 0 where none was wanted.
        pending: images that the next plan would hold.
        peak: most bytes of memory that the process held.
    """

    listing: float
    subtraction: float
    plan: float
    pending: int
    peak: int


def run(folder: Path, *, labelled: int, new: int, labels: str | None) -> dict[str, Figures]:
    """Without an index and with one.

    Args:
        folder: for the listing, and for the label files unless told otherwise.
        labels: URI for the label files; nothing may be there.
    """
    listing, root = folder / "made-up.parquet", labels or str(folder / "labels")
    _make_listing(listing, labelled + new)
    _make_labels(root, listing, labelled)
    return {"without an index": _start(listing, root, False), "with an index": _start(listing, root, True)}


def _make_listing(path: Path, images: int) -> None:
    """A listing with keys, etags and sizes as those of cameras on S3."""
    key = "format('camera-{:03d}/2026/01/{:02d}/{:09d}.jpg', i % 500, 1 + i % 31, i)"
    duckdb.execute(
        f"COPY (SELECT 's3://bucket/night/' || {key} AS uri, {key} AS key, md5(i::VARCHAR) AS etag, "
        f"(100000 + i % 50000)::BIGINT AS bytes FROM range({images}) AS numbers(i)) TO '{path}'"
    )


def _batches(listing: Path, rows: int) -> Iterator[pa.RecordBatch]:
    for batch in pq.ParquetFile(listing).iter_batches(rows):
        yield batch.cast(LISTING)


def _make_labels(root: str, listing: Path, images: int) -> None:
    """Label files for the first images of the listing."""
    ledger = Ledger(open_store(root, field="output"), PATHS)
    made = utc_now()

    def write(numbered: tuple[int, pa.RecordBatch]) -> None:
        number, batch = numbered
        plan, chunk = divmod(number, PLAN_CHUNKS)
        columns = {field.name: pa.nulls(len(batch), field.type) for field in MASKS}
        columns |= {name: batch[name] for name in batch.schema.names}
        for name, value in (("status", "ok"), ("run_id", "20260131T000000-00000000"), ("labelled_at", made)):
            columns[name] = pa.array([value] * len(batch), MASKS.field(name).type)
        path = ledger.paths.chunk("2026-01-31", plan, chunk)
        ledger.store.put_if_absent(path, to_parquet(pa.table(columns, MASKS)))

    def chunks() -> Iterator[tuple[int, pa.RecordBatch]]:
        left = images
        for number, batch in enumerate(_batches(listing, CHUNK)):
            if left <= 0:
                return
            yield number, batch.slice(0, left)
            left -= len(batch)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in map_ahead(pool, write, chunks(), depth=4 * THREADS):
            pass


def _start(listing: Path, root: str, plan: bool) -> Figures:
    # As a program: with `python -c` DuckDB would take this for a session of somebody who likes progress bars.
    command = [sys.executable, "-m", "benchmarks.planning", str(listing), root, "plan" if plan else ""]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Figures(**json.loads(child.stdout))


def print_figures(listing: str, root: str, plan: str) -> None:
    """The other end of ``run``: what is measured."""
    ledger = Ledger(open_store(root, field="output"), PATHS)
    started = time.perf_counter()
    with spool(_batches(Path(listing), 2**16)) as found:
        listed = time.perf_counter()
        pending = ledger.pending(found)
        subtracted = time.perf_counter()
        if plan:
            ledger.make_plan(pending, SPEC, ChunkLimits(images=CHUNK, bytes=2**26), ledger.latest_plan())
        planned = time.perf_counter()
    figures = Figures(
        listing=listed - started,
        subtraction=subtracted - listed,
        plan=planned - subtracted if plan else 0.0,
        pending=len(pending),
        peak=peak_bytes(),
    )
    print(json.dumps(asdict(figures)))


def lines(figures: dict[str, Figures], *, labelled: int, new: int, labels: str | None) -> list[str]:
    """Figures for people."""
    where = labels or "local disk"
    head = f"planning: {labelled:,} images labelled in files of {CHUNK}, {new:,} new; label files on {where}"
    rows = (
        f"  {name:18} {found.listing + found.subtraction + found.plan:6.1f} s "
        f"(listing {found.listing:.1f}, subtraction {found.subtraction:.1f}, plan {found.plan:.1f}), "
        f"peak memory {found.peak / 1e6:.0f} MB, {found.pending:,} pending"
        for name, found in figures.items()
    )
    return [head, *rows]


if __name__ == "__main__":
    print_figures(*sys.argv[1:])
