"""The proxy that injects faults does what it says: a store behind it meets each fault, and gets over it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.process.retrying import Retries
from pipelines.storage import Store, TransientStorageError, open_store
from tests.support.faultproxy import FaultProxy, Request, Rule, hang, reset, slow_down

SECONDS = 60.0
PATIENT = Retries(attempts=3, first_wait=0, longest_wait=0, jitter=0)
DATA = os.urandom(50_000)
REQUEST = Request(method="PUT", path="/x/a", raw=b"", port=1)


@pytest.fixture
def store(s3_bucket: str, s3_proxy: FaultProxy) -> Store:
    return open_store(f"{s3_bucket}/x", field="input", retries=PATIENT)


def test_without_rules_nothing_differs(store: Store) -> None:
    """Signatures hold, whatever the names; conditions, ranges, listings and empty bodies pass."""
    names = ["a b/é+%=&.jpg", "plain.jpg"]
    for name in names:
        assert store.put_if_absent(name, DATA)
        assert not store.put_if_absent(name, b"")
    items = {item.key: item for item in store.list()}
    assert sorted(items) == names
    for name in names:
        assert store.read_if(name, items[name].etag) == DATA
    with store.open("plain.jpg") as stream:
        stream.seek(1000)
        assert stream.read(10) == DATA[1000:1010]
    assert store.put_if_match("plain.jpg", b"", items["plain.jpg"].etag)
    assert store.read("plain.jpg") == b""
    store.delete("plain.jpg")
    assert not store.exists("plain.jpg")


def test_which_requests_fail(store: Store, s3_proxy: FaultProxy) -> None:
    for name in "abcdef":
        store.put_if_absent(name, name.encode())
    rule = s3_proxy.add(Rule(slow_down, method="GET", path="/x/[a-e]$", first=2, times=2))
    never = s3_proxy.add(Rule(reset, method="DELETE"))
    assert [store.read(name) for name in "abcdef"] == [name.encode() for name in "abcdef"]
    # The second matching request fails and, as its retry matches too, that one.
    assert [request.path[-1] for request in rule.hits] == ["b", "b"]
    s3_proxy.clear()
    store.delete("f")
    assert not never.hits


def test_a_rule_that_holds_for_a_while_does_so_from_its_first_failure_on() -> None:
    now = 200.0
    rule = Rule(slow_down, method="PUT", seconds=60, clock=lambda: now)
    assert rule.takes(REQUEST)
    now = 259.0
    assert rule.takes(REQUEST)
    now = 260.0
    assert not rule.takes(REQUEST)


def test_a_share_of_the_requests_fails_the_same_each_time() -> None:
    one, again, other = (Rule(slow_down, share=0.3, seed=seed) for seed in (1, 1, 2))
    failed = [one.takes(REQUEST) for _ in range(60)]
    assert failed[0], "the first one always fails, so that a rule is never without effect"
    assert 5 < sum(failed) < 35
    assert [again.takes(REQUEST) for _ in range(60)] == failed
    assert [other.takes(REQUEST) for _ in range(60)] != failed


def test_what_hangs_goes_on_when_told(store: Store, s3_proxy: FaultProxy) -> None:
    rule = s3_proxy.add(Rule(hang, method="PUT", times=1))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(store.put_if_absent, "a", b"late")
        assert rule.reached(1, seconds=SECONDS)
        assert store.put_if_absent("a", b"early")
        assert not late.done()
        rule.release()
        assert late.result(SECONDS) is False
    assert store.read("a") == b"early"


def test_unreachable_for_a_while(store: Store, s3_proxy: FaultProxy) -> None:
    store.put_if_absent("a", DATA)
    with s3_proxy.unreachable(), pytest.raises(TransientStorageError, match="after 3 attempts"):
        store.read("a")
    assert store.read("a") == DATA
