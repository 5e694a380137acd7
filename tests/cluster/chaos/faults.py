"""What goes wrong in a round. A fault is one generator and one row of ``FAULTS``.

It prepares what it needs, yields, and then, with the job running, does its deed. The requests by which the job's
progress is told, and from which a deed starts, are drawn by the round's random numbers.
"""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.cluster.chaos.arena import BUCKET, KILLERS, NODE, Arena, Job, owner_of, picture, until
from tests.cluster.chaos.checks import check, check_newer
from tests.support import faultproxy
from tests.support.faultproxy import Request, Rule

READING: dict[str, Any] = {"method": "GET", "path": rf"/{BUCKET}/in/.*\.jpg"}
WRITING: dict[str, Any] = {"method": "PUT", "path": r"/masks/model=.*\.parquet"}
RECORDING: dict[str, Any] = {"method": "PUT", "path": r"/(class_stats|runs)/", "most": 2}
STORM = 0.1
"""Share of the requests that fail in a storm; that one of them fails as often as it is tried is unlikely."""

AWAY_S = 30.0
"""Seconds for which nobody reaches an output that comes back in time."""


class Round:
    """One run of the plan, or several of them at once or one after another, with what disturbs it.

    Attributes:
        random: draws when things happen.
        soon: what happens, happens at one of so many requests.
        flags: of the jobs that are started next, besides those that all have.
        jobs: all that were started.
        outcome: error kinds of images that end otherwise than undisturbed, by key.
        overwritten: the planned content of images that have another one now, by key.
        storms: rules of which each must have met a request.
    """

    def __init__(self, arena: Arena, seed: int, *, soon: int = 6) -> None:
        self.arena, self.random, self.soon = arena, random.Random(seed), soon
        self.output = arena.planned_output()
        self.flags: dict[str, Any] = {}
        self.jobs: list[Job] = []
        self.outcome: dict[str, str] = {}
        self.overwritten: dict[str, bytes] = {}
        self.storms: list[Rule] = []

    @property
    def driver(self) -> Job:
        """The job that was started last."""
        return self.jobs[-1]

    def start(self) -> Job:
        """Start the command, once more."""
        self.jobs.append(self.arena.start(self.output, **self.flags))
        return self.driver

    def holding(self, *, method: str, path: str, most: int | None = None) -> Rule:
        """Let one of the first such requests hang, until the rule lets go; ``most`` where there are but few of them."""
        first = self.random.randint(1, min(self.soon, most or self.soon))
        return self.arena.proxy.add(Rule(faultproxy.hang, method=method, path=path, first=first, times=1))

    def held(self, rule: Rule) -> Request:
        """The request that hangs, as soon as it does."""
        until(lambda: bool(rule.hits), self.driver)
        return rule.hits[0]

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the arena's workers by their title, once there are any: Ray gives them one when they begin."""
        until(lambda: bool(self.arena.processes(title)), self.driver)
        return self.arena.processes(title)

    def play(self, faults: Sequence[Fault]) -> None:
        """Start a job, disturb it, wait for its end and check what it has left behind."""
        deeds = [fault(self) for fault in faults]
        try:
            for deed in deeds:
                next(deed)
            self.start()
            for deed in deeds:
                next(deed, None)
            self._finish()
        finally:
            for deed in deeds:
                deed.close()
            self.arena.proxy.clear()
            for job in self.jobs:
                job.process.kill()
                job.process.wait()
            for key, content in self.overwritten.items():
                self.arena.overwrite(key, content)

    def _finish(self) -> None:
        if self.storms and self.driver.code() == 1 and "no good answer" in self.driver.tail():
            self.driver.expected = 1  # one request met the storm each time: its right, and the same command goes on
            self.arena.proxy.clear()
            self.start()
        for job in self.jobs:
            job.end()
        assert all(rule.hits for rule in self.storms), "no request met the storm"
        self.arena.proxy.clear()
        check(self.arena, self.output, self.outcome, self.driver)
        if self.overwritten:
            self.start().end()
            check_newer(self.arena, self.output, self.overwritten)


Deed = Generator[None, None, None]
Fault = Callable[[Round], Deed]


def _reader_killed(round: Round) -> Deed:
    """The process of a read task, which waits for an image."""
    rule = round.holding(**READING)
    yield
    owner_of(round.held(rule).port).kill()
    rule.release()


def _writer_killed(round: Round) -> Deed:
    """The process of a write task; its request arrives all the same, late."""
    rule = round.holding(**WRITING)
    yield
    owner_of(round.held(rule).port).kill()
    rule.release()


def _actor_killed(round: Round) -> Deed:
    """The process of a GPU actor, whatever it is doing."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    round.random.choice(round.processes("Segment")).kill()
    rule.release()


def _actor_killed_in_a_chunk(round: Round) -> Deed:
    """The process of a GPU actor, while it decodes an image."""
    rule = round.holding(**READING)
    yield
    round.held(rule)
    with round.arena.switched_on("once"):
        rule.release()
        until(lambda: not (round.arena.folder / "once").exists(), round.driver)


def _node_killed(round: Round) -> Deed:
    """A whole node, in whose place another one comes."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    cluster = round.arena.cluster
    nodes = sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id))
    cluster.remove_node(round.random.choice(nodes), allow_graceful=False)
    cluster.add_node(**NODE)
    rule.release()


def _coordinator_killed(round: Round) -> Deed:
    """The actor that counts attempts."""
    rule = round.holding(**READING)
    yield
    round.held(rule)
    for process in round.processes("ChunkStates"):
        process.kill()
    rule.release()


def _driver_killed(round: Round) -> Deed:
    """The driver; the same command again."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    round.driver.signal(signal.SIGKILL, expected=-signal.SIGKILL)
    round.driver.end()
    rule.release()
    round.start()


def _driver_terminated(round: Round) -> Deed:
    """SIGTERM to the driver, which ends in good order; the same command again."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    round.driver.signal(signal.SIGTERM, expected=128 + signal.SIGTERM)
    rule.release()
    round.driver.end()
    round.start()


def _second_driver(round: Round, wait: bool) -> Deed:
    """The same command twice at once."""
    round.flags = {"wait": wait}
    yield
    round.start()


def _driver_frozen(round: Round, wait: bool) -> Deed:
    """A driver that stands still while another one finishes its plan, and then wakes."""
    round.flags = {"wait": wait}
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    frozen = round.driver
    frozen.signal(signal.SIGSTOP)
    rule.release()
    round.start().end()
    frozen.signal(signal.SIGCONT)


def _overwritten(round: Round) -> Deed:
    """An image that gets another content after it was listed, just before it is read."""
    rule = round.holding(**READING)
    yield
    key = round.held(rule).path.partition("?")[0].removeprefix(f"/{BUCKET}/in/")
    round.overwritten[key] = round.arena.input.read(key)
    round.arena.overwrite(key, picture(1000))
    round.outcome[key] = "Changed"
    rule.release()


def _killers(round: Round, how: str = "killers") -> Deed:
    """Images that kill the process that decodes them, or never let it go on."""
    round.outcome |= dict.fromkeys(KILLERS, "TimedOut" if how == "endless" else "Crashed")
    with round.arena.switched_on(how):
        yield
        yield  # they are at it until the round is over


def _storm(round: Round, fault: faultproxy.Fault, method: str = "") -> Deed:
    """Requests of all kinds that fail now and then."""
    rule = Rule(fault, method=method, first=round.random.randint(1, 10), share=STORM, seed=round.random.getrandbits(32))
    round.storms.append(round.arena.proxy.add(rule))
    yield


def _hung(round: Round) -> Deed:
    """A request without an answer, until its sender gives up and repeats it; then it arrives all the same."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    round.driver.code()


def _outage(round: Round) -> Deed:
    """Storage that nobody reaches, for longer than anybody waits; the same command once it is back."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    with round.arena.proxy.unreachable():
        round.driver.expected = 1
        round.driver.end()
    assert "no good answer" in round.driver.tail()
    round.start()


def _output_away(round: Round) -> Deed:
    """An output that nobody reaches for half a minute, while all else is at hand; the run outlasts it."""
    rule = round.holding(**round.random.choice([READING, WRITING]))
    yield
    round.held(rule)
    output = re.escape(round.output.root.rpartition("/")[2])
    away = round.arena.proxy.add(Rule(faultproxy.reset, path=f"[/=]{output}/", seconds=AWAY_S))
    rule.release()
    round.driver.end()
    assert away.hits


def _all_too_large(round: Round) -> None:
    """A table in which all images are errors, and jobs that try them again from now on."""
    round.flags = {"max_pixels": 1}
    round.start().end()
    round.flags = {"retry-errors": "TooLarge"}


def _retry_killed(round: Round) -> Deed:
    """The driver of a retry; the same retry twice at once; then the command without it, which finds nothing to do."""
    _all_too_large(round)
    # What is no image even so tells how often it was tried.
    bad = {key: error.partition(":")[0] for key, error in round.arena.poisoned.items() if error}
    round.outcome |= bad
    rule = round.holding(**round.random.choice([READING, WRITING, RECORDING]))
    yield
    round.held(rule)
    round.driver.signal(signal.SIGKILL, expected=-signal.SIGKILL)
    round.driver.end()
    rule.release()
    round.flags |= {"wait": False}
    for job in (round.start(), round.start()):
        job.end()
    round.flags = {}
    round.start()


FAULTS: dict[str, Fault] = {
    "reader-killed": _reader_killed,
    "writer-killed": _writer_killed,
    "actor-killed": _actor_killed,
    "actor-killed-in-a-chunk": _actor_killed_in_a_chunk,
    "node-killed": _node_killed,
    "coordinator-killed": _coordinator_killed,
    "driver-killed": _driver_killed,
    "driver-terminated": _driver_terminated,
    "driver-frozen": partial(_driver_frozen, wait=False),
    "driver-frozen-past-its-lease": partial(_driver_frozen, wait=True),
    "second-driver": partial(_second_driver, wait=False),
    "second-driver-waits": partial(_second_driver, wait=True),
    "overwritten": _overwritten,
    "killers": _killers,
    "endless": partial(_killers, how="endless"),
    "resets": partial(_storm, fault=faultproxy.reset),
    "slow-downs": partial(_storm, fault=faultproxy.slow_down),
    "truncations": partial(_storm, fault=faultproxy.truncate, method="GET"),
    "lost-answers": partial(_storm, fault=faultproxy.lose_answer),
    "hung": _hung,
    "outage": _outage,
    "output-away": _output_away,
    "retry-killed": _retry_killed,
}
