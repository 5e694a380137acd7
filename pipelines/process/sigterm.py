"""An orderly end on SIGTERM: what a scheduler, a spot machine or Kubernetes sends before it kills."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Ending:
    """What SIGTERM does, as long as ``on_sigterm`` holds.

    Attributes:
        came: whether it has come. A plain bool, as a handler may interrupt itself while it holds a lock.
    """

    def __init__(self) -> None:
        self.came = self._orderly = False

    @contextmanager
    def orderly(self, stop: Callable[[], None]) -> Iterator[None]:
        """Within the context the first SIGTERM calls ``stop``, in a thread, instead of ending the process."""
        over = threading.Event()

        def wait() -> None:
            # Not in the handler, which may interrupt any call into Ray.
            while not over.wait(0.1):
                if self.came:
                    stop()
                    return

        watcher = threading.Thread(target=wait, name="sigterm", daemon=True)
        watcher.start()
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False
            over.set()
            watcher.join()

    def handle(self, _: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        before, self.came = self.came, True
        if before or not self._orderly:
            raise SystemExit(EXIT_CODE)


@contextmanager
def on_sigterm() -> Iterator[Ending]:
    """End with exit code 143 at SIGTERM, at once or, within ``Ending.orderly``, in order; at once at a second one.

    Outside the main thread, where Python lets nobody handle signals, nothing is done.
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
