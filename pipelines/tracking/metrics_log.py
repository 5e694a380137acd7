"""Metrics of every step on their way to MLflow: a buffer, and a thread that empties it in batches.

``add`` only appends to the buffer, so training never waits for the server. The thread sends what has gathered every few
seconds. While the server does not answer, points stay in the buffer and are sent again later, with growing pauses. A
point has its step and its time from the start, and MLflow keeps one of several that are equal, so that a batch whose
answer was lost may be sent again.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from mlflow.entities import Metric

from pipelines.process.background import Worker
from pipelines.process.retrying import Outage, Retries
from pipelines.tracking.answers import may_pass, status_of
from pipelines.tracking.runs import Run, upload
from pipelines.tracking.server import HASTE_S

log = logging.getLogger(__name__)

BATCH = 1000
"""Most metrics of one request: MLflow's own limit."""

EVERY_S = 3.0
"""Seconds in which points gather for a request."""

RETRIES = Retries(first_wait=6.0, longest_wait=30.0, jitter=3.0)
"""Pauses between two attempts while the server is away."""

OF_ITS_CONTENT = (400, 413)
"""Answers that refuse one request for what is in it; any other refusal meets all that come after it, too."""

MOST_POINTS = 200_000
"""Points that the buffer holds: more than a day of an outage at two steps a second, some 100 MB. Beyond it every second
one is dropped, of those to come as well: the curve stays, only its resolution halves."""

MOST_BYTES = 64 * 2**20
"""Bytes of files that wait; beyond them the oldest are dropped."""


class Point(NamedTuple):
    """The metrics of one step, at one time.

    Attributes:
        step: number of the step (or epoch).
        time: milliseconds since 1970.
        values: name -> value.
    """

    step: int
    time: int
    values: dict[str, float]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """The metrics of one process. A context: on leaving, the buffer is emptied, after an error with less patience.

    Args:
        run: where to log.
        every: seconds in which points gather for a request.
        retries: the pauses between two attempts.
        limit: points that the buffer holds, see ``MOST_POINTS``.
    """

    def __init__(
        self,
        run: Run,
        *,
        every: float = EVERY_S,
        retries: Retries = RETRIES,
        limit: int = MOST_POINTS,
    ) -> None:
        self.run, self.every, self.retries, self.limit = run, every, retries, limit
        self._changed = threading.Condition()  # guards all that follows
        self._points: deque[Point] = deque()
        self._sending: list[Point] = []
        self._seen, self._stride = 0, 1  # points so far; one of how many is kept
        self._files: dict[str, bytes] = {}
        self._refused = False
        self._outage, self._failures = Outage(str(run.server), "metrics are kept and sent later"), 0  # of the thread
        self._dropped: set[str] = set()
        self._worker = Worker(self._turn, name="metrics-log", wait=every)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        patience = self.run.server.patience
        self.close(patience if error is None else min(patience, HASTE_S))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Returns at once and raises nothing, also while the server is away."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append([Point(step, round(1000 * time.time()), values)])

    def add_file(self, name: str, data: bytes) -> None:
        """Log a file, such as a picture, as ``Run.log_file`` does, but without waiting for the server.

        Files are not part of ``pending``: what a killed process had not sent of them is lost.
        """
        with self._changed:
            self._files.pop(name, None)  # the newest of a name, at the end
            self._files[name] = data
            while len(self._files) > 1 and sum(map(len, self._files.values())) > MOST_BYTES:
                dropped = next(iter(self._files))
                del self._files[dropped]
                log.warning("MLflow has been away for long: %s is not logged", dropped)

    def pending(self) -> list[list[Any]]:
        """Points that the server has not taken yet, as plain JSON: ``[step, time, {name: value}]`` each."""
        with self._changed:
            return [list(point) for point in (*self._sending, *self._points)]

    def restore(self, points: Iterable[Sequence[Any]]) -> None:
        """Add the points of another process's ``pending``; MLflow ignores those that it has already."""
        self._append(Point(int(step), int(time), dict(values)) for step, time, values in points)

    def flush(self, seconds: float) -> bool:
        """Send now, and wait for it; whether nothing waits any more within so many seconds."""
        if not self._failures:  # else the pause goes on
            self._worker.wake()
        with self._changed:
            self._changed.wait_for(lambda: self._is_empty() or self._refused, seconds)
            return self._is_empty()

    def close(self, patience: float) -> None:
        """Send what is left, for as long as patience lasts (in seconds); a line says what could not be sent.

        The points that are left can still be had from ``pending``.
        """
        empty = self.flush(patience)
        self._worker.stop(None if empty else 0)  # it may be held up in a request; it is a daemon
        if not empty:
            points, files = len(self.pending()), len(self._files)
            log.warning("%d points and %d files did not reach MLflow within %g s", points, files, patience)

    def _append(self, points: Iterable[Point]) -> None:
        with self._changed:
            for point in points:
                self._seen += 1
                if self._seen % self._stride == 0:
                    self._points.append(point)
            while len(self._points) > self.limit:
                self._points = deque(list(self._points)[1::2])
                self._stride *= 2  # what comes is thinned alike, else what is oldest would be halved again and again
                log.warning("MLflow has been away for long: of unsent points every %d. one is kept", self._stride)

    def _is_empty(self) -> bool:
        return not (self._points or self._sending or self._files)

    def _turn(self) -> float | None:
        """Send what there is. A batch that is on its way when the process ends is in ``pending`` until it arrived."""
        try:
            self._send_all()
        except Exception as error:  # of MLflow, HTTP, SQL
            if may_pass(error):
                self._failures += 1
                self._outage.begin(error)
                return self.retries.pause(self._failures)
            self._give_up(error)
            return None
        self._failures = 0
        self._outage.end()
        return self.every

    def _give_up(self, error: Exception) -> None:
        """Keep the points for the checkpoints, which carry them to a later process: this server would always refuse."""
        log.warning("metrics are not logged any more: %s", self.run.server.explain(error))
        with self._changed:
            self._refused = True
            self._changed.notify_all()

    def _send_all(self) -> None:
        while points := self._take():
            metrics = [
                Metric(name, value, point.time, point.step) for point in points for name, value in point.values.items()
            ]
            for start in range(0, len(metrics), BATCH):
                self._send(metrics[start : start + BATCH])
            self._done()
        while file := self._next_file():
            self._upload(*file)
        self._done()

    def _send(self, metrics: list[Metric]) -> None:
        try:
            self.run.server.client.log_batch(self.run.run_id, metrics)
        except Exception as error:
            if may_pass(error) or status_of(error) not in OF_ITS_CONTENT:
                raise
            names = sorted({metric.key for metric in metrics})
            if len(names) == 1:  # it would be refused for ever, and hold up all that comes after it
                self._drop(f"metric {names[0]}", error)
            else:  # one bad name must not cost the others
                for name in names:
                    self._send([metric for metric in metrics if metric.key == name])

    def _upload(self, name: str, data: bytes) -> None:
        try:
            upload(self.run.server.client, self.run.run_id, name, data)
        except Exception as error:
            if may_pass(error):
                raise
            self._drop(name, error)
        with self._changed:
            if self._files.get(name) is data:
                del self._files[name]

    def _drop(self, what: str, error: Exception) -> None:
        if what not in self._dropped:
            self._dropped.add(what)
            log.warning("%s is not logged: %s", what, self.run.server.explain(error))

    def _take(self) -> list[Point]:
        """The oldest points, for about one request; those of a failed attempt first."""
        with self._changed:
            room = BATCH - sum(len(point.values) for point in self._sending)
            while self._points and room > 0:
                self._sending.append(self._points.popleft())
                room -= len(self._sending[-1].values)
            return self._sending

    def _next_file(self) -> tuple[str, bytes] | None:
        with self._changed:
            return next(iter(self._files.items()), None)

    def _done(self) -> None:
        with self._changed:
            self._sending = []
            if not self._points:
                self._stride = 1
            self._changed.notify_all()
