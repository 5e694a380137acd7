"""Budgets and limits of forward passes."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pspnet_core.inference.memory import BatchLimits, MemoryBudget


def test_a_limit_only_falls(caplog: pytest.LogCaptureFixture) -> None:
    limits: BatchLimits[str] = BatchLimits(8, lambda size: 6 if size == "tight" else math.inf)
    limits.halve("a", 8)
    assert caplog.messages == ["out of memory with 8 inputs of a: from now on 4 of them"]
    assert (limits.of("a"), limits.of("b"), limits.of("tight")) == (4, 8, 6)
    limits.halve("a", 3)
    limits.halve("a", 8)  # by another thread, which began before
    limits.halve("tight", 6)
    assert (limits.of("a"), limits.of("tight")) == (1, 3)


def test_passes_wait_for_memory_and_one_that_is_larger_than_all_of_it_runs_alone() -> None:
    budget, inside, lock = MemoryBudget(10), list[float](), threading.Lock()

    def run(pixels: float) -> None:
        with budget.reserve(pixels):
            with lock:
                inside.append(pixels)
                assert sum(inside) <= 10 or inside == [30]
            with lock:
                inside.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(run, pixels) for pixels in [3, 30, 6, 10, 4] * 20]:
            future.result(60)
