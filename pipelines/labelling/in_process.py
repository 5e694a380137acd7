"""Carries chunks through the stages on this machine without Ray, because a few images do not pay for Ray's start.

The stages run in a child process. Where an image ends it, it is started again under the rules of ``coordinator``, whose
state is here: over a pipe the child calls it, and reports each chunk that is done.

A child has several chunks under way, and its death does not say which of them is to blame. So its successor takes these
chunks first, one at a time: the chunk under way is then the one to blame.
"""

import contextlib
import functools
import os
import queue
import signal
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

from pipelines.cluster.machine import LONGEST_SILENCE_S, LocalResources
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.coordinator import ATTEMPTS, ChunkStates, Coordinator, DirectLine
from pipelines.labelling.stages.predictor import ModelToLoad, Predictor
from pipelines.labelling.stages.segment import Segment
from pipelines.labelling.stages.walk import Walk
from pipelines.process.environment import child_environment
from pipelines.process.logs import log_to_stderr
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import PspnetError

AHEAD = 1
"""Chunks that are read or written while others are with the model."""

_PROGRAM = "import sys; from pipelines.labelling.in_process import main; main(int(sys.argv[1]))"


class ChildFailed(PspnetError):
    """The child process cannot be started, or is stuck, which is no image's fault."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the child is to do with chunks; ``calls`` of them may be with the model at a time."""

    walk: Walk
    make_predictor: Callable[[], Predictor]
    calls: int


@dataclass(frozen=True)
class _Order:
    """Numbers of chunks: first some that are taken one at a time, then the others, side by side."""

    alone: tuple[int, ...]
    others: tuple[int, ...]


class InProcessExecutor:
    """Executes in a child process, on CPUs."""

    def __init__(self, model: ModelToLoad) -> None:
        load = functools.partial(_identical, model.checkpoint)
        self.make_predictor, self.calls = model.maker(load, LocalResources.of_machine), model.calls
        self.states = ChunkStates()

    def start(self) -> Coordinator:
        """As ``Executor.start``."""
        return Coordinator(_ParentLine())

    def execute(
        self, walk: Walk, chunks: Sequence[int], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, Totals], None, None]:
        """As ``Executor.execute``.

        Raises:
            ChildFailed: the child ends before it begins with a chunk, again and again, or says nothing for hours.
            Exception: one that ended the work in the child.
        """
        self.states.renew()
        work = cloudpickle.dumps(_Work(walk=walk, make_predictor=self.make_predictor, calls=self.calls))
        left, suspects = dict.fromkeys(chunks), dict[int, None]()
        idle = 0  # children in a row that ended before they began with a chunk
        while left and not stopped():
            order = _Order(tuple(suspects), tuple(chunk for chunk in left if chunk not in suspects))
            with _Child(work, order) as child:
                began = False
                for kind, what, content in child.messages():
                    if kind == "done":
                        left.pop(what)
                        suspects.pop(what, None)
                        yield what, content
                        if stopped():
                            self.stop()
                    elif kind == "failed":
                        raise what from ChildTraceback(content)
                    else:
                        if what == "admit":
                            began, suspects[content[0]] = True, None
                        self._answer(child, kind, what, content)
            idle = 0 if began else idle + 1
            if idle > ATTEMPTS:  # one more than for loading the model, whose error says more
                raise ChildFailed(f"the process that labels cannot be started: it {child.end()}")

    def _answer(self, child: "_Child", kind: str, method: str, arguments: Sequence[Any]) -> None:
        answer = DirectLine(self.states).ask(method, *arguments)
        if kind == "ask":
            child.send(answer)

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
    """The child process, until the context is left.

    Raises:
        ChildFailed: the system starts no process.
    """

    def __init__(self, work: bytes, order: _Order) -> None:
        self.work, self.order = work, order
        self.connection, theirs = Pipe()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard output is the JSON line's
                    env=child_environment(),
                    start_new_session=True,  # Ctrl-C is for the parent, whose end ends the child
                )
            except OSError as error:
                self.connection.close()
                raise ChildFailed(f"the process that labels cannot be started: {error}") from error

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def send(self, value: Any) -> None:
        """Send an answer; a child that has ended is noticed by ``messages``."""
        with contextlib.suppress(OSError):
            self.connection.send(value)

    def messages(self) -> Iterator[tuple[str, Any, Any]]:
        """What the child says, until it ends."""
        with contextlib.suppress(EOFError, OSError):  # also in the middle of a message
            self.connection.send_bytes(self.work)
            self.connection.send(self.order)
            while self.connection.poll(LONGEST_SILENCE_S):
                yield cloudpickle.loads(self.connection.recv_bytes())
            raise ChildFailed(f"the process that labels has said nothing for {LONGEST_SILENCE_S:g} s")

    def end(self) -> str:
        """How the process ended; once the context is left."""
        code = self.process.returncode
        return f"is ended by {signal.Signals(-code).name}" if code < 0 else f"ends with exit code {code}"


class _Parent:
    """The parent as the child sees it, from any of its threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sending, self.asking = threading.Lock(), threading.Lock()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take answers until the parent is gone, which ends this process."""
        with contextlib.suppress(EOFError, OSError):
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

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """As ``Line.ask``; the parent always answers, or is gone, which ends this process."""
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where all processes get one, the parent's orderly end is ours, too
    log_to_stderr()
    connection = Connection(descriptor)
    parent = _parent = _Parent(connection)
    work: _Work = cloudpickle.loads(connection.recv_bytes())
    order: _Order = connection.recv()
    threading.Thread(target=parent.listen, daemon=True).start()
    with _reported(parent):
        _carry_all(work, order, parent)
    connection.close()
    os._exit(0)


def _carry_all(work: _Work, order: _Order, parent: _Parent) -> None:
    """Carry chunks through the stages, and report each as soon as it is done."""
    walk, turns = work.walk, threading.BoundedSemaphore(work.calls)
    segment = Segment(walk.context, work.make_predictor, LocalResources.of_machine())

    def carry(number: int) -> None:
        with _reported(parent):
            encoded = walk.read(number)
            with turns:
                rows = segment(encoded)
            parent.send("done", number, walk.write(rows).totals)

    for number in order.alone:
        carry(number)
    with ThreadPoolExecutor(work.calls + AHEAD) as pool:
        list(pool.map(carry, order.others))


@contextlib.contextmanager
def _reported(parent: _Parent) -> Iterator[None]:
    """Tell the parent of an error at once, which then ends this process."""
    try:
        yield
    except Exception as error:
        parent.send("failed", _portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot travel."""
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
        return error
    except Exception:  # whatever its own methods raise
        return RuntimeError(f"{type(error).__name__}: {error}")
