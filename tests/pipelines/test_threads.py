"""What threads share."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.threads import SharedLock, map_ahead

SECONDS = 60.0


def test_items_are_taken_as_results_are_consumed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, lambda number: 2 * number, items(), depth=3)
        assert next(results) == 0
        assert len(taken) <= 5
        assert list(results) == [2 * number for number in range(1, 100)]


def test_several_hold_it_together() -> None:
    lock, both = SharedLock(), threading.Barrier(2)

    def share() -> int:
        with lock.shared():
            return both.wait(SECONDS)  # until the other one is inside as well

    with ThreadPoolExecutor(2) as pool:
        assert sorted(future.result(SECONDS) for future in [pool.submit(share), pool.submit(share)]) == [0, 1]


def test_who_holds_it_alone_is_alone() -> None:
    lock, inside, most = SharedLock(), set[int](), [0]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(50):
            if draw.random() < 0.3:
                with lock.alone():
                    assert not inside
                    most[0] += 1
            else:
                with lock.shared():
                    inside.add(seed)
                    inside.remove(seed)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result(SECONDS)
    assert most[0] > 50


def test_it_is_free_after_an_error() -> None:
    lock = SharedLock()
    for hold in (lock.shared, lock.alone, lock.shared):
        with pytest.raises(KeyError), hold():
            raise KeyError
    with lock.alone():
        pass
