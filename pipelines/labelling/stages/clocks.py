"""Seconds that the stages of a chunk take: on the wall and of CPU."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Start:
    """When a thread began with something.

    Attributes:
        wall, cpu: seconds, since some moment, on the wall and of the thread's CPU time.
    """

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Start":
        """This moment, for the thread that asks."""
        return cls(wall=time.perf_counter(), cpu=time.thread_time())

    def spent(self, stage: str) -> dict[str, float]:
        """Counters of what the same thread has spent since then: ``wall_<stage>`` and ``cpu_<stage>``."""
        return {
            f"wall_{stage}": time.perf_counter() - self.wall,
            f"cpu_{stage}": time.thread_time() - self.cpu,
        }


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
        """A thread has finished with a part that it began at ``start``."""
        self.cpu[part] += time.thread_time() - start.cpu
        self.wall[part] += time.perf_counter() - start.wall

    def waiting(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; what it takes until each of them is there counts as waited for ``what``."""
        start = time.perf_counter()
        for item in items:
            self.waited[what] += time.perf_counter() - start
            yield item
            start = time.perf_counter()
        self.waited[what] += time.perf_counter() - start

    def spent(self) -> dict[str, float]:
        """Counters ``cpu_...`` and ``wall_...``: ``segment`` is the whole, ``decode``, ``predict``, ``encode`` parts.

        Nothing tells the network's CPU time: it is what the process has spent besides the other two.
        """
        segment = time.process_time() - self.process
        predict = max(0.0, segment - sum(self.cpu.values()))
        # Asking for predictions includes waiting for the images that they are made of.
        asked = max(0.0, self.waited["predict"] - self.waited["images"])
        cpu = self.cpu | {"segment": segment, "predict": predict}
        wall = self.wall | {"segment": time.perf_counter() - self.start.wall, "predict": asked}
        return {f"cpu_{part}": seconds for part, seconds in cpu.items()} | {
            f"wall_{part}": seconds for part, seconds in wall.items()
        }
