"""A thread that works beside the main one."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class Worker:
    """A daemon thread that calls ``turn`` again and again.

    Args:
        turn: does some work; returns how many seconds to wait for the next turn, or None to end the thread. An error
            of any kind ends it too, and is kept as ``failure``.
        name: of the thread.
        wait: seconds before the first turn.
    """

    def __init__(self, turn: Callable[[], float | None], *, name: str, wait: float = 0.0) -> None:
        self.failure: BaseException | None = None
        self._turn, self._wait = turn, wait
        self._woken, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Begin the next turn now."""
        self._woken.set()

    def stop(self, seconds: float | None = None) -> None:
        """Begin no other turn, and wait for the one under way, for at most so many seconds."""
        self._stopped = True
        self._woken.set()
        self._thread.join(seconds)

    def join(self, seconds: float) -> bool:
        """Wait for at most so many seconds until the thread ends by itself; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait: float | None = self._wait
        try:
            while wait is not None:
                self._woken.wait(wait)
                self._woken.clear()  # before the look: a stop that comes between the two must not be forgotten
                if self._stopped:
                    return
                wait = self._turn()
        except BaseException as error:  # a cancelled request, or a panic of Rust: raised where it is looked for
            self.failure = error


@contextmanager
def working(turn: Callable[[], float | None], *, name: str, wait: float = 0.0) -> Iterator[None]:
    """Do turns as ``Worker`` does within the context, and none once it is left.

    What ended the turns is raised when the context is left, unless another error is.
    """
    worker = Worker(turn, name=name, wait=wait)
    try:
        yield
    finally:
        worker.stop()
    if worker.failure:
        raise worker.failure


def ticking(every: float, action: Callable[[], None]) -> AbstractContextManager[None]:
    """Call ``action`` every so many seconds within the context, the first time after as many; errors as ``working``."""

    def tick() -> float:
        action()
        return every

    return working(tick, name="ticking", wait=every)
