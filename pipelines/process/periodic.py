"""Something done every few seconds beside the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.process.background import Worker


@contextmanager
def ticking(every: float, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` every so many seconds, the first time after as many; never again once the context is left.

    An error in it ends the calls, and is raised when the context is left unless another one is.
    """

    def tick() -> float:
        action()
        return every

    worker = Worker(tick, name="ticking", wait=every)
    try:
        yield
    finally:
        worker.stop()
    if worker.failure:
        raise worker.failure
