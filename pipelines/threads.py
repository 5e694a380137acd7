"""Working ahead in threads, in order and within a bound."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], *, depth: int) -> Iterator[R]:
    """``map(function, items)`` with up to ``depth`` calls under way before their result is asked for.

    Unlike ``Executor.map`` it takes items only as results are consumed, so memory stays bounded.
    """
    ahead: collections.deque[Future[R]] = collections.deque()
    for item in items:
        ahead.append(pool.submit(function, item))
        if len(ahead) > depth:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
