"""Calls that are repeated: how often, how long, at which pace; and what the log says of an outage."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from pipelines.process.retrying import Outage, Retries

AT_ONCE = Retries(attempts=3, first_wait=0, longest_wait=0, jitter=0)


def is_away(error: BaseException) -> bool:
    return isinstance(error, ConnectionError)


class Failing:
    """Raises some errors, one a call, and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def call_async(self) -> str:
        return self()


def called(retries: Retries, action: Failing) -> str:
    return retries.call(action, is_away)


def called_async(retries: Retries, action: Failing) -> str:
    return asyncio.run(retries.call_async(action.call_async, is_away))


@pytest.mark.parametrize("call", [called, called_async])
def test_attempts_are_bounded_and_the_last_error_is_raised(call: Callable[[Retries, Failing], str]) -> None:
    lasting = Failing(*(ConnectionError(str(number)) for number in range(9)))
    with pytest.raises(ConnectionError, match="2"):
        call(AT_ONCE, lasting)
    assert lasting.calls == 3
    assert call(AT_ONCE, Failing(ConnectionError(), ConnectionError())) == "done"
    broken = Failing(ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        call(AT_ONCE, broken)
    assert broken.calls == 1


ENDLESS = Retries(attempts=0, first_wait=0, longest_wait=0, jitter=0)


@pytest.mark.parametrize(
    ("call", "calls"),
    [
        (lambda action: AT_ONCE.call(action, is_away, done=1), 2),
        (lambda action: Retries(attempts=0, seconds=0).call(action, is_away), 1),
        (lambda action: ENDLESS.call(action, is_away, given_up=lambda: action.calls == 4), 4),
    ],
    ids=["attempts that were made before", "time", "the caller"],
)
def test_what_else_bounds_the_attempts(call: Callable[[Failing], str], calls: int) -> None:
    lasting = Failing(*(ConnectionError() for _ in range(9)))
    with pytest.raises(ConnectionError):
        call(lasting)
    assert lasting.calls == calls


def test_the_last_attempt_begins_when_the_time_is_over_and_not_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tenacity.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    begun: list[float] = []

    def away() -> None:
        begun.append(now[0])
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Retries(attempts=0, seconds=10, first_wait=1, longest_wait=8, jitter=0).call(away, is_away)
    assert begun == [0, 1, 3, 7, 10]


def test_pauses_grow_to_a_bound() -> None:
    even = Retries(first_wait=1, longest_wait=8, jitter=0)
    assert [even.pause(failures) for failures in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 8, 8, 8]
    spread = {Retries(first_wait=1, longest_wait=8, jitter=1).pause(1) for _ in range(20)}
    assert len(spread) > 1
    assert all(1 <= pause <= 2 for pause in spread)


def test_an_outage_has_two_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_TOKEN", "hunter2hunter2")
    outage = Outage("storage", "training waits")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            AT_ONCE.call(Failing(), is_away, outage=outage)
            away = ConnectionError("no hunter2hunter2\nand more")
            AT_ONCE.call(Failing(away, ConnectionError("still")), is_away, outage=outage)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["storage does not answer (no ***); training waits", "storage answers again after 0 s"] * 2


def test_one_failure_without_another_attempt_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectionError):
        Retries(attempts=1).call(Failing(ConnectionError()), is_away, outage=Outage("storage", "wait"))
    assert not caplog.records
