"""Carries chunks through the stages on this machine, without Ray, for a handful of images: no ten seconds of start-up.

The stages run in a child process, which a fatal image may take along; it is started again then, under the rules of
``coordinator``, whose state is here. Over a pipe the child asks it, tells it, and reports each chunk that is done.
"""

import contextlib
import functools
import logging
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import cloudpickle

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.coordinator import ATTEMPTS, ChunkStates, Coordinator, DirectLine
from pipelines.labelling.stages.predictor import ModelToLoad, Predictor
from pipelines.labelling.stages.segment import CALLS, Segment
from pipelines.labelling.stages.walk import Walk
from pipelines.process.environment import child_environment
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import PspnetError
from pspnet_core.threads import map_ahead

AHEAD = 1
"""Chunks that are read or written while ``CALLS`` others are with the model."""

_PROGRAM = "import sys; from pipelines.labelling.in_process import main; main(int(sys.argv[1]))"


class ChildFailed(PspnetError):
    """The child process cannot be started, which is no image's fault."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the child is to do."""

    walk: Walk
    make_predictor: Callable[[], Predictor]
    chunks: tuple[int, ...]


class InProcessExecutor:
    """Executes in a child process, on CPUs."""

    def __init__(self, model: ModelToLoad) -> None:
        load = functools.partial(_identical, model.checkpoint)
        self.make_predictor = model.maker(load, LocalResources.of_machine)
        self.states = ChunkStates()

    def start(self) -> Coordinator:
        """As ``Executor.start``."""
        return Coordinator(_ParentLine())

    def execute(
        self, walk: Walk, chunks: Sequence[int], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, Totals], None, None]:
        """As ``Executor.execute``.

        Raises:
            ChildFailed: the child ends before it has asked for anything.
            Exception: one that ended the work in the child.
        """
        self.states.renew()
        left = dict.fromkeys(chunks)
        silent = 0  # children in a row that ended without a word
        while left and not stopped():
            work = _Work(walk=walk, make_predictor=self.make_predictor, chunks=tuple(left))
            with _Child(cloudpickle.dumps(work)) as child:
                said = False
                for message in child.messages():
                    said = True
                    done = self._answered(child, message)
                    if done:
                        del left[done[0]]
                        yield done
                        if stopped():
                            self.stop()
            silent = 0 if said else silent + 1
            if silent >= ATTEMPTS:
                raise ChildFailed(f"the process that labels cannot be started ({child.process.returncode=})")

    def _answered(self, child: "_Child", message: tuple[str, Any, Any]) -> tuple[int, Totals] | None:
        """Answer a message of the child; returns the number and totals of a chunk that is done."""
        kind, what, content = message
        if kind == "done":
            return what, content
        if kind == "failed":
            raise what from ChildTraceback(content)
        answer = DirectLine(self.states).ask(what, *content)
        if kind == "ask":
            child.send(answer)
        return None

    def stop(self) -> None:
        """As ``Executor.stop``."""
        self.states.close()


class ChildTraceback(Exception):
    """The traceback of an error in the child, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _identical(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


class _Child(contextlib.AbstractContextManager["_Child"]):
    """The child process, until the context is left."""

    def __init__(self, work: bytes) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is the JSON line's
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for the parent, whose end ends the child
            )
        self.work = work

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def send(self, value: Any) -> None:
        """Send an answer; a child that has ended is noticed by ``messages``."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(value)

    def messages(self) -> Iterator[tuple[str, Any, Any]]:
        """What the child says, until it ends."""
        with contextlib.suppress(EOFError, ConnectionError):
            self.connection.send_bytes(self.work)
            while True:
                yield cloudpickle.loads(self.connection.recv_bytes())


class _Parent:
    """The parent as the child sees it, from any of its threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sending, self.asking = threading.Lock(), threading.Lock()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take answers until the parent is gone, which ends this process."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.answers.put(self.connection.recv())
        os._exit(1)

    def send(self, kind: str, what: Any, content: Any = ()) -> None:
        """Send a message, without waiting."""
        message = cloudpickle.dumps((kind, what, content))
        with self.sending:
            self.connection.send_bytes(message)

    def ask(self, method: str, arguments: Sequence[Any]) -> Any:
        """Send a question and wait for the answer."""
        with self.asking:
            self.send("ask", method, arguments)
            return self.answers.get()


_parent: _Parent | None = None
"""In the child: its parent."""


class _ParentLine:
    """The child's way to the chunk states in its parent."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """As ``Line.ask``."""
        assert _parent, "only the child asks"
        return _parent.ask(method, arguments)

    def tell(self, method: str, *arguments: Any) -> None:
        """As ``Line.tell``."""
        assert _parent, "only the child tells"
        _parent.send("tell", method, arguments)

    def own_id(self) -> str:
        """There is one child only."""
        return "child"


def main(descriptor: int) -> None:
    """The child: do the work that comes over a pipe; ends when it is done, or when the parent is gone."""
    global _parent
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    connection = Connection(descriptor)
    parent = _parent = _Parent(connection)
    work: _Work = cloudpickle.loads(connection.recv_bytes())
    threading.Thread(target=parent.listen, daemon=True).start()
    try:
        for number, totals in _done(work):
            parent.send("done", number, totals)
    except Exception as error:
        parent.send("failed", error, traceback.format_exc())
    connection.close()
    os._exit(0)


def _done(work: _Work) -> Iterator[tuple[int, Totals]]:
    """Carry chunks through the stages, some at a time; yields the number and totals of each that is done."""
    walk = work.walk
    segment = Segment(walk.context, work.make_predictor, LocalResources.of_machine())

    def carry(number: int) -> tuple[int, Totals]:
        return number, walk.write(segment(walk.read(number))).totals

    with ThreadPoolExecutor(CALLS + AHEAD) as pool:
        yield from map_ahead(pool, carry, work.chunks, depth=CALLS + AHEAD - 1)
