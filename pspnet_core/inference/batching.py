"""Which images share a forward pass: those of one size within a bounded window, and fewer once memory has run out.

Batches are a pure function of the sequence of sizes, so that the same images meet the same neighbours, and get the same
masks to the last bit, whoever labels them. The exception is memory that ran out: which batch was too large is nothing
that the images tell.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""How CUDA, its libraries and the allocators of PyTorch say in a RuntimeError that memory has run out."""


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
    items: Iterable[T],
    *,
    size: Callable[[T], K],
    most: Callable[[K], int],
    cost: Callable[[T], int],
    window: Window,
) -> Iterator[list[tuple[int, T]]]:
    """Group items of one size with their positions. The order of a group is that of its items.

    A group is complete with ``most`` items of its size. When the window is full the group of the oldest item goes as it
    is. So a caller that hands on results in the order of the items holds no more of them than the window does.

    Args:
        size: what items must agree in to be together.
        most: items of a size in one group.
        cost: bytes that an item takes, or its result if that is more.
    """
    waiting: dict[K, list[tuple[int, T]]] = {}  # in the order of their oldest items
    costs: deque[int] = deque()  # of everything from the oldest item that waits
    for position, item in enumerate(items):
        costs.append(cost(item))
        kind = size(item)
        group = waiting.setdefault(kind, [])
        group.append((position, item))
        if len(group) >= most(kind):
            yield waiting.pop(kind)
        while waiting:
            kind, group = next(iter(waiting.items()))
            while len(costs) > position + 1 - group[0][0]:
                costs.popleft()
            alike = len(group) == len(costs)
            if len(costs) < window.items and (alike or sum(costs) < window.bytes):
                break
            yield waiting.pop(kind)
        else:
            costs.clear()
    yield from waiting.values()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; each is handed on when the next one has been taken.

    Of batches that are launched as they are taken, a device so has the next one while somebody waits for the last.
    """
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


class Limits(Generic[K]):
    """How many inputs of each size go through the network at once.

    Args:
        most: for sizes with which memory has not run out; at least 1.
        fitting: how many of a size memory should hold; one is tried whatever it says.
    """

    def __init__(self, most: int, fitting: Callable[[K], float] = lambda size: math.inf) -> None:
        self.most, self.fitting = most, fitting
        self._lowered: dict[K, int] = {}

    def of(self, size: K) -> int:
        """Most inputs of this size."""
        return self._lowered.get(size) or int(max(1, min(self.most, self.fitting(size))))

    def lower(self, size: K, failed: int) -> None:
        """Memory ran out with ``failed`` inputs of this size, 2 or more: from now on half as many, and a log line."""
        self._lowered[size] = min(self.of(size), failed // 2)
        log.warning("out of memory with %d inputs of %s: from now on %d of them", failed, size, self.of(size))


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, on the device or beside it."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


def relieve(device: torch.device) -> None:
    """Give back what the device's allocator keeps: in other pieces it may do for a smaller batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
