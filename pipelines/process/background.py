"""A thread that works beside the main one."""

import threading
from collections.abc import Callable


class Worker:
    """A daemon thread that calls ``turn`` again and again.

    Args:
        turn: does some work; returns how many seconds to wait for the next turn, or None to end the thread. An error
            ends it too, and is kept as ``failure``.
        name: of the thread.
        wait: seconds before the first turn.
    """

    def __init__(self, turn: Callable[[], float | None], *, name: str, wait: float = 0.0) -> None:
        self.failure: Exception | None = None
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
        except Exception as error:
            self.failure = error
