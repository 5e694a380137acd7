"""Threads: a bounded map that works ahead in order, and a lock that some may share."""

import collections
import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    pool: Executor,
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    depth: int,
    weight: Callable[[T], float] = lambda item: 0,
    most: float = math.inf,
) -> Iterator[R]:
    """``map(function, items)`` with up to ``depth`` calls under way before their result is asked for.

    Unlike ``Executor.map`` it takes items only as results are consumed, so memory stays bounded.

    Args:
        weight: what the result of an item weighs, such as its bytes; told before the call.
        most: all results that wait weigh no more than this together. One alone may.
    """
    ahead: collections.deque[tuple[Future[R], float]] = collections.deque()
    for item in items:
        own = weight(item)
        while ahead and own + sum(held for _, held in ahead) > most:
            yield ahead.popleft()[0].result()
        ahead.append((pool.submit(function, item), own))
        if len(ahead) > depth:
            yield ahead.popleft()[0].result()
    while ahead:
        yield ahead.popleft()[0].result()


class SharedLock:
    """A lock for any number of threads together, or for one alone; one that waits to be alone lets no other in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._alone = 0  # threads that hold it; those that hold it alone, or wait to

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._inside += 1
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock while no other thread does."""
        with self._changed:
            self._alone += 1
            self._changed.wait_for(lambda: not self._inside)
            self._inside += 1
        try:
            yield
        finally:
            self._leave(alone=1)

    def _leave(self, *, alone: int = 0) -> None:
        with self._changed:
            self._inside -= 1
            self._alone -= alone
            self._changed.notify_all()
