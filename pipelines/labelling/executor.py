"""Carries chunks through the stages on Ray: chunk numbers -> read -> segment -> write -> tiny rows for the driver."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from pipelines.cluster.machine import give_memory_back
from pipelines.cluster.ray_data import quiet_ray_data, rows_of
from pipelines.cluster.resources import ActorConfig, ActorResources, Pool
from pipelines.cluster.session import ray_session
from pipelines.labelling.report.prometheus import LabelMetrics, Watch, watch_chunks
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import RunContext
from pipelines.labelling.stages.coordinator import Coordinator
from pipelines.labelling.stages.predictor import ModelToLoad, Predictor
from pipelines.labelling.stages.ray_line import ANSWER_S, RayLine, start_coordinator
from pipelines.labelling.stages.ray_rows import ReadRow, Row, WriteRow, chunk_of, row_of
from pipelines.labelling.stages.segment import Segment
from pipelines.labelling.stages.walk import Walk
from pspnet_core.checkpoints.checkpoint import Checkpoint

WAVE = 2048
"""Chunks handed to Ray Data at a time, so that the driver's memory does not grow with the plan."""

RESERVE = 0.5
"""Share of the CPUs that is left to the tasks that read and write."""


class RayExecutor(contextlib.AbstractContextManager["RayExecutor"]):
    """Executes on Ray, to which it connects when it is first used; a context, which disconnects."""

    def __init__(self, model: ModelToLoad, actors: ActorConfig) -> None:
        self.model, self.actors = model, actors
        self._context = contextlib.ExitStack()
        self._connection: _Connected | None = None

    def __exit__(self, *error: Any) -> None:
        self._connection = None
        self._context.__exit__(*error)

    def start(self) -> Coordinator:
        """As ``Executor.start``; connects to Ray and waits for room on the cluster.

        Raises:
            ConfigError: as ``ray_session`` and ``Pool.of``.
        """
        return Coordinator(self._connected().line)

    def _connected(self) -> "_Connected":
        if not self._connection:
            self._context.enter_context(ray_session())
            line = self._context.enter_context(start_coordinator())
            pool = Pool.of(self.actors, reserve=RESERVE)
            # The object store carries the weights to every node once; no shared folder is needed.
            load = functools.partial(_fetched, ray.put(self.model.checkpoint))
            self._connection = _Connected(line=line, pool=pool, make_predictor=self.model.maker(load, pool.actor.here))
        return self._connection

    def execute(
        self, walk: Walk, chunks: Sequence[int], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, Totals], None, None]:
        """As ``Executor.execute``; metrics are published meanwhile."""
        line, context = self._connected().line, walk.context
        line.ask("renew")
        quiet_ray_data()
        metrics = LabelMetrics(model=context.ledger.paths.partition, run=context.provenance.run_id)
        under_way = functools.partial(line.ask, "under_way", timeout=ANSWER_S)
        with watch_chunks(metrics, under_way, len(chunks)) as watch:
            for start in range(0, len(chunks), WAVE):
                if stopped():
                    return
                yield from self._wave(walk, chunks[start : start + WAVE], watch, stopped)
                give_memory_back()

    def _wave(
        self, walk: Walk, chunks: Sequence[int], watch: Watch, stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, Totals]]:
        with contextlib.closing(rows_of(self._dataset(walk, chunks))) as rows:
            for chunk in map(chunk_of, rows):
                watch.add(chunk.number, chunk.totals)
                yield chunk.number, chunk.totals
                if stopped():
                    self.stop()  # for each row: a coordinator that had to be started again does not know
                    if watch.is_idle():
                        return

    def _dataset(self, walk: Walk, chunks: Sequence[int]) -> ray.data.Dataset:
        pool = self._connected().pool
        numbers: ray.data.Dataset = ray.data.from_items(
            [{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks)
        )
        # Reading and writing claim no CPU: a stage that may always start cannot be starved by actors, of this job or of
        # another on the same cluster, which would hang both. Their number is what bounds them.
        tasks = ray.data.TaskPoolStrategy(size=min(2 * pool.high, len(chunks)))
        encoded = numbers.map(ReadRow(walk.read), compute=tasks, num_cpus=0)
        segmented = encoded.map(
            _SegmentRow,  # type: ignore[arg-type]  # a class is built once per actor
            fn_constructor_args=(walk.context, self._connected().make_predictor, pool.actor),
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.low,
                max_size=pool.high,
                max_concurrent_calls_per_actor=self.model.calls,
                enable_true_multi_threading=True,  # else the calls would take turns as a whole
            ),
            num_cpus=pool.actor.cpus,
            num_gpus=pool.actor.gpus or None,
        )
        return segmented.map(WriteRow(walk.write), compute=tasks, num_cpus=0)

    def stop(self) -> None:
        """As ``Executor.stop``; does not wait."""
        if self._connection:
            self._connection.line.tell("close")


def _fetched(checkpoint: "ray.ObjectRef[Checkpoint]") -> Checkpoint:
    return ray.get(checkpoint)


@dataclass(frozen=True, kw_only=True)
class _Connected:
    """What all walks of an executor share as long as it is connected to Ray."""

    line: RayLine
    pool: Pool
    make_predictor: Callable[[], Predictor]


class _SegmentRow:
    """Stage 2 on rows, on an actor."""

    def __init__(self, context: RunContext, make_predictor: Callable[[], Predictor], actor: ActorResources) -> None:
        self.segment = Segment(context, make_predictor, actor.here())

    def __call__(self, row: Row) -> Row:
        return row_of(self.segment(chunk_of(row)))
