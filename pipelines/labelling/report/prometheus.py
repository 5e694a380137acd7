"""Prometheus metrics of labelling, through Ray: every node of a cluster exports them, with the prefix ``ray_``.

The stages measure, their numbers travel with the chunks, and the driver publishes the sums every few seconds. So a task
that runs twice is counted once, a process that dies loses no counts, and an image costs nothing. ``METRICS`` names them
all; ``docs/watching.md`` shows them.
"""

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge

from pipelines.labelling.report.totals import Totals
from pipelines.process.background import ticking

log = logging.getLogger(__name__)
EVERY_S = 5.0
"""Seconds between two publications. Ray exports every 10 s, and forgets a gauge that was not set for 20 s."""

EXPORTED = "ray_"
"""What Ray puts before a metric's name."""

RUN_TAGS = ("model", "run")
"""Tags of every metric: the partition ``model=`` of the label table, and the run id."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of ``METRICS``: what is measured, and its tags besides ``RUN_TAGS``."""

    kind: Literal["counter", "gauge"]
    text: str
    tags: tuple[str, ...] = ()


METRICS = {
    "pspnet_images_total": Metric(kind="counter", text="Images that got a row, error rows included"),
    "pspnet_errors_total": Metric(kind="counter", text="Images that got an error row, by kind", tags=("kind",)),
    "pspnet_bytes_read_total": Metric(kind="counter", text="Bytes of encoded images that were read"),
    "pspnet_stage_seconds_total": Metric(
        kind="counter",
        text="Seconds of each stage; clock is cpu or wall, segment is decode, predict and encode together",
        tags=("stage", "clock"),
    ),
    "pspnet_held_seconds_total": Metric(
        kind="counter",
        text="Seconds of the model's actors, and times each gpu and cpu that they held",
        tags=("resource",),
    ),
    "pspnet_chunks": Metric(
        kind="gauge",
        text="Chunks that are not done; state is waiting, read (or read, before the model), segment or write",
        tags=("state",),
    ),
}
STATES = ("waiting", "read", "segment", "write")


class LabelMetrics:
    """The metrics of one run.

    Args:
        model: partition ``model=`` of the label table.
        run: the run's id.
    """

    def __init__(self, *, model: str, run: str) -> None:
        tags = dict(zip(RUN_TAGS, (model, run), strict=True))
        self.counters = {name: _counter(name, tags) for name, row in METRICS.items() if row.kind == "counter"}
        self.gauges = {name: _gauge(name, tags) for name, row in METRICS.items() if row.kind == "gauge"}
        self.published = Totals()

    def publish(self, totals: Totals) -> None:
        """Bring the counters up to ``totals``, which only grow."""
        before, self.published = self.published, totals
        self._add("pspnet_images_total", totals.done - before.done)
        self._add("pspnet_bytes_read_total", totals.bytes_read - before.bytes_read)
        for kind, count in totals.kinds.items():
            self._add("pspnet_errors_total", count - before.kinds[kind], kind=kind)
        for clock, now, then in (("cpu", totals.cpu, before.cpu), ("wall", totals.wall, before.wall)):
            for stage, seconds in now.items():
                self._add("pspnet_stage_seconds_total", seconds - then[stage], stage=stage, clock=clock)
        for resource, seconds in totals.held.items():
            self._add("pspnet_held_seconds_total", seconds - before.held[resource], resource=resource)

    def queue(self, states: Mapping[str, int]) -> None:
        """Set the gauge of chunks in each of ``STATES``."""
        for state in STATES:
            self.gauges["pspnet_chunks"].set(states.get(state, 0), {"state": state})

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self.counters[name].inc(value, tags)


UnderWay = Callable[[Sequence[int]], Mapping[str, int]]
"""``ChunkStates.under_way``."""


class Watch:
    """Totals of the chunks so far, which another thread publishes.

    Args:
        chunks: how many there are.
    """

    def __init__(self, metrics: LabelMetrics, under_way: UnderWay, chunks: int) -> None:
        self.metrics, self.under_way, self.left = metrics, under_way, chunks
        self.totals = Totals()
        self._gone: collections.deque[int] = collections.deque()  # done, and not yet reported to ``under_way``

    def add(self, chunk: int, totals: Totals) -> None:
        """Count a chunk that is done."""
        self.totals += totals
        self.left -= 1
        self._gone.append(chunk)

    def publish(self) -> None:
        """Publish all metrics; errors are logged, and labelling goes on."""
        try:
            self.metrics.publish(self.totals)
            under_way = self._states()
            if under_way is not None:
                waiting = max(0, self.left - sum(under_way.values()))
                self.metrics.queue({"waiting": waiting, **under_way})
        except Exception as error:
            log.warning("metrics could not be published: %s", error)

    def is_idle(self) -> bool:
        """Whether no chunk is under way; False where the coordinator does not answer."""
        states = self._states()
        return states is not None and not sum(states.values())

    def _states(self) -> Mapping[str, int] | None:
        gone = [self._gone.popleft() for _ in range(len(self._gone))]  # others may come meanwhile
        try:
            return self.under_way(gone)
        except RayError:  # the coordinator restarts; the next call has the answer
            self._gone.extend(gone)
            return None


@contextlib.contextmanager
def watch_chunks(metrics: LabelMetrics, under_way: UnderWay, chunks: int) -> Iterator[Watch]:
    """Publish what is added to the watch, every few seconds and once more at the end."""
    watch = Watch(metrics, under_way, chunks)
    try:
        with ticking(EVERY_S, watch.publish):
            yield watch
    finally:
        watch.publish()


def _counter(name: str, tags: dict[str, str]) -> Counter:
    counter = Counter(name, METRICS[name].text, RUN_TAGS + METRICS[name].tags)
    counter.set_default_tags(tags)
    return counter


def _gauge(name: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(name, METRICS[name].text, RUN_TAGS + METRICS[name].tags)
    gauge.set_default_tags(tags)
    return gauge
