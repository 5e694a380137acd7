"""Labelling: ``LabelConfig`` in, an exact label table out. The driver's side; a chunk's side is ``segmenting.py``.

list the input -> subtract the ledger -> write the plan -> Ray Data: chunk numbers -> read -> segment -> write -> tiny
rows back to the driver -> class statistics and the run record. Guarantees: ``docs/guarantees.md``.
"""

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines import tracking
from pipelines.chunks import ChunkRow, Read, Work, Write
from pipelines.cluster import Pool, WorkerRange, own_errors, quiet_ray_data, ray_session
from pipelines.finishing import finish
from pipelines.ledger import ChunkLimits, Ledger, Order, Plan
from pipelines.progress import Progress
from pipelines.segmenting import Predictor, Segment
from pipelines.sources import find_source
from pipelines.storage import Store, open_store
from pipelines.tables import Paths, utc_now
from pspnet_core.checkpoints import Checkpoint
from pspnet_core.errors import ConfigError, PspnetError
from pspnet_core.inference import Segmenter

log = logging.getLogger(__name__)
WAVE = 2048  # chunks handed to Ray Data at a time, so that the driver's memory does not grow with the plan
CHUNK_BYTES = 64 * 2**20


class LabellingFailed(PspnetError):
    """The run stopped; what is written stays, the plan stays, and the same command goes on from there."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Label every image below a prefix and write masks and class statistics as Parquet."""

    input: str
    """Images: a local folder or a URI (s3://...)."""
    output: str
    """Where the label table goes: a local folder or a URI."""
    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    date: str | None = None
    """Partition dt= of new labels, YYYY-MM-DD; today (UTC) by default."""
    workers: str | None = None
    """Model actors: N or MIN:MAX; by default up to one per GPU, or one on CPUs."""
    gpus: float | None = None
    """GPUs per actor, fractions allowed; by default 1 when the cluster has any."""
    chunk: int = 256
    """Images per chunk, which is one Parquet file."""
    batch: int = 8
    """Most images in one forward pass."""
    mask: str = "rle"
    """Mask columns to fill: rle (run lengths), png or both."""
    scales: tuple[float, ...] | None = None
    """Input scales to average over; by default the checkpoint's."""
    flip: bool | None = None
    """Whether to average with the mirrored image; by default the checkpoint's setting."""
    window: int | None = None
    """Side of the sliding window in pixels, 0 for whole images; by default the checkpoint's."""
    compile: bool = False
    """Whether the network is compiled (CUDA graphs on GPUs): for many images of one size."""
    source: str = "images"
    """Input format; a row of SOURCES."""
    pixels: int = 100_000_000
    """Largest image in pixels; a larger one becomes an error row."""

    def __post_init__(self) -> None:
        for name in ("chunk", "batch", "pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "give a positive number")
        if self.mask not in ("rle", "png", "both"):
            raise ConfigError("mask", self.mask, "choose rle, png or both")
        if self.workers is not None:
            WorkerRange.parse(self.workers)
        if self.date is not None:
            _check_date(self.date)
        find_source(self.source)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was done; adds up over chunks and plans."""

    labelled: int = 0
    errors: int = 0
    cpu: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Totals") -> "Totals":
        """Both together."""
        cpu = Counter(self.cpu)
        cpu.update(other.cpu)
        return Totals(
            labelled=self.labelled + other.labelled,
            errors=self.errors + other.errors,
            cpu=cpu,
        )


def label(config: LabelConfig, make_predictor: Callable[[], Predictor] | None = None) -> dict[str, Any]:
    """Label what is not labelled yet.

    Args:
        make_predictor: stands in for the model's ``Segmenter``, in benchmarks and tests.

    Returns:
        ``run_id``, ``images`` (those listed and those of a plan that was open), which is the sum of ``labelled``,
        ``errors`` and ``skipped`` (done before, or by another driver meanwhile), ``seconds``, ``images_per_second``,
        ``labels`` (a glob over the label table) and ``cpu_ms`` (CPU milliseconds per image, stage by stage).

    Raises:
        ConfigError: a mistake in the config; nothing was written.
        LabellingFailed: the run broke off; run it again to finish it.
    """
    started = time.perf_counter()
    checkpoint = tracking.load_rgb_model(config.model)
    checkpoint = checkpoint.with_inference(scales=config.scales, flip=config.flip, window=config.window)
    source = open_store(config.input, field="input")
    output = open_store(config.output, field="output")
    listing = find_source(config.source).find(source)
    if not len(listing):
        raise ConfigError("input", config.input, "holds no images; check the prefix")
    output.check_writable_atomically()
    ledger = Ledger(output, Paths(partition=checkpoint.partition))
    images = len(listing) + ledger.unlisted(listing)
    log.info("%d images listed, to be labelled by %s", len(listing), checkpoint.partition)
    job = _Job(config=config, checkpoint=checkpoint, source=source, ledger=ledger, make_predictor=make_predictor)
    totals, run_id = job.run(listing)
    seconds = time.perf_counter() - started
    done = totals.labelled + totals.errors
    return {
        "run_id": run_id,
        "images": max(images, done),
        "labelled": totals.labelled,
        "skipped": max(images, done) - done,
        "errors": totals.errors,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / seconds, 2),
        "labels": output.uri_of(f"{ledger.paths.masks}*/*.parquet"),
        "cpu_ms": {stage: round(1000 * cpu / max(1, done), 3) for stage, cpu in sorted(totals.cpu.items())},
    }


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The parts of one invocation, put together."""

    config: LabelConfig
    checkpoint: Checkpoint
    source: Store
    ledger: Ledger
    make_predictor: Callable[[], Predictor] | None

    def run(self, listing: pa.Table) -> tuple[Totals, str | None]:
        """Carry out plans until nothing is pending; returns the totals and the id of the last run."""
        totals, latest = Totals(), self.ledger.latest_plan()
        pending = self._pending(latest, listing)
        if pending is not None and not len(pending):
            return totals, latest.run_id if latest else None
        with ray_session():
            pool = Pool.of(self.config.workers, self.config.gpus, reserve=0.5)
            while pending is None or len(pending):
                latest = self._plan(latest, pending)
                totals += self._carry_out(latest, pool)
                pending = self._pending(latest, listing)
        return totals, latest.run_id if latest else None

    def _pending(self, latest: Plan | None, listing: pa.Table) -> pa.Table | None:
        """What a new plan would hold; None while the latest plan is open, which comes first."""
        if latest is not None and not self.ledger.is_finished(latest):
            return None
        return self.ledger.pending(listing)

    def _plan(self, latest: Plan | None, pending: pa.Table | None) -> Plan:
        """The latest plan while it is open, else a new one for what is pending.

        What is pending cannot change before a plan with the next number is there, and of two such plans the first wins.
        """
        if latest is not None and pending is None:
            log.info("going on with plan %d of run %s", latest.number, latest.run_id)
            return latest
        order = Order(
            source=self.config.source,
            input=self.source.root,
            date=self.config.date or f"{utc_now():%Y-%m-%d}",
            mask=self.config.mask,
        )
        limits = ChunkLimits(images=self.config.chunk, bytes=CHUNK_BYTES)
        return self.ledger.make_plan(pending, order, limits, latest)

    def _carry_out(self, plan: Plan, pool: Pool) -> Totals:
        """Write what is missing of a plan, then what belongs to its end."""
        started = utc_now()
        missing = self.ledger.missing_chunks(plan)
        work = self._work(plan)
        totals = Totals()
        with Progress(plan.images * len(missing) // plan.chunks, "labelling") as progress:
            for start in range(0, len(missing), WAVE):
                for row in self._wave(work, pool, missing[start : start + WAVE]):
                    chunk = totals_of(row)
                    progress.advance(int(row["images"]))
                    totals += chunk
        lost = self.ledger.missing_chunks(plan)
        if lost:
            raise LabellingFailed(
                f"{len(lost)} chunks of plan {plan.number} were not written; run the same command again"
            )
        finish(work, started, totals.cpu)
        return totals

    def _work(self, plan: Plan) -> Work:
        return Work(
            input=open_store(plan.order.input, field="input"),
            output=self.ledger.store,
            ledger=self.ledger,
            plan=plan,
            model=self.config.model,
            classes=self.checkpoint.classes,
            pixels=self.config.pixels,
        )

    def _wave(self, work: Work, pool: Pool, chunks: Sequence[int]) -> Iterator[ChunkRow]:
        """Send some chunks through read, segment and write; yields each one's counters as it is done."""
        quiet_ray_data()
        wave: ray.data.Dataset = ray.data.from_items(
            [{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks)
        )
        # Reading and writing claim no CPU: a stage that may always start cannot be starved by actors, of this job or of
        # another on the same cluster, which would hang both. Their number is what bounds them.
        tasks = ray.data.TaskPoolStrategy(size=min(2 * pool.high, len(chunks)))
        wave = wave.map(Read(work), compute=tasks, num_cpus=0)
        wave = wave.map(
            Segment,  # type: ignore[arg-type]  # a class is built once per actor
            fn_constructor_args=(work, self._predictor_factory(), pool.share),
            compute=ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
            num_cpus=pool.share.cpus,
            num_gpus=pool.share.gpus or None,
        )
        wave = wave.map(Write(work), compute=tasks, num_cpus=0)
        yield from own_errors(wave.iter_rows())

    def _predictor_factory(self) -> Callable[[], Predictor]:
        if self.make_predictor is not None:
            return self.make_predictor
        # The object store carries the weights to every node once; no shared folder is needed.
        reference, batch, compile = ray.put(self.checkpoint), self.config.batch, self.config.compile

        def build() -> Segmenter:
            checkpoint: Checkpoint = ray.get(reference)
            return Segmenter(checkpoint.model, checkpoint.inference, batch=batch, compile=compile)

        return build


def totals_of(row: ChunkRow) -> Totals:
    """The counters of one chunk."""
    cpu = Counter({key.removeprefix("cpu_"): value for key, value in row.items() if key.startswith("cpu_")})
    return Totals(labelled=int(row["labelled"]), errors=int(row["errors"]), cpu=cpu)


def _check_date(text: str) -> None:
    try:
        valid = datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError("date", text, "give a date as YYYY-MM-DD")
