"""Labelling: ``LabelConfig`` in, an exact label table out. The driver's side; a chunk's side is ``segmenting.py``.

finish the plan that is open -> list the input -> subtract the ledger -> write the plan -> Ray Data: chunk numbers ->
read -> segment -> write -> tiny rows back to the driver -> class statistics and the run record. Guarantees:
``docs/guarantees.md``.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.cluster.resources import Pool, WorkerRange
from pipelines.cluster.session import ray_session
from pipelines.label_table.ledger import ChunkLimits, Ledger, Order, Plan
from pipelines.label_table.listing import VERSION, Listing, spooled
from pipelines.label_table.schema import Paths, Stamp, utc_now
from pipelines.labelling.executor import Chain, Stage, segmenter_of
from pipelines.labelling.lease import leased
from pipelines.labelling.report.costs import Prices, spent
from pipelines.labelling.report.mlflow_run import log_end, log_start
from pipelines.labelling.report.prometheus import LabelMetrics, watched
from pipelines.labelling.report.run_record import Effort, finish
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.retry_errors import ReadFailed, Rewrite, by_mask, check_kinds, find_failed, reconcile
from pipelines.labelling.stages.chunks import PATIENCE, Read, Work, Write
from pipelines.labelling.stages.coordinator import Coordinator, coordinated
from pipelines.labelling.stages.segment import Predictor
from pipelines.models.loading import MLFLOW_SCHEMES, load_rgb_model
from pipelines.process.progress import Progress
from pipelines.process.sigterm import Ending, on_sigterm
from pipelines.sources import Inputs, find_source
from pipelines.sources.dates import run_date, since_time
from pipelines.storage import open_store
from pipelines.tracking.background_run import BackgroundRun, background_run
from pipelines.tracking.registry import Origin, origin_of
from pipelines.tracking.runs import code_version
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError, PspnetError, Terminated

log = logging.getLogger(__name__)
CHUNK_BYTES = 64 * 2**20
ENOUGH_TO_JUDGE = 100
"""Images after which ``--max-errors`` is first looked at."""


class LabellingFailed(PspnetError):
    """The run stopped; what is written stays, the plan stays, and the same command goes on from there."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Label every image below a prefix and write masks and class statistics as Parquet."""

    input: str
    """Images: folders, globs or files, local or URIs (s3://...), comma-separated; {date} stands for the run's date."""
    output: str
    """Where the label table goes: a local folder or a URI."""
    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    date: str | None = None
    """Partition dt= of new labels: YYYY-MM-DD, today (UTC, the default) or yesterday."""
    workers: str | None = None
    """Model actors: N or MIN:MAX; by default up to one per GPU, or one on CPUs."""
    gpus: float | None = None
    """GPUs per actor, fractions allowed; by default 1 when the cluster has any."""
    chunk: int = 256
    """Images per chunk, which is one Parquet file."""
    batch: int = 8
    """Most images in one forward pass; fewer where an actor's memory does not hold them."""
    mask: str = "rle"
    """Mask columns to fill: rle (run lengths), png or both."""
    scales: tuple[float, ...] | None = None
    """Input scales to average over; by default the checkpoint's."""
    flip: bool | None = None
    """Whether to average with the mirrored image; by default the checkpoint's setting."""
    window: int | None = None
    """Side of the sliding window in pixels, 0 for whole images; by default the checkpoint's."""
    reduced: bool | None = None
    """Whether JPEGs larger than the network's input are decoded to fewer pixels; by default the checkpoint's."""
    compile: bool = False
    """Whether the network is compiled (CUDA graphs on GPUs): for many images of one size."""
    source: str = "images"
    """Input format: images, webdataset, parquet or manifest."""
    since: str | None = None
    """Label only what was modified then or later: a date, a time (UTC), or a span such as 36h or 7d."""
    pixels: int = 100_000_000
    """Largest image in pixels; a larger one becomes an error row."""
    max_errors: float = 1.0
    """Share of images that may become error rows before the run stops; judged from the first hundred on."""
    retry_errors: tuple[str, ...] | None = None
    """Label nothing new; try error rows of these kinds again (such as Missing,Denied), or all."""
    wait: bool = True
    """Whether to wait while another run labels with the same model into the same output; false works beside it."""
    price_gpu: float | None = None
    """Price of a GPU for an hour, in any currency: for the cost in the run record."""
    price_cpu: float | None = None
    """Price of a CPU for an hour."""
    track: bool | None = None
    """Whether the run is logged to MLflow; by default if MLFLOW_TRACKING_URI is set or the model is from there."""
    experiment: str = "pspnet-labelling"
    """MLflow experiment of the run."""

    def __post_init__(self) -> None:
        for name in ("chunk", "batch", "pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "give a positive number")
        if not 0 <= self.max_errors <= 1:
            raise ConfigError("max_errors", self.max_errors, "give a share in 0..1")
        if self.retry_errors is not None:
            check_kinds(self.retry_errors)
        if self.mask not in ("rle", "png", "both"):
            raise ConfigError("mask", self.mask, "choose rle, png or both")
        if self.workers is not None:
            WorkerRange.parse(self.workers)
        find_source(self.source)
        self.inputs(utc_now())
        self.prices()

    def inputs(self, now: datetime.datetime) -> Inputs:
        """What there is to label, for a run that starts ``now``."""
        since = None if self.since is None else since_time(self.since, now)
        return Inputs.of(self.input, date=run_date(self.date, now), since=since)

    def prices(self) -> Prices:
        """Those that are given."""
        return Prices(gpu=self.price_gpu, cpu=self.price_cpu)

    @property
    def tracked(self) -> bool:
        """Whether the run is logged to MLflow."""
        if self.track is not None:
            return self.track
        return bool(os.environ.get("MLFLOW_TRACKING_URI")) or self.model.startswith(MLFLOW_SCHEMES)


def label(config: LabelConfig, make_predictor: Callable[[], Predictor] | None = None) -> dict[str, Any]:
    """Label what is not labelled yet; with ``retry_errors`` instead what could not be labelled before.

    Args:
        make_predictor: stands in for the model's ``Segmenter``, in benchmarks and tests.

    Returns:
        ``run_id``, ``images`` (those listed and those of a plan that was open; or those tried again), which is the sum
        of ``labelled``, ``errors`` and ``skipped`` (done before, or by another driver meanwhile), ``seconds``,
        ``images_per_second``, ``damaged`` (archives and Parquet files that could not be listed in full), ``labels`` (a
        glob over the label table) and ``cpu_ms`` (CPU milliseconds per image, stage by stage).

    Raises:
        ConfigError: a mistake in the config; nothing was written, unless a plan was open, which is finished first.
        LabellingFailed: the run broke off; run it again to finish it.
        Terminated: SIGTERM came; the chunks that were under way are written.
    """
    started = time.perf_counter()
    origin = origin_of(config.model)
    checkpoint = load_rgb_model(origin.uri)
    checkpoint = checkpoint.with_settings(
        scales=config.scales, flip=config.flip, window=config.window, reduced=config.reduced
    )
    output = open_store(config.output, field="output", writable=True)
    ledger = Ledger(output, Paths(partition=checkpoint.partition))
    with (
        on_sigterm() as ending,
        background_run(config.experiment, checkpoint.partition, wanted=config.tracked) as record,
    ):
        job = _Job(
            config=config,
            checkpoint=checkpoint,
            origin=origin,
            ledger=ledger,
            make_predictor=make_predictor,
            record=record,
            ending=ending,
        )
        outcome = job.run() if config.retry_errors is None else job.replay(config.retry_errors)
        totals = outcome.totals
        result = _result(outcome, time.perf_counter() - started)
        result["labels"] = output.uri_of(f"{ledger.paths.masks}*/*.parquet")
        if record:
            record.log(lambda run: log_end(run, result, totals, spent(totals, config.prices())))
        if outcome.stopped:
            raise Terminated(result)
    return result


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What says which model it is, whatever URI it came from."""
    return {
        "partition": checkpoint.partition,
        "fingerprint": checkpoint.fingerprint,
        "inference": dataclasses.asdict(checkpoint.settings),
    }


def _result(outcome: "_Outcome", seconds: float) -> dict[str, Any]:
    """The numbers of the result line."""
    totals = outcome.totals
    images = max(outcome.images, totals.done)
    result = {
        "run_id": outcome.run_id,
        "images": images,
        "labelled": totals.labelled,
        "skipped": images - totals.done,
        "errors": totals.errors,
        "damaged": outcome.damaged,
        "seconds": round(seconds, 3),
        "images_per_second": round(totals.done / seconds, 2),
        "cpu_ms": {stage: round(1000 * cpu / max(1, totals.done), 3) for stage, cpu in sorted(totals.cpu.items())},
    }
    # What was not begun is neither done nor skipped.
    return result | {"images": totals.done, "skipped": 0, "stopped": True} if outcome.stopped else result


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What an invocation came to: ``images`` it was about, and whether it was stopped before it was through.

    ``damaged`` is how many files with many images could not be listed in full.
    """

    images: int
    totals: Totals
    run_id: str | None
    stopped: bool = False
    damaged: int = 0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The parts of one invocation, put together."""

    config: LabelConfig
    checkpoint: Checkpoint
    origin: Origin
    ledger: Ledger
    make_predictor: Callable[[], Predictor] | None
    record: BackgroundRun | None
    ending: Ending

    def run(self) -> _Outcome:
        """Finish the plan that is open, if there is one; then list, and carry out plans until nothing is pending."""
        with contextlib.ExitStack() as stack:
            outcome, begun = None, False
            while outcome is None:  # where another run was waited for, what was found before is out of date
                outcome, begun = self._run(stack, begun=begun), True
            return outcome

    def _run(self, run: contextlib.ExitStack, *, begun: bool) -> "_Outcome | None":
        """As ``run``, which ends with ``run``; None where another run was waited for, and nothing was done yet."""
        now = utc_now()
        inputs = self.config.inputs(now)
        order = Order(
            source=self.config.source,
            input=inputs.uris,
            date=f"{run_date(self.config.date, now)}",
            mask=self.config.mask,
        )
        latest = self.ledger.latest_plan()
        opened = latest if self._is_open(latest) else None
        with contextlib.ExitStack() as stack:
            crew = functools.cache(lambda: stack.enter_context(self._crew()))
            before = _Outcome(images=0, totals=Totals(), run_id=None)
            if opened:  # before anything is listed: {date} may lead to a folder that is not there (yet)
                if not begun and run.enter_context(self._under_way()):
                    return None
                before = self._resume(opened, crew)
            if before.stopped:
                return before
            with spooled(self._found(inputs)) as listing:
                if not opened:
                    self._check_images(listing, inputs)
                    if not begun and run.enter_context(self._under_way()):
                        return None
                gone = listing.absent(self.ledger.rows(opened, VERSION.names)) if opened else 0
                outcome = self._label(listing, order, crew)
        return dataclasses.replace(
            outcome,
            images=outcome.images + gone,
            totals=before.totals + outcome.totals,
            damaged=len(set(inputs.damaged)),
        )

    def _resume(self, plan: Plan, crew: Callable[[], "_Crew"]) -> _Outcome:
        """Finish an open plan."""
        log.info("going on with plan %d of run %s", plan.number, plan.run_id)
        totals = self._carry_out(plan, crew())
        return _Outcome(images=totals.done, totals=totals, run_id=plan.run_id, stopped=self._stopped)

    def _found(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """What there is, as it is listed."""
        with Progress(None, "listing") as progress:
            for batch in find_source(self.config.source).find(inputs):
                progress.advance(len(batch))
                yield batch

    def _check_images(self, listing: Listing, inputs: Inputs) -> None:
        """ConfigError where there is nothing to label, which is no mistake with ``--since``."""
        if not listing.images and inputs.since is None:
            raise ConfigError("input", inputs, f"holds no images for --source {self.config.source}; check the prefix")

    def _label(self, listing: Listing, order: Order, crew: Callable[[], "_Crew"]) -> _Outcome:
        """Carry out plans until nothing of a listing is pending; ``images`` also has those of a driver beside it."""
        images = listing.images + self.ledger.unlisted(listing)
        log.info("%d images listed, to be labelled by %s", listing.images, self.checkpoint.partition)
        totals, latest = Totals(), self.ledger.latest_plan()
        pending = self._pending(latest, listing)
        while pending is None or len(pending):
            latest = self._plan(latest, pending, order)
            pending = None  # not held while the plan is carried out
            totals += self._carry_out(latest, crew())
            if self._stopped:
                break
            pending = self._pending(latest, listing)
        return _Outcome(images=images, totals=totals, run_id=latest.run_id if latest else None, stopped=self._stopped)

    def replay(self, kinds: Sequence[str]) -> _Outcome:
        """Try error rows again."""
        with self._under_way(replacing=True):
            return self._replay(kinds)

    def _replay(self, kinds: Sequence[str]) -> _Outcome:
        failed = find_failed(self.ledger, kinds)
        images = sum(file.rows for file in failed)
        log.info("%d images in %d files to be tried again", images, len(failed))
        totals, latest = Totals(), self.ledger.latest_plan()
        if failed and latest:
            with self._crew() as crew:
                for mask, files in by_mask(failed):
                    work = self._work(dataclasses.replace(latest.stamp, mask=mask), crew)
                    chain = self._chain(work, crew, ReadFailed(work, files, kinds), Rewrite(work, files, kinds))
                    totals += self._through(chain, range(len(files)), sum(file.rows for file in files), crew)
        reconcile(self.ledger, self.checkpoint.classes)
        run_id = latest.run_id if latest else None
        return _Outcome(images=images, totals=totals, run_id=run_id, stopped=self._stopped)

    @property
    def _stopped(self) -> bool:
        """Whether the run was asked to end."""
        return self.ending.came

    @contextlib.contextmanager
    def _under_way(self, *, replacing: bool = False) -> Iterator[bool]:
        """From here on others are told of the run; of one that a mistake in the config ends before, they need not.

        Args:
            replacing: whether label files are to be written again.

        Yields:
            Whether another run was waited for.
        """
        store = self.ledger.store
        if replacing:
            store.check_replaces_atomically()
        else:
            store.check_writable_atomically()
        with leased(store, self.ledger.paths.lease, wait=self.config.wait) as waited:
            if self.record:
                setting = dataclasses.asdict(self.config) | _identity(self.checkpoint)
                self.record.log(lambda run: log_start(run, setting, self.origin))
            yield waited

    @contextlib.contextmanager
    def _crew(self) -> Iterator["_Crew"]:
        """A Ray session with what all chains of this invocation share."""
        with ray_session(), coordinated() as coordinator:
            pool = Pool.of(self.config.workers, self.config.gpus, reserve=0.5)
            make_predictor = self.make_predictor or segmenter_of(
                self.checkpoint, batch=self.config.batch, compile=self.config.compile, share=pool.share
            )
            yield _Crew(pool=pool, coordinator=coordinator, make_predictor=make_predictor)

    def _pending(self, latest: Plan | None, listing: Listing) -> pa.Table | None:
        """What a new plan would hold; None while the latest plan is open, which comes first."""
        return None if self._is_open(latest) else self.ledger.pending(listing)

    def _is_open(self, plan: Plan | None) -> bool:
        return plan is not None and not self.ledger.is_finished(plan)

    def _plan(self, latest: Plan | None, pending: pa.Table | None, order: Order) -> Plan:
        """The latest plan while it is open, else a new one for what is pending.

        What is pending cannot change before a plan with the next number is there, and of two such plans the first wins.
        """
        if latest is not None and pending is None:
            log.info("going on with plan %d of run %s", latest.number, latest.run_id)
            return latest
        limits = ChunkLimits(images=self.config.chunk, bytes=CHUNK_BYTES)
        return self.ledger.make_plan(pending, order, limits, latest)

    def _carry_out(self, plan: Plan, crew: "_Crew") -> Totals:
        """Write what is missing of a plan, then what belongs to its end."""
        started = utc_now()
        missing = self.ledger.missing_chunks(plan)
        work = self._work(plan.stamp, crew)
        chain = self._chain(work, crew, Read(work, plan), Write(work, plan))
        totals = self._through(chain, missing, plan.images * len(missing) // plan.chunks, crew)
        lost = self.ledger.missing_chunks(plan)
        if lost and self._stopped:
            return totals
        if lost:
            raise LabellingFailed(
                f"{len(lost)} chunks of plan {plan.number} were not written; run the same command again"
            )
        self._finish(work, plan, started, totals)
        return totals

    def _finish(self, work: Work, plan: Plan, started: datetime.datetime, totals: Totals) -> None:
        code = {name.rpartition(".")[2]: value for name, value in code_version().items()}
        about = {"model_version": self.origin.version, "model_run_id": self.origin.run_id, "code": code}
        record = finish(work, plan, Effort(started=started, totals=totals, prices=self.config.prices(), about=about))
        if self.record:
            self.record.log(lambda run: run.log_json(f"runs/{plan.run_id}.json", record))

    def _work(self, stamp: Stamp, crew: "_Crew") -> Work:
        output = open_store(self.ledger.store.root, field="output", retries=PATIENCE)
        return Work(
            ledger=Ledger(output, self.ledger.paths),
            stamp=stamp,
            model=self.config.model,
            classes=self.checkpoint.classes,
            pixels=self.config.pixels,
            coordinator=crew.coordinator,
        )

    def _chain(self, work: Work, crew: "_Crew", read: Stage, write: Stage) -> Chain:
        return Chain(work=work, read=read, write=write, pool=crew.pool, make_predictor=crew.make_predictor)

    def _through(self, chain: Chain, chunks: Sequence[int], images: int, crew: "_Crew") -> Totals:
        """Send chunks through a chain, and watch them come out.

        Raises:
            LabellingFailed: too large a share of the images cannot be labelled.
        """
        metrics = LabelMetrics(model=self.checkpoint.partition, run=chain.work.stamp.run_id)
        close = crew.coordinator.close
        crew.coordinator.renew()
        with (
            self.ending.orderly(close),
            Progress(images, "labelling") as progress,
            watched(metrics, crew.coordinator.under_way, len(chunks)) as watch,
        ):

            def over() -> bool:
                return self._stopped or self._too_many(watch.totals)

            for row in chain.run(chunks, over):
                progress.advance(int(row["images"]), errors=int(row["errors"]))
                watch.add(int(row["chunk"]), Totals.of(row))
                if over():
                    close()  # for each row: a coordinator that had to be started again does not know
                    if watch.is_idle():
                        break
        totals = watch.totals
        if self._too_many(totals):
            reasons = ", ".join(f"{kind} {count}" for kind, count in totals.kinds.most_common(5))
            raise LabellingFailed(
                f"{totals.errors} of {totals.done} images cannot be labelled ({reasons}), more than --max-errors "
                f"{self.config.max_errors:g} allows; what is done stays, and the same command goes on from there"
            )
        return totals

    def _too_many(self, totals: Totals) -> bool:
        return totals.done >= ENOUGH_TO_JUDGE and totals.errors > self.config.max_errors * totals.done


@dataclass(frozen=True, kw_only=True)
class _Crew:
    """What all chains of an invocation share, as long as it is connected to Ray."""

    pool: Pool
    coordinator: Coordinator
    make_predictor: Callable[[], Predictor]
