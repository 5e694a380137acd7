"""Which chunks of a run are under way: one small actor that all stages of the run ask.

It lives as long as the run and holds some numbers per chunk and one per model actor. What is labelled the plan and the
label table decide; what it knows only bounds how often something is tried, and tells which image it was that ended a
process which had nothing else in hand.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from pspnet_core.errors import PspnetError

ATTEMPTS = 6
"""Attempts at one chunk in each stage, and at loading the model; nodes that come and go may well cost several."""

DEATHS = 2
"""Deaths of a process alone with an image after which the image is to blame: one may have had another reason."""

ANSWER_S = 5.0
"""Seconds that ``under_way`` waits: what it tells is for watching only."""


class ChunkFailed(PspnetError):
    """A chunk, or the model that it is for, ends the process that works on it, again and again."""


class _State:
    """What the actor holds; its calls come one after another."""

    def __init__(self) -> None:
        self.open = True
        self.reads: Counter[int] = Counter()
        self.attempts: Counter[int] = Counter()
        self.writes: Counter[int] = Counter()
        self.alone: dict[int, int] = {}
        self.deaths: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self.stages: dict[int, str] = {}
        self.starts: Counter[str] = Counter()

    def start(self, actor: str) -> int:
        self.starts[actor] += 1
        return self.starts[actor]

    def started(self, actor: str) -> None:
        self.starts.pop(actor, None)

    def renew(self) -> None:
        self.reads.clear()
        self.attempts.clear()
        self.writes.clear()
        self.alone.clear()
        self.deaths.clear()
        self.stages.clear()

    def admit(self, chunk: int) -> int:
        if not self.open:
            return 0
        self.stages[chunk] = "read"
        self.reads[chunk] += 1
        return self.reads[chunk]

    def begin(self, chunk: int) -> int:
        self.reads.pop(chunk, None)
        if chunk in self.alone:  # it was one image's attempt, each of which may have ``DEATHS``
            self.deaths[chunk][self.alone.pop(chunk)] += 1
            self.attempts[chunk] -= 1
        self.attempts[chunk] += 1
        self.stages[chunk] = "segment"
        return self.attempts[chunk]

    def withdraw(self, chunk: int) -> None:
        self.attempts[chunk] -= 1

    def announce(self, chunk: int, image: int | None) -> None:
        self.alone.pop(chunk, None)
        if image is not None and chunk in self.attempts:  # else it has begun before this actor, and does not count
            self.alone[chunk] = image

    def deadly(self, chunk: int) -> list[int]:
        return [image for image, deaths in self.deaths[chunk].items() if deaths >= DEATHS]

    def done(self, chunk: int) -> None:
        for known in (self.attempts, self.alone, self.deaths):
            known.pop(chunk, None)
        if chunk in self.stages:  # else the driver has it already
            self.stages[chunk] = "write"

    def write(self, chunk: int) -> int:
        self.writes[chunk] += 1
        return self.writes[chunk]

    def written(self, chunk: int) -> None:
        self.writes.pop(chunk, None)

    def under_way(self, gone: Sequence[int]) -> dict[str, int]:
        for chunk in gone:
            self.stages.pop(chunk, None)
        return dict(Counter(self.stages.values()))

    def close(self) -> None:
        self.open = False


@dataclass(frozen=True)
class Coordinator:
    """The way to the actor; cheap to send to any process."""

    actor: Any

    def renew(self) -> None:
        """Forget all chunks: from now on their numbers stand for others."""
        ray.get(self.actor.renew.remote())

    def start(self) -> int:
        """The calling actor is about to load its model; returns which attempt in a row this is, from 1."""
        return int(ray.get(self.actor.start.remote(_own_id())))

    def started(self) -> None:
        """The calling actor has loaded its model. Does not wait."""
        self.actor.started.remote(_own_id())

    def admits(self, chunk: int) -> bool:
        """Whether chunks may still be begun; if so, this one is under way from now on, and about to be read.

        Raises:
            ChunkFailed: reading it has ended its process too often.
        """
        attempt = int(ray.get(self.actor.admit.remote(chunk)))
        if attempt > ATTEMPTS:
            raise ChunkFailed(
                f"chunk {chunk} ended the process that reads its images {ATTEMPTS} times: look for the reason in the "
                "workers' logs (too little memory? a smaller --chunk helps the next plan)"
            )
        return attempt > 0

    def begin(self, chunk: int) -> int:
        """A chunk is about to be segmented; returns which attempt this is, from 1.

        Every attempt but the last one took its process along, or the node under it. Those that ended while an image was
        announced do not count: of these an image has two at most.

        Raises:
            ChunkFailed: too many attempts have ended so.
        """
        attempt = int(ray.get(self.actor.begin.remote(chunk)))
        if attempt > ATTEMPTS:
            raise ChunkFailed(
                f"chunk {chunk} ended the process that segments it {ATTEMPTS} times, and none of its images is to "
                "blame: look for the reason in the workers' logs (too little memory? fewer --workers leave more for "
                "each)"
            )
        return attempt

    def withdraw(self, chunk: int) -> None:
        """What ``begin`` announced does not take place yet, and is no attempt."""
        ray.get(self.actor.withdraw.remote(chunk))

    def announce(self, chunk: int, image: int | None) -> None:
        """From now on the process has nothing but this image of the chunk in hand, by its index; None: no longer so."""
        ray.get(self.actor.announce.remote(chunk, image))

    def deadly(self, chunk: int) -> frozenset[int]:
        """Indices of the chunk's images with which alone ``DEATHS`` processes have ended."""
        return frozenset(ray.get(self.actor.deadly.remote(chunk)))

    def done(self, chunk: int) -> None:
        """A chunk has been segmented: its attempts are forgotten. Does not wait."""
        self.actor.done.remote(chunk)

    @contextmanager
    def writing(self, chunk: int) -> Iterator[None]:
        """While a chunk is written.

        Raises:
            ChunkFailed: writing it has ended its process too often.
        """
        if int(ray.get(self.actor.write.remote(chunk))) > ATTEMPTS:
            raise ChunkFailed(
                f"chunk {chunk} ended the process that writes it {ATTEMPTS} times: look for the reason in the "
                "workers' logs (too little memory? a smaller --chunk helps the next plan)"
            )
        yield
        self.actor.written.remote(chunk)

    def under_way(self, gone: Sequence[int]) -> dict[str, int]:
        """How many chunks are in each stage, or before it: ``read``, ``segment``, ``write``.

        Args:
            gone: chunks that the driver has seen the end of, which are forgotten.

        Raises:
            RayError: the actor does not answer within some seconds.
        """
        found: dict[str, int] = ray.get(self.actor.under_way.remote(gone), timeout=ANSWER_S)
        return found

    def close(self) -> None:
        """Let no more chunks begin; those under way are finished. Does not wait."""
        self.actor.close.remote()


def _own_id() -> str:
    """The calling actor's, which it keeps when Ray starts it again."""
    return str(ray.get_runtime_context().get_actor_id())


@contextmanager
def coordinated() -> Iterator[Coordinator]:
    """A coordinator for one run, on the node of the driver."""
    # On a node that may vanish it would take every count along.
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    # One that dies comes back with its memory blank, and answers what it was asked.
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(_State).options(num_cpus=0, scheduling_strategy=here, **lasting).remote()
    try:
        yield Coordinator(actor)
    finally:
        ray.kill(actor)
