"""The coordinator counts how often each chunk was tried; the stages of a run ask it from any process.

It lives as long as the run and holds some numbers per chunk and per model actor. Plan and label table decide what is
labelled; the coordinator only bounds how often something is tried, and finds the image that ended a process which
worked on nothing else.

The rules of segmenting, whose attempts end only in success or in the death of a process:

* attempt 1 is the normal one;
* from the second on a chunk has its process to itself, and its images are decoded in a child process first
  (``quarantine``), so that what dies in decoding is known by itself;
* what either of them finds to blame becomes an error row, and is not tried again;
* after ``TOGETHER`` attempts the images are labelled one at a time, each announced before: what ends the process then
  is to blame, and becomes a ``Crashed`` row, or a ``TimedOut`` one where the process says so;
* after ``ALONE`` more attempts in a row that told nothing of any image, or ``ALL_ALONE`` in all, those that have not
  been labelled alone yet become ``Crashed`` rows untried.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pspnet_core.errors import ImageError, PspnetError

ATTEMPTS = 6
"""Attempts at reading or writing a chunk, and at loading the model; nodes that come and go may well cost several."""

EXPLAIN_S = 30.0
"""Seconds that a process which is about to end waits for its reason to be known."""

TOGETHER = 3
"""Attempts at segmenting a chunk's images together."""

ALONE = 8
"""Attempts in a row at segmenting them one at a time of which none tells anything of an image."""

ALL_ALONE = 64
"""Attempts at segmenting them one at a time in all, each of which may find an image to blame."""


class LoadingFailed(PspnetError):
    """Loading the model ends its process, again and again."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at segmenting a chunk.

    Attributes:
        number: from 1; every earlier one took its process along, or the node under it.
        is_alone: whether images are labelled one at a time.
        gives_up: whether images that are neither good nor to blame are not tried any more.
        good: indices of the images that were labelled alone, as long as they are still tried.
        to_blame: what is to be said of the images that ended a process, by their indices.
        reason: why the last attempt failed, where its process could say so.
    """

    number: int
    is_alone: bool
    gives_up: bool
    good: frozenset[int]
    to_blame: Mapping[int, ImageError]
    reason: str = ""


@dataclass(kw_only=True)
class _Case:
    """What is known of a chunk that is being segmented.

    Attributes:
        attempts: so far, the one under way included.
        announced: the image that its process works on alone.
        good, to_blame: as of ``Attempt``.
        reason: why the process of this attempt is about to end.
        known: images that were good or to blame when the last attempt began.
        in_vain: attempts one at a time in a row that told nothing of any image.
    """

    attempts: int = 0
    announced: int | None = None
    good: set[int] = field(default_factory=set)
    to_blame: dict[int, ImageError] = field(default_factory=dict)
    reason: ImageError | None = None
    known: int = 0
    in_vain: int = 0

    def count_in_vain(self, *, is_alone: bool) -> None:
        """Count an attempt that labels images one at a time, from the last one that told something."""
        known = len(self.good) + len(self.to_blame)
        if is_alone:
            self.in_vain = self.in_vain + 1 if known == self.known else 1
        self.known = known


class ChunkStates:
    """What the coordinator holds, by number of chunk; its methods are called one after another."""

    together, alone, all_alone = TOGETHER, ALONE, ALL_ALONE

    def __init__(self) -> None:
        self.open = True
        self.starts: Counter[str] = Counter()
        self.renew()

    def renew(self) -> None:
        """Forget all chunks: from now on their numbers stand for others."""
        self.reads: Counter[int] = Counter()
        self.cases: defaultdict[int, _Case] = defaultdict(_Case)  # of chunks that are being segmented
        self.writes: Counter[int] = Counter()
        self.stages: dict[int, str] = {}

    def start(self, actor: str) -> int:
        """An actor is about to load its model; returns which attempt in a row this is, from 1."""
        self.starts[actor] += 1
        return self.starts[actor]

    def started(self, actor: str) -> None:
        """An actor has loaded its model."""
        self.starts.pop(actor, None)

    def admit(self, chunk: int) -> int:
        """A chunk is about to be read; returns which attempt this is, from 1, or 0 where no chunk may begin."""
        if not self.open:
            return 0
        self.stages[chunk] = "read"
        self.reads[chunk] += 1
        return self.reads[chunk]

    def ended(self, chunk: int) -> int:
        """Attempts at segmenting a chunk so far."""
        return self.cases[chunk].attempts if chunk in self.cases else 0

    def begin(self, chunk: int) -> Attempt:
        """A chunk is about to be segmented. An image that was announced ended the process of the last attempt."""
        self.reads.pop(chunk, None)
        self.stages[chunk] = "segment"
        case = self.cases[chunk]
        reason, case.reason = case.reason, None
        if case.announced is not None:
            case.to_blame[case.announced] = reason or ImageError("Crashed", "labelling it alone ends the process")
            case.announced = None
        case.attempts += 1
        is_alone = case.attempts > self.together
        case.count_in_vain(is_alone=is_alone)
        too_many = max(case.in_vain - self.alone, case.attempts - self.together - self.all_alone)
        return Attempt(
            number=case.attempts,
            is_alone=is_alone,
            gives_up=too_many > 0,
            good=frozenset(case.good if too_many <= 1 else ()),
            to_blame=dict(case.to_blame),
            reason=reason.message if reason else "",
        )

    def blame(self, chunk: int, image: int, error: ImageError) -> None:
        """An image is known to end processes, or to take too long; the error is its row's."""
        self.cases[chunk].to_blame[image] = error

    def explain(self, chunk: int, reason: ImageError) -> None:
        """Keep why the process of this attempt is about to end."""
        self.cases[chunk].reason = reason

    def announce(self, chunk: int, image: int | None) -> None:
        """Note that the chunk's process now works on this image alone, or on none, and has survived the last one."""
        case = self.cases.get(chunk)
        if case is None or not case.attempts:  # it began before this object was made, and is not known
            return
        if case.announced is not None:
            case.good.add(case.announced)
        case.announced = image

    def done(self, chunk: int) -> None:
        """A chunk has been segmented: its attempts are forgotten."""
        self.cases.pop(chunk, None)
        if chunk in self.stages:  # else the driver has it already
            self.stages[chunk] = "write"

    def write(self, chunk: int) -> int:
        """A chunk is about to be written; returns which attempt this is, from 1."""
        self.writes[chunk] += 1
        return self.writes[chunk]

    def written(self, chunk: int) -> None:
        """A chunk has been written."""
        self.writes.pop(chunk, None)

    def under_way(self, gone: Sequence[int]) -> dict[str, int]:
        """How many chunks are in each stage, or before it: ``read``, ``segment``, ``write``.

        Args:
            gone: chunks that the driver has seen the end of, which are forgotten.
        """
        for chunk in gone:
            self.stages.pop(chunk, None)
        return dict(Counter(self.stages.values()))

    def close(self) -> None:
        """Let no more chunks begin; those under way are finished."""
        self.open = False


class Line(Protocol):
    """The way from a process to the ``ChunkStates`` of its run: calls a method of it by name."""

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Call it, and wait for the answer; where it may never come, for so many seconds."""

    def tell(self, method: str, *arguments: Any) -> None:
        """Call it without waiting."""

    def own_id(self) -> str:
        """What the calling process is called, also when it is started again."""


@dataclass(frozen=True)
class Coordinator:
    """The face of ``ChunkStates`` to the stages; cheap to send to any process."""

    line: Line

    def start(self) -> int:
        """As ``ChunkStates.start``, for the calling actor."""
        return int(self.line.ask("start", self.line.own_id()))

    def started(self) -> None:
        """As ``ChunkStates.started``. Does not wait."""
        self.line.tell("started", self.line.own_id())

    def admit(self, chunk: int) -> int:
        """As ``ChunkStates.admit``."""
        return int(self.line.ask("admit", chunk))

    def has_failed(self, chunk: int) -> bool:
        """Whether segmenting the chunk has ended a process."""
        return bool(self.line.ask("ended", chunk))

    def begin(self, chunk: int) -> Attempt:
        """As ``ChunkStates.begin``."""
        attempt: Attempt = self.line.ask("begin", chunk)
        return attempt

    def announce(self, chunk: int, image: int | None) -> None:
        """As ``ChunkStates.announce``; waits, so that it is known before the image is tried."""
        self.line.ask("announce", chunk, image)

    def blame(self, chunk: int, image: int, error: ImageError) -> None:
        """As ``ChunkStates.blame``. Does not wait."""
        self.line.tell("blame", chunk, image, error)

    def explain(self, chunk: int, reason: ImageError) -> None:
        """As ``ChunkStates.explain``; waits a little, so that it is known before the process ends."""
        self.line.ask("explain", chunk, reason, timeout=EXPLAIN_S)

    def done(self, chunk: int) -> None:
        """As ``ChunkStates.done``. Does not wait."""
        self.line.tell("done", chunk)

    @contextmanager
    def writing(self, chunk: int) -> Iterator[int]:
        """While a chunk is written; yields which attempt this is, from 1."""
        yield int(self.line.ask("write", chunk))
        self.line.tell("written", chunk)


@dataclass(frozen=True)
class DirectLine:
    """The way to ``ChunkStates`` in the calling process."""

    states: ChunkStates

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Call it."""
        return getattr(self.states, method)(*arguments)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call it."""
        self.ask(method, *arguments)

    def own_id(self) -> str:
        """There is one process only."""
        return "process"
