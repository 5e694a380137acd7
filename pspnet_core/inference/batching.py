"""Batches of images of one size, taken from a bounded window of a stream.

Batches are a pure function of the sequence of sizes, so that the same images share passes with the same neighbours and
get the same masks to the last bit. (Where memory runs out, batches get smaller, whatever the sizes.)
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")
S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Window:
    """How far ahead images are taken in the search for others of their size.

    Attributes:
        items: most images from the oldest one that waits to the newest one taken.
        bytes: most bytes of all of these, of images and results. Where all are of one size it does not count: such a
            batch is filled whatever it takes.
    """

    items: int
    bytes: int


def by_size(
    items: Iterable[tuple[K, T]],
    *,
    size: Callable[[T], S],
    most: Callable[[S], int],
    cost: Callable[[T], int],
    window: Window,
) -> Iterator[list[tuple[K, T]]]:
    """Group keyed items of one size, each group in the order of its items.

    A group is complete with ``most`` items of its size. When the window is full the group of the oldest item goes as it
    is.

    Args:
        size: what items must agree in to be together.
        most: items of a size in one group.
        cost: bytes that an item takes, or its result if that is more.
    """
    waiting: dict[S, tuple[int, list[tuple[K, T]]]] = {}  # position of the oldest item, and the group; oldest first
    costs: deque[int] = deque()  # of everything from the oldest item that waits
    for position, (key, item) in enumerate(items):
        costs.append(cost(item))
        kind = size(item)
        oldest, group = waiting.setdefault(kind, (position, []))
        group.append((key, item))
        if len(group) >= most(kind):
            yield waiting.pop(kind)[1]
        while waiting:
            kind, (oldest, group) = next(iter(waiting.items()))
            while len(costs) > position + 1 - oldest:
                costs.popleft()
            alike = len(group) == len(costs)
            if len(costs) < window.items and (alike or sum(costs) < window.bytes):
                break
            yield waiting.pop(kind)[1]
        else:
            costs.clear()
    for _, group in waiting.values():
        yield group


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Hand on each item when the next one has been taken.

    Of batches that are launched as they are taken, an asynchronous device so has the next one while the caller waits
    for the last.
    """
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held
