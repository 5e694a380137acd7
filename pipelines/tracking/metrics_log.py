"""Metrics of every step on their way to MLflow: a buffer, and a thread that empties it in batches.

``add`` only appends to the buffer, so training never waits for the server. The thread sends what has gathered every few
seconds. While the server does not answer, points stay in the buffer and are sent again later, with growing pauses; a
line says when that begins and when it is over. A point has its step and its time from the start, and MLflow keeps one
of several that are equal, so that a batch whose answer was lost may be sent again.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from mlflow.entities import Metric
from mlflow.utils.time import get_current_time_millis

from pipelines.tracking.runs import Run
from pipelines.tracking.server import HASTE_S, first_line, refused

log = logging.getLogger(__name__)

BATCH = 1000
"""Most metrics of one request: MLflow's own limit."""

EVERY_S = 3.0
"""Seconds in which points gather for a request."""

LONGEST_PAUSE_S = 30.0
"""Longest pause between two attempts while the server is away."""

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


class MetricsLog:
    """The metrics of one process. A context: on leaving, the buffer is emptied, after an error with less patience.

    Args:
        run: where to log.
        every: seconds in which points gather for a request.
        longest_pause: seconds of the longest pause between two attempts.
        limit: points that the buffer holds, see ``MOST_POINTS``.
        patience: seconds that leaving waits for a server that does not answer; the run's own by default.
    """

    def __init__(
        self,
        run: Run,
        *,
        every: float = EVERY_S,
        longest_pause: float = LONGEST_PAUSE_S,
        limit: int = MOST_POINTS,
        patience: float | None = None,
    ) -> None:
        self.run, self.every, self.longest_pause, self.limit = run, every, longest_pause, limit
        self.patience = run.patience if patience is None else patience
        self._changed = threading.Condition()  # guards all that follows
        self._points: deque[Point] = deque()
        self._sending: list[Point] = []
        self._seen, self._stride = 0, 1  # points so far; one of how many is kept
        self._files: dict[str, bytes] = {}
        self._hurry = self._closed = False
        self._away_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="metrics-log", daemon=True)
        self._thread.start()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(self.patience if error is None else min(self.patience, HASTE_S))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Returns at once and raises nothing, whatever the server does."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append([Point(step, get_current_time_millis(), values)])

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
        """Take up what ``pending`` gave in another process; points that were sent meanwhile do no harm."""
        self._append(Point(int(step), int(time), dict(values)) for step, time, values in points)

    def flush(self, seconds: float) -> bool:
        """Send now, and wait for it; whether everything was sent (or refused) within so many seconds."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(self._is_empty, seconds)

    def close(self, patience: float | None = None) -> None:
        """Send what is left, for as long as patience lasts (in seconds); a line says what could not be sent.

        The points that are left can still be had from ``pending``.
        """
        seconds = self.patience if patience is None else patience
        empty = self.flush(seconds)
        if not empty:
            points, files = len(self.pending()), len(self._files)
            log.warning("MLflow did not answer for %g s: %d points and %d files unsent", seconds, points, files)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if empty:  # else it may be held up in a request; it is a daemon, and ends with the process
            self._thread.join()

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

    def _work(self) -> None:
        """Send until closed. A batch that is on its way when the process ends is in ``pending`` until it arrived."""
        failures = 0
        while self._pause(failures):
            try:
                self._send_all()
            except Exception as error:  # of whatever kind: MLflow, HTTP, SQL
                failures += 1
                self._tell_away(error)
            else:
                failures = 0
                self._tell_back()

    def _pause(self, failures: int) -> bool:
        """Wait until it is time to send; whether there is anything left to do."""
        with self._changed:
            if failures:
                growing = min(self.longest_pause, self.every * 2.0 ** min(failures, 16))
                # Not all processes at once.
                self._changed.wait_for(lambda: self._closed, random.uniform(0.5, 1.0) * growing)
            else:
                self._changed.wait_for(lambda: self._closed or self._hurry, self.every)
                self._hurry = False
            return not self._closed

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
            self.run.client.log_batch(self.run.run_id, metrics)
        except Exception as error:
            if not refused(error):
                raise
            names = sorted({metric.key for metric in metrics})
            if len(names) == 1:
                # It would be refused for ever, and hold up all that comes after it.
                log.warning("MLflow refuses metric %s (%s)", names[0], first_line(error))
            else:  # one bad name must not cost the others
                for name in names:
                    self._send([metric for metric in metrics if metric.key == name])

    def _upload(self, name: str, data: bytes) -> None:
        try:
            self.run.upload(name, data)
        except Exception as error:
            if not refused(error):
                raise
            log.warning("MLflow refuses %s (%s)", name, first_line(error))
        with self._changed:
            if self._files.get(name) is data:
                del self._files[name]

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

    def _tell_away(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("MLflow does not answer (%s); metrics are kept and sent later", first_line(error))

    def _tell_back(self) -> None:
        if self._away_since is not None:
            log.warning("MLflow answers again after %.0f s", time.monotonic() - self._away_since)
            self._away_since = None
