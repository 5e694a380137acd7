"""Clocks of the stages of a chunk: seconds on the wall and of CPU, as ``Totals``."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pipelines.labelling.report.totals import Totals

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The moment at which a thread began with something.

    Attributes:
        wall, cpu: seconds, since some moment, on the wall and of the thread's CPU time.
    """

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Start":
        """The present moment, for the calling thread."""
        return cls(wall=time.perf_counter(), cpu=time.thread_time())

    def spent(self, stage: str) -> Totals:
        """Seconds that the same thread has spent since then, as those of ``stage``."""
        wall, cpu = time.perf_counter() - self.wall, time.thread_time() - self.cpu
        return Totals(cpu=Counter({stage: cpu}), wall=Counter({stage: wall}))


class Stopwatch:
    """Seconds of segmenting one chunk and of its parts, from the moment it is made.

    Threads add to it side by side; what is lost when two do so at once only blurs a diagnostic figure.
    """

    def __init__(self) -> None:
        self.start, self.process = Start.now(), time.process_time()
        self.cpu = {"decode": 0.0, "encode": 0.0}
        self.wall = dict(self.cpu)
        self.waited = {"predict": 0.0, "images": 0.0}

    def add(self, part: str, start: Start) -> None:
        """Count a part that the calling thread began at ``start``."""
        self.cpu[part] += time.thread_time() - start.cpu
        self.wall[part] += time.perf_counter() - start.wall

    def waiting(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each of them is there counts as waited for ``what``."""
        start = time.perf_counter()
        for item in items:
            self.waited[what] += time.perf_counter() - start
            yield item
            start = time.perf_counter()
        self.waited[what] += time.perf_counter() - start

    def spent(self) -> Totals:
        """Seconds so far: ``segment`` is the whole, ``decode``, ``predict`` and ``encode`` are its parts.

        The network's CPU time is what the process has spent besides the other two, since nothing measures it.
        """
        segment = time.process_time() - self.process
        predict = max(0.0, segment - sum(self.cpu.values()))
        # Asking for predictions includes waiting for the images that they are made of.
        asked = max(0.0, self.waited["predict"] - self.waited["images"])
        return Totals(
            cpu=Counter({**self.cpu, "segment": segment, "predict": predict}),
            wall=Counter({**self.wall, "segment": time.perf_counter() - self.start.wall, "predict": asked}),
        )
