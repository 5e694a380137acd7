"""Labelling: ``LabelConfig`` in, an exact label table out. This is the driver, which says what is done and when.

take the lease -> finish the plan that is open -> list the input -> subtract the ledger -> write a plan -> execute it ->
class statistics and the run record -> the next plan, until nothing is pending. An executor says how a plan's chunks go
through the ``stages``. Guarantees: ``docs/guarantees.md``.
"""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.label_table.ledger import ChunkLimits, Ledger, Plan, PlanSpec
from pipelines.label_table.listing import VERSION, Listing, spool
from pipelines.label_table.schema import Paths, RowProvenance, utc_now
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.course import Course
from pipelines.labelling.executor import RayExecutor
from pipelines.labelling.executor_choice import Executors, check_local
from pipelines.labelling.in_process import InProcessExecutor
from pipelines.labelling.lease import hold_lease
from pipelines.labelling.report.mlflow_run import log_end, log_start
from pipelines.labelling.report.run_record import write_run_record
from pipelines.labelling.report.totals import Totals, spent
from pipelines.labelling.retry_errors import ReadFailed, Rewrite, by_mask, find_failed, reconcile
from pipelines.labelling.stages.chunks import PATIENCE, Read, RunContext, Write
from pipelines.labelling.stages.predictor import ModelToLoad, Predictor
from pipelines.labelling.stages.walk import Executor, Walk
from pipelines.models.loading import load_rgb_model
from pipelines.process.config_tree import flatten
from pipelines.process.progress import Progress
from pipelines.process.sigterm import Ending, on_sigterm
from pipelines.sources import Inputs, find_source
from pipelines.sources.dates import run_date
from pipelines.sources.omissions import Omissions
from pipelines.storage import open_store
from pipelines.tracking.background_run import BackgroundRun, background_run
from pipelines.tracking.model_uris import Origin
from pipelines.tracking.provenance import code_version
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError, PspnetError, Terminated

log = logging.getLogger(__name__)
EXPERIMENT = "pspnet-labelling"
CHUNK_BYTES = 64 * 2**20


class LabellingFailed(PspnetError):
    """The run stopped; what is written stays, the plan stays, and the same command goes on from there."""


def label(config: LabelConfig, make_predictor: Callable[[], Predictor] | None = None) -> dict[str, Any]:
    """Label what is not labelled yet; with ``retry_errors`` instead what could not be labelled before.

    Args:
        make_predictor: stands in for the model's ``Segmenter``, in benchmarks and tests.

    Returns:
        ``run_id``, ``images`` (those listed and those of a plan that was open; or those tried again), which is the sum
        of ``labelled``, ``errors`` and ``skipped`` (done before, or by another driver meanwhile), ``seconds``,
        ``images_per_second``, ``damaged`` (files with many images that could not be listed in full, and names and
        folders that cannot be read), ``left_out`` (objects and members of other formats, by suffix), ``labels`` (a glob
        over the label table) and ``cpu_ms`` (CPU milliseconds per image and stage).

    Raises:
        ConfigError: a mistake in the config; nothing was written, unless a plan was open, which is finished first.
        LabellingFailed: the run broke off; run it again to finish it.
        Terminated: SIGTERM came; the chunks that were under way are written.
    """
    started = time.perf_counter()
    check_local(config)
    checkpoint, origin = load_rgb_model(config.model, config.inference)
    output = open_store(config.output, field="output", writable=True)
    if config.retry_errors is None:
        output.check_writable_atomically()
    else:
        output.check_replaces_atomically()
    ledger = Ledger(output, Paths(partition=checkpoint.partition))
    actors, tracking = config.actors, config.tracking
    model = ModelToLoad(checkpoint=checkpoint, batch=actors.batch, compile=actors.compile, stand_in=make_predictor)
    background: contextlib.AbstractContextManager[BackgroundRun | None] = contextlib.nullcontext()
    if tracking.wanted(config.model):
        background = background_run(tracking.experiment or EXPERIMENT, checkpoint.partition)
    with (
        on_sigterm() as ending,
        background as record,
        hold_lease(output, ledger.paths.lease, wait=config.wait),
        RayExecutor(model, actors) as on_ray,
    ):
        job = _Job(
            config=config,
            checkpoint=checkpoint,
            origin=origin,
            ledger=ledger,
            executors=Executors(config=config, on_ray=on_ray, in_process=InProcessExecutor(model)),
            record=record,
            ending=ending,
        )
        if record:
            setting = flatten(config) | _identity(checkpoint)
            record.log(lambda run: log_start(run, setting, origin))
        outcome = job.label() if config.retry_errors is None else job.retry(config.retry_errors)
        result = _result(outcome, time.perf_counter() - started)
        result["labels"] = output.uri_of(f"{ledger.paths.masks}*/*.parquet")
        if record:
            record.log(lambda run: log_end(run, result, outcome.totals, spent(outcome.totals, config.prices())))
        if outcome.stopped:
            raise Terminated(result)
    return result


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which model it is, whatever URI it came from."""
    return {
        "partition": checkpoint.partition,
        "fingerprint": checkpoint.fingerprint,
        "inference": dataclasses.asdict(checkpoint.settings),
    }


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The end of an invocation.

    Attributes:
        images: how many it was about.
        stopped: whether it was stopped before it was through.
        omissions: what the listing left out.
    """

    images: int
    totals: Totals
    run_id: str | None
    stopped: bool = False
    omissions: Omissions = dataclasses.field(default_factory=Omissions)


def _result(outcome: _Outcome, seconds: float) -> dict[str, Any]:
    """The numbers of the result line."""
    totals = outcome.totals
    images = max(outcome.images, totals.done)
    result = {
        "run_id": outcome.run_id,
        "images": images,
        "labelled": totals.labelled,
        "skipped": images - totals.done,
        "errors": totals.errors,
        **outcome.omissions.counts(),
        "seconds": round(seconds, 3),
        "images_per_second": round(totals.done / seconds, 2),
        "cpu_ms": {stage: round(1000 * cpu / max(1, totals.done), 3) for stage, cpu in sorted(totals.cpu.items())},
    }
    # What was not begun is neither done nor skipped.
    return result | {"images": totals.done, "skipped": 0, "stopped": True} if outcome.stopped else result


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One invocation, which holds the lease."""

    config: LabelConfig
    checkpoint: Checkpoint
    origin: Origin
    ledger: Ledger
    executors: Executors
    record: BackgroundRun | None
    ending: Ending

    def label(self) -> _Outcome:
        """Finish the plan that is open, if there is one; then list, and execute plans until nothing is pending."""
        now = utc_now()
        inputs = self.config.inputs(now)
        opened = self._open_plan()
        totals = Totals()
        if opened:  # before anything is listed: {date} may lead to a folder that is not there (yet)
            totals = self._execute(opened)
            if self.ending.came:
                return _Outcome(images=totals.done, totals=totals, run_id=opened.run_id, stopped=True)
        with spool(self._found(inputs)) as listing:
            if not opened and not listing.images and inputs.since is None:
                if isinstance(inputs.omissions.first, PspnetError):
                    raise inputs.omissions.first
                remedy = f"holds no images for --source {self.config.source}; check the prefix"
                raise ConfigError("input", inputs, remedy)
            gone = listing.absent(self.ledger.rows(opened, VERSION.names)) if opened else 0
            outcome = self._label(listing, self._spec(inputs, now))
        return dataclasses.replace(
            outcome,
            images=outcome.images + gone,
            totals=totals + outcome.totals,
            omissions=inputs.omissions,
        )

    def _label(self, listing: Listing, spec: PlanSpec) -> _Outcome:
        """Execute plans until nothing of a listing is pending; ``images`` also has those of a driver beside it."""
        images = listing.images + self.ledger.unlisted(listing)
        log.info("%d images listed, to be labelled by %s", listing.images, self.checkpoint.partition)
        totals, plan = Totals(), self.ledger.latest_plan()
        while not self.ending.came:
            if plan is None or self.ledger.is_finished(plan):
                pending = self.ledger.pending(listing)
                if not len(pending):
                    break
                # Nothing else can become pending before this plan is there, and of two drivers' plans the first wins.
                plan = self.ledger.make_plan(pending, spec, self._limits, plan)
                del pending  # not held while the plan is executed
            totals += self._execute(plan)
        run_id = plan.run_id if plan else None
        return _Outcome(images=images, totals=totals, run_id=run_id, stopped=self.ending.came)

    def retry(self, kinds: Sequence[str]) -> _Outcome:
        """Try error rows of some kinds again."""
        failed = find_failed(self.ledger, kinds)
        images = sum(file.rows for file in failed)
        log.info("%d images in %d files to be tried again", images, len(failed))
        totals, latest = Totals(), self.ledger.latest_plan()
        if failed and latest:
            executor = self.executors.suited_to(images)
            for mask, files in by_mask(failed):
                context = self._context(dataclasses.replace(latest.provenance, mask=mask), executor)
                walk = Walk(
                    context=context, read=ReadFailed(context, files, kinds), write=Rewrite(context, files, kinds)
                )
                totals += self._carry(executor, walk, range(len(files)), sum(file.rows for file in files))
        reconcile(self.ledger, self.checkpoint.classes)
        run_id = latest.run_id if latest else None
        return _Outcome(images=images, totals=totals, run_id=run_id, stopped=self.ending.came)

    def _open_plan(self) -> Plan | None:
        """The latest plan, unless it is finished."""
        latest = self.ledger.latest_plan()
        return None if latest is None or self.ledger.is_finished(latest) else latest

    def _spec(self, inputs: Inputs, now: datetime.datetime) -> PlanSpec:
        return PlanSpec(
            source=self.config.source,
            input=inputs.uris,
            date=f"{run_date(self.config.date, now)}",
            mask=self.config.mask,
        )

    @property
    def _limits(self) -> ChunkLimits:
        return ChunkLimits(images=self.config.chunk, bytes=CHUNK_BYTES)

    def _found(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """The images, as they are listed."""
        with Progress(None, "listing") as progress:
            for batch in find_source(self.config.source).find(inputs):
                progress.advance(len(batch))
                yield batch
        inputs.omissions.tell()

    def _execute(self, plan: Plan) -> Totals:
        """Write what is missing of a plan, then what belongs to its end.

        Raises:
            LabellingFailed: chunks are still missing.
        """
        log.info("executing plan %d of run %s", plan.number, plan.run_id)
        started = utc_now()
        missing = self.ledger.missing_chunks(plan)
        images = plan.images * len(missing) // plan.chunks
        totals = Totals()
        if missing:
            executor = self.executors.suited_to(images)
            context = self._context(plan.provenance, executor)
            walk = Walk(context=context, read=Read(context, plan), write=Write(context, plan))
            totals = self._carry(executor, walk, missing, images)
        lost = self.ledger.lost_chunks(plan)
        if not lost:
            self._record(plan, started, totals)
        elif not self.ending.came:
            raise LabellingFailed(
                f"{len(lost)} chunks of plan {plan.number} were not written; run the same command again"
            )
        return totals

    def _context(self, provenance: RowProvenance, executor: Executor) -> RunContext:
        output = open_store(self.ledger.store.root, field="output", retries=PATIENCE)
        return RunContext(
            ledger=Ledger(output, self.ledger.paths),
            provenance=provenance,
            model=self.config.model,
            classes=self.checkpoint.classes,
            max_pixels=self.config.max_pixels,
            coordinator=executor.start(),
        )

    def _carry(self, executor: Executor, walk: Walk, chunks: Sequence[int], images: int) -> Totals:
        """Send chunks through the stages, and watch them come out.

        Raises:
            LabellingFailed: too large a share of the images cannot be labelled, or too many chunks end processes.
        """
        course = Course(max_errors=self.config.max_errors)
        done = executor.execute(walk, chunks, lambda: self.ending.came or bool(course.failure))
        with (
            contextlib.closing(done),
            self.ending.orderly(executor.stop),
            Progress(images, "labelling") as progress,
        ):
            for _, totals in done:
                course.add(totals)
                progress.advance(totals.images, errors=totals.errors)
        if course.failure:
            raise LabellingFailed(f"{course.failure}; what is done stays, and the same command goes on from there")
        return course.totals

    def _record(self, plan: Plan, started: datetime.datetime, totals: Totals) -> None:
        code = {name.rpartition(".")[2]: value for name, value in code_version().items()}
        record = write_run_record(
            self.ledger,
            plan,
            self.checkpoint.classes,
            started=started,
            totals=totals,
            prices=self.config.prices(),
            about={
                "model": self.config.model,
                "model_version": self.origin.version,
                "model_run_id": self.origin.run_id,
                "code": code,
            },
        )
        if self.record:
            self.record.log(lambda run: run.log_json(f"runs/{plan.run_id}.json", record))
