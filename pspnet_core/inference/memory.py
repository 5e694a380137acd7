"""Memory of forward passes: a budget that they share, batches that fit into it, and what to do when it runs out."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)

_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""How CUDA, its libraries and the allocators of PyTorch say in a RuntimeError that memory has run out."""


class MemoryBudget:
    """Memory for passes side by side; a pass that takes more than all of it runs alone.

    Args:
        total: pixels of input that passes under way may have together.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self._changed = threading.Condition()
        self._reserved: list[float] = []

    @contextlib.contextmanager
    def reserve(self, pixels: float) -> Iterator[None]:
        """Wait until there is memory for so many pixels, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._reserved or sum(self._reserved) + pixels <= self.total)
            self._reserved.append(pixels)
        try:
            yield
        finally:
            with self._changed:
                self._reserved.remove(pixels)
                self._changed.notify_all()


class BatchLimits(Generic[K]):
    """Most inputs of each size in one forward pass.

    Args:
        batch: the limit for sizes with which memory has not run out; at least 1.
        fitting: how many of a size memory should hold; one is tried even where it should not.
    """

    def __init__(self, batch: int, fitting: Callable[[K], float] = lambda size: math.inf) -> None:
        self.batch, self.fitting = batch, fitting
        self._lowered: dict[K, int] = {}

    def of(self, size: K) -> int:
        """Most inputs of this size."""
        return self._lowered.get(size) or int(max(1, min(self.batch, self.fitting(size))))

    def halve(self, size: K, failed: int) -> None:
        """Halve the limit after memory ran out with ``failed`` inputs of this size, 2 or more; logs a warning."""
        self._lowered[size] = min(self.of(size), failed // 2)
        log.warning("out of memory with %d inputs of %s: from now on %d of them", failed, size, self.of(size))


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, on the device or beside it."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


def release_cache(device: torch.device) -> None:
    """Give back what the device's allocator keeps, since other pieces may do for a smaller batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
