"""The thread that works beside the main one."""

import asyncio
import queue
import threading

import pytest

from pipelines.process.background import Worker

SECONDS = 60.0  # a busy machine takes long
LONG_S = 3600.0


def test_turns_follow_one_another_until_one_is_the_last() -> None:
    turns: list[int] = []

    def turn() -> float | None:
        turns.append(len(turns))
        return 0.0 if len(turns) < 5 else None

    assert Worker(turn, name="five").join(SECONDS)
    assert turns == [0, 1, 2, 3, 4]


def test_a_turn_comes_early_when_woken_and_never_after_the_stop() -> None:
    turns: queue.SimpleQueue[None] = queue.SimpleQueue()

    def turn() -> float:
        turns.put(None)
        return LONG_S

    worker = Worker(turn, name="sleeper", wait=LONG_S)
    for _ in range(3):
        worker.wake()
        turns.get(timeout=SECONDS)
    worker.stop()
    worker.wake()
    assert turns.empty()
    assert "sleeper" not in {thread.name for thread in threading.enumerate()}


def test_a_stop_while_the_thread_takes_notice_of_another_wake_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    worker: list[Worker] = []

    class Event(threading.Event):
        """Stops the worker at the worst moment: between the look at what woke it and the next turn."""

        def clear(self) -> None:
            worker[0]._stopped = True
            self.set()
            super().clear()

    def turn() -> float:
        turns.append(1)
        return LONG_S

    monkeypatch.setattr("pipelines.process.background.threading.Event", Event)
    worker.append(Worker(turn, name="stopped", wait=LONG_S))
    worker[0].wake()
    assert worker[0].join(SECONDS)
    assert turns == []


def test_what_hangs_is_not_waited_for() -> None:
    begun, over = threading.Event(), threading.Event()

    def turn() -> None:
        begun.set()
        over.wait(SECONDS)

    worker = Worker(turn, name="hanging")
    assert begun.wait(SECONDS)
    assert not worker.join(0)
    worker.stop(0)
    over.set()
    assert worker.join(SECONDS)


@pytest.mark.parametrize("error", [ValueError("broken"), asyncio.CancelledError()])
def test_an_error_ends_the_thread_and_is_kept(error: BaseException) -> None:
    def turn() -> float:
        raise error

    worker = Worker(turn, name="broken")
    assert worker.join(SECONDS)
    assert worker.failure is error
