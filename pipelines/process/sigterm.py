"""An orderly end on SIGTERM, which a scheduler, a spot machine or Kubernetes sends before it kills; and on Ctrl-C."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipelines.process.background import working

EXIT_CODE = 128 + signal.SIGTERM
LOOK_S = 0.1
"""Seconds between two looks whether SIGTERM has come."""


class Ending:
    """What SIGTERM does within ``on_sigterm``.

    Attributes:
        came: whether it has come. A plain bool, because a handler may interrupt itself while it holds a lock.
    """

    def __init__(self) -> None:
        self.came = self._orderly = False

    @contextmanager
    def orderly(self, stop: Callable[[], None]) -> Iterator[None]:
        """Within the context the first SIGTERM calls ``stop``, in a thread, instead of ending the process."""

        def look() -> float | None:
            # Not in the handler, which may interrupt any call into Ray.
            if not self.came:
                return LOOK_S
            stop()
            return None

        with working(look, name="sigterm", wait=LOOK_S):
            self._orderly = True
            try:
                yield
            finally:
                self._orderly = False

    def handle(self, _: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        before, self.came = self.came, True
        if before or not self._orderly:
            raise SystemExit(EXIT_CODE)


@contextmanager
def on_sigterm() -> Iterator[Ending]:
    """End with exit code 143 at SIGTERM, at once or, within ``Ending.orderly``, in order; at once at a second one.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    before = signal.signal(signal.SIGTERM, ending.handle)
    try:
        yield ending
    except SystemExit as end:
        if ending.came:  # Ray has an exit code of its own where the handler interrupts it
            raise SystemExit(EXIT_CODE) from end
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_sigint() -> Iterator[None]:
    """Ctrl-C within the context ends in a KeyboardInterrupt, although a library handles it in its own way.

    Ray Train aborts its workers and ends the process as if all were well, and its handler stays after the training.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    seen, wakeup = socket.socketpair()
    with seen, wakeup:
        # Python writes the number of every signal there, also of those that a library handles.
        seen.setblocking(False)
        wakeup.setblocking(False)
        fd_before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd_before)
            signal.signal(signal.SIGINT, before)
            with suppress(BlockingIOError):
                if signal.SIGINT in seen.recv(4096):
                    raise KeyboardInterrupt
