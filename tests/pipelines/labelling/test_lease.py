"""Who is at work: told to others, waited for, and taken over from those that have ended, on local disk and on S3."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from pipelines.labelling import lease
from pipelines.labelling.lease import Holder, Terms, hold_lease
from pipelines.storage import Store, TransientStorageError, open_store
from tests.support.waiting import until

PATH = ".lease/model=street.json"
LOOKS = Terms(life=60, look=20)
FAR = replace(Holder.here(), host="far-away", machine="another", process=4711, token="far")
QUICK = Terms(look=0.01)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/out"
    (tmp_path / "out").mkdir()
    return open_store(root, field="output")


def put(store: Store, holder: Holder) -> None:
    """Let somebody hold the lease, or show that they are alive."""
    content = json.dumps(asdict(holder)).encode()
    found = store.stat(PATH)
    assert store.put_if_match(PATH, content, found.etag) if found else store.put_if_absent(PATH, content)


def holder_of(store: Store) -> Holder:
    return Holder(**json.loads(store.read(PATH)))


def is_ours(store: Store) -> bool:
    return holder_of(store).process == os.getpid()


class Clock:
    """Time that passes only while somebody waits; at each wait it does what is left to be done."""

    def __init__(self, *deeds: Callable[[], None]) -> None:
        self.now, self.deeds = 0.0, list(deeds)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.deeds:
            self.deeds.pop(0)()


MakeClock = Callable[..., Clock]


@pytest.fixture
def make_clock(monkeypatch: pytest.MonkeyPatch) -> MakeClock:
    def make(*deeds: Callable[[], None]) -> Clock:
        clock = Clock(*deeds)
        monkeypatch.setattr(lease, "time", clock)
        return clock

    return make


def test_it_tells_who_holds_it_and_is_gone_afterwards(store: Store) -> None:
    with hold_lease(store, PATH, wait=True):
        assert is_ours(store)
        assert not holder_of(store).has_ended()
    assert not store.exists(PATH)
    with pytest.raises(ZeroDivisionError), hold_lease(store, PATH, wait=True):
        _ = 1 / 0
    assert not store.exists(PATH)


def test_the_next_one_waits_for_it(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    order = []

    def next_one() -> None:
        with hold_lease(store, PATH, wait=True, terms=QUICK):
            order.append("second")

    thread = threading.Thread(target=next_one)
    with caplog.at_level(logging.WARNING), hold_lease(store, PATH, wait=True):
        thread.start()
        until(lambda: "waiting for another run" in caplog.text)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert not store.exists(PATH)


def test_who_does_not_wait_works_beside_it(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    put(store, FAR)
    with hold_lease(store, PATH, wait=False):
        assert holder_of(store) == FAR
    assert holder_of(store) == FAR
    assert "(process 4711 on far-away, since " in caplog.text and "done twice" in caplog.text


def test_one_not_renewed_is_taken_over(store: Store, caplog: pytest.LogCaptureFixture, make_clock: MakeClock) -> None:
    put(store, FAR)
    first, second = (partial(put, store, replace(FAR, renewals=count)) for count in (1, 2))
    clock = make_clock(first, lambda: None, second)
    with hold_lease(store, PATH, wait=True, terms=LOOKS):
        assert clock.now == 3 * 20 + 80  # a life after the last renewal was seen
        assert holder_of(store).host != FAR.host
    assert caplog.text.count("waiting for another run") == 1
    assert "taking over" in caplog.text


@contextmanager
def ended(*, reaped: bool) -> Iterator[Holder]:
    """A process that has ended, and maybe waits for its parent to take notice."""
    code = "from pipelines.labelling.lease import *; print(json.dumps(asdict(Holder.here())))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        holder = Holder(**json.loads(process.stdout.read()))
        if reaped:
            process.wait()
        else:
            until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        yield holder


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("wait", [True, False])
def test_of_an_ended_process_it_is_taken_at_once(store: Store, reaped: bool, wait: bool, make_clock: MakeClock) -> None:
    clock = make_clock()
    with ended(reaped=reaped) as holder:
        put(store, holder)
        with hold_lease(store, PATH, wait=wait):
            assert clock.now == 0
            assert is_ours(store)


def test_a_process_number_that_another_one_has_now_is_not_the_holder() -> None:
    own = Holder.here()
    assert not own.has_ended()
    assert replace(own, started=own.started - 3600).has_ended()
    assert not replace(own, machine="another", started=own.started - 3600).has_ended()


def test_whoever_was_taken_over_leaves_the_other_one_alone(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with hold_lease(store, PATH, wait=True, terms=Terms(renewal=0.01)):
        until(lambda: holder_of(store).renewals > 1)
        found = None
        while not (found and store.put_if_match(PATH, json.dumps(asdict(FAR)).encode(), found.etag)):
            found = store.stat(PATH)
        until(lambda: "another run has taken over (process 4711" in caplog.text)
    assert holder_of(store) == FAR


@pytest.mark.parametrize("content", [b"", b'{"version": 2}'])
def test_what_cannot_be_understood_lives_as_long(content: bytes, store: Store, make_clock: MakeClock) -> None:
    assert store.put_if_absent(PATH, content)
    clock = make_clock()
    with hold_lease(store, PATH, wait=True, terms=LOOKS):
        assert clock.now == 80


def test_an_answer_that_was_lost_is_no_other_holder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_if_absent = store.put_if_absent
    monkeypatch.setattr(store, "put_if_absent", lambda path, data: put_if_absent(path, data) and False)
    with hold_lease(store, PATH, wait=True):
        assert is_ours(store)
    assert not store.exists(PATH)


@pytest.mark.parametrize("error", [TransientStorageError("nobody answers"), OSError(38, "nobody answers")], ids=type)
@pytest.mark.parametrize("request_", ["put_if_absent", "put_if_match", "delete"])
def test_a_lease_that_cannot_be_had_stops_nobody(
    request_: str, error: Exception, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bool:
        raise error

    monkeypatch.setattr(store, request_, fail)
    with hold_lease(store, PATH, wait=True, terms=Terms(renewal=0.01)):
        if request_ == "put_if_match":
            until(lambda: "nobody answers" in caplog.text)
    assert "nobody answers" in caplog.text


def test_waiting_outlasts_absent_storage(store: Store, monkeypatch: pytest.MonkeyPatch, make_clock: MakeClock) -> None:
    put(store, FAR)
    put_if_absent = store.put_if_absent

    def away(*_: object) -> bool:
        raise TransientStorageError("nobody answers")

    clock = make_clock(
        lambda: monkeypatch.setattr(store, "put_if_absent", away),
        lambda: store.delete(PATH),
        lambda: monkeypatch.setattr(store, "put_if_absent", put_if_absent),
    )
    with hold_lease(store, PATH, wait=True, terms=LOOKS):
        assert clock.now == 60
        assert is_ours(store)


def test_one_that_is_deleted_is_made_anew(store: Store) -> None:
    with hold_lease(store, PATH, wait=True, terms=Terms(renewal=0.01)):
        store.delete(PATH)
        until(lambda: store.exists(PATH))
        until(lambda: holder_of(store).renewals > 3)
    assert not store.exists(PATH)


def test_a_place_that_nothing_can_be_written_to_is_given_up(tmp_path: Path, make_clock: MakeClock) -> None:
    store = open_store(str(tmp_path), field="output")
    (tmp_path / PATH).mkdir(parents=True)  # neither absent nor a file
    clock = make_clock()
    with hold_lease(store, PATH, wait=True, terms=LOOKS):
        assert clock.now == 80
