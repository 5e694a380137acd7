"""Something done every few seconds beside the work, in a thread of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(every: float, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` every so many seconds, the first time after as many; never again once the context is left.

    What it raises ends the calls, and comes out when the context is left unless another error does.
    """
    over = threading.Event()
    failed: list[Exception] = []

    def work() -> None:
        try:
            while not over.wait(every):
                action()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]
