"""Progress of a long run, on standard error: a bar on a terminal, elsewhere a JSON line now and then.

The line is for programs and for readers of a log::

    {"progress": "labelling", "time": "2026-11-23T02:30:00Z", "images": 51200, "of": 1000000, "errors": 3,
     "chunks": 200, "images_per_second": 853.1, "eta_seconds": 1112, "ended": false}
"""

import collections
import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from pipelines.process.background import ticking

EVERY_S = 30.0
"""Seconds between two lines, whether or not anything was done."""

RECENT = 10
"""The last lines that rate and time left are estimated from, so that loading a model at the start drops out."""


class Mark(NamedTuple):
    """How many images were done at which second of the clock."""

    time: float
    done: int


class Progress(contextlib.ExitStack):
    """Counts images towards a total. A context; its last line comes on leaving, after an error too.

    Args:
        total: images in all; None while it is not known.
        what: what is being done, such as ``labelling``.
        stream: where to show it; standard error by default.
        every: seconds between two lines.
        clock: monotonic seconds; tests give their own.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        *,
        stream: TextIO | None = None,
        every: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()  # of the bar, or of the thread that writes lines
        self.stream = stream or sys.stderr
        self.total, self.what, self.clock = total, what, clock
        self.done = self.errors = self.chunks = 0
        self.marks = collections.deque([Mark(clock(), 0)], maxlen=RECENT)
        self.start = self.marks[0]
        self.bar: Any = None
        if self.stream.isatty():
            self.bar = tqdm(total=total, desc=what, unit="image", dynamic_ncols=True, file=self.stream)
            self.callback(self.bar.close)
        else:
            self.callback(self._write, ended=True)
            self.enter_context(ticking(every, self._tick))

    def advance(self, images: int, *, errors: int = 0) -> None:
        """Count one more chunk: its images, and how many of them are errors."""
        self.done += images
        self.errors += errors
        self.chunks += 1
        if self.bar is not None:
            if errors:
                self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(images)

    def state(self, *, ended: bool) -> dict[str, Any]:
        """What a line holds: the rate and the seconds left follow from the last lines, at the end from the whole run.

        ``eta_seconds`` is None as long as nothing moves, or the total is not known.
        """
        since, now = self.start if ended else self.marks[0], self.clock()
        rate = (self.done - since.done) / max(1e-9, now - since.time)
        left = None if self.total is None else max(0, self.total - self.done)
        return {
            "progress": self.what,
            "time": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            "images": self.done,
            "of": self.total,
            "errors": self.errors,
            "chunks": self.chunks,
            "images_per_second": round(rate, 2),
            "eta_seconds": 0 if left == 0 else round(left / rate) if left and rate else None,
            "ended": ended,
        }

    def _tick(self) -> None:
        self._write(ended=False)
        self.marks.append(Mark(self.clock(), self.done))

    def _write(self, *, ended: bool) -> None:
        with contextlib.suppress(OSError):  # the reader has gone; the work goes on
            print(json.dumps(self.state(ended=ended)), file=self.stream, flush=True)
