"""What a run takes while it runs: CPU time of the machine, memory of its processes; and how fast its files appear."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look.

    Attributes:
        at: seconds since the epoch, as the time stamps of files.
        busy: CPU seconds of all processes of the machine since it started.
        memory: bytes of each kind of process; empty unless asked for.
    """

    at: float
    busy: float
    memory: Counter[str]


class Meter(contextlib.AbstractContextManager["Meter"]):
    """Takes samples in a thread while the body runs.

    Args:
        every: seconds between two of them.
        memory: whether to look at the memory of this process and its descendants.
    """

    def __init__(self, *, every: float = 0.2, memory: bool = False) -> None:
        self.every, self.memory = every, memory
        self.samples = [self._sample()]
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.samples.append(self._sample())

    def cpu_seconds(self, since: float, until: float) -> float:
        """CPU seconds of the whole machine between two moments, to the nearest samples."""
        return self.at(until).busy - self.at(since).busy

    def at(self, moment: float) -> Sample:
        """The sample nearest to a moment."""
        return min(self.samples, key=lambda sample: abs(sample.at - moment))

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        return Sample(at=time.time(), busy=busy_seconds(), memory=memory_by_kind() if self.memory else Counter())


@dataclass(frozen=True, kw_only=True)
class Steady:
    """A stretch of a run without its start.

    Attributes:
        since, until: seconds since the epoch.
        images: those that were done in between.
    """

    since: float
    until: float
    images: int

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / (self.until - self.since)


def steady(files: Iterable[Path], images: Callable[[Path], int], *, skip: float = 0.0, cut: float = 0.0) -> Steady:
    """What a run did between the appearance of two of its files: the first and the last one, unless told otherwise.

    Args:
        files: those that the run has written, two or more.
        images: how many of them a file holds.
        skip, cut: share of the files that are left out at the start and at the end.
    """
    written = sorted((path.stat().st_mtime, images(path)) for path in files)
    first, last = int(skip * len(written)), len(written) - 1 - int(cut * len(written))
    return Steady(
        since=written[first][0],
        until=written[last][0],
        images=sum(count for _, count in written[first + 1 : last + 1]),
    )


def busy_seconds() -> float:
    """CPU seconds of all processes of the machine since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def memory_by_kind() -> Counter[str]:
    """Bytes of this process (``driver``) and its descendants: ``actors`` with the model, other ``tasks`` of Ray, its
    ``object store`` and the ``rest`` of it. What processes share counts for the object store alone."""
    found: Counter[str] = Counter()
    driver = psutil.Process()
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            memory, title = process.memory_info(), " ".join(process.cmdline()[:1])
            found["driver" if process.pid == driver.pid else _kind(title)] += memory.rss - memory.shared
            if title.endswith("/raylet"):
                found["object store"] += memory.shared
    return found


def _kind(title: str) -> str:
    if not title.startswith("ray::"):
        return "rest"
    return "actors" if "Segment" in title and "MapWorker" in title else "tasks"


def peak_bytes() -> int:
    """Most memory this process held (Linux). Not ``ru_maxrss``, which starts with what the parent process held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
