"""What threads share."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.threads import SharedLock, map_ahead

T = TypeVar("T")

SECONDS = 60.0


class Inline(Executor):
    """Does at once what it is asked for."""

    def submit(self, function: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(function(*args, **options))
        return done


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


@given(
    weights=st.lists(st.integers(0, 10), max_size=40),
    depth=st.integers(0, 8),
    most=st.integers(0, 20),
)
def test_what_waits_is_bounded_in_number_and_in_weight(weights: list[int], depth: int, most: int) -> None:
    held: list[int] = []

    def work(item: int) -> int:
        held.append(item)
        assert len(held) <= depth + 1
        assert len(held) == 1 or sum(held) <= most
        return item

    results = map_ahead(Inline(), work, weights, depth=depth, weight=float, most=most)
    found = []
    for result in results:
        found.append(result)
        held.pop(0)
    assert found == weights


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
