"""Storage on S3: pages, versions, mistakes that a user can make, and a network that loses answers."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import socket
from collections.abc import Callable
from typing import cast

import pytest

from pipelines.process.retrying import Retries
from pipelines.storage import (
    ObjectArchived,
    ObjectChanged,
    ObjectDenied,
    Store,
    TransientStorageError,
    open_store,
    s3,
    to_local,
)
from pipelines.storage.base import ReadResults
from pipelines.storage.s3 import S3Store
from pspnet_core.errors import ConfigError
from tests.pipelines.storage.test_storage import QUICK, fill, keys, mistake
from tests.support.faultproxy import (
    Exchange,
    Fault,
    FaultProxy,
    Rule,
    forbid,
    hang,
    lose_answer,
    refusal,
    reset,
    slow_down,
    truncate,
)
from tests.support.s3server import S3Server
from tests.support.webserver import Answers, serving, untrusted


def with_header(name: str, fault: Fault) -> Fault:
    """Requests with this header fail; the server answers all others."""

    async def choose(exchange: Exchange) -> None:
        if f"\r\n{name}:".lower().encode() in exchange.request.raw.lower():
            await fault(exchange)
        else:
            answer = await exchange.forward()
            await exchange.reply(answer.head + answer.body)

    return choose


async def accept(exchange: Exchange) -> None:
    """Done, for the version ``0``."""
    await exchange.reply(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\n\r\n')


def ignoring(condition: str) -> Fault:
    """Answer any request with this condition as done, as a storage that does not know it."""
    return with_header(condition, accept)


@pytest.fixture
def store(s3_bucket: str) -> Store:
    return open_store(s3_bucket, field="input", retries=QUICK)


class SmallPages(S3Store):
    """As with 250 times as many keys."""

    page_keys = 4
    level_pages = 4
    parts = 3


class TestListing:
    def test_more_than_a_page(self, s3_bucket: str) -> None:
        store = SmallPages(f"{s3_bucket}/x", field="input", retries=QUICK)
        names = [f"{number:02}.jpg" for number in range(12)]
        fill(store, dict.fromkeys(names, b""))
        assert keys(store) == names
        assert store.put_if_absent("12.jpg", b"")
        assert keys(store) == [*names, "12.jpg"]
        next(store.list())  # a stream may be left half-way

    @pytest.mark.parametrize(("below", "enough", "of_a"), [("/x", 3, [18]), ("", 12, [1, 5, 6, 6])])
    def test_parts_hold_each_object_once(
        self, s3_bucket: str, below: str, enough: int, of_a: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SmallPages, "parts", enough)
        folders = ["", "a", "a/deep", "a/deep/er", "b c#%", "ü/日本", "dt=1", "x+y", ".hidden", "a/.tmp"]
        names = [f"{folder}/{number}.jpg".lstrip("/") for folder in folders for number in range(5)]
        names += [f"many/{number:02}.jpg" for number in range(20)]
        odd = ["a/deep/er/x#1?.jpg", "ü/日本/a b.jpg", "a/deep.jpg", "a/deep-er/1.jpg", "a&b;c/+.jpg", "c//d//e.jpg"]
        store = SmallPages(f"{s3_bucket}{below}", field="input", retries=QUICK)
        open_store(s3_bucket, field="input").put_if_absent("xx/no.txt", b"")
        fill(store, dict.fromkeys(["a/", "a/deep/", *names, *odd], b""))
        parts = [[item.key for item in part if item.key.endswith(".jpg")] for part in store.list_in_parts()]
        assert sorted(key for part in parts for key in part) == sorted(keys(store, suffixes={".jpg"}))
        assert sum(map(len, parts)) == 8 * 5 + 20 + len(odd)
        assert 20 in map(len, parts)  # which holds more than is worth knowing
        assert sorted(len(part) for part in parts if part and part[0].startswith("a/")) == of_a

    @pytest.mark.parametrize("enough", [2, 16])
    def test_a_folder_that_may_not_be_listed_hides_no_other(
        self, enough: int, s3_bucket: str, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(S3Store, "parts", enough)
        store = open_store(s3_bucket, field="input", retries=QUICK)
        fill(store, dict.fromkeys(["a/1.jpg", "secret/2.jpg", "z/3.jpg"], b""))
        s3_proxy.add(Rule(forbid, method="GET", path="prefix=secret/"))
        told: list[str] = []
        parts = store.list_in_parts(lambda uri, error: told.append(uri))
        assert sorted(item.key for part in parts for item in part) == ["a/1.jpg", "z/3.jpg"]
        assert told == [f"{s3_bucket}/secret/"]
        with mistake(f"{s3_bucket}/secret", "may not list it"):
            list(itertools.chain.from_iterable(store.list_in_parts()))

    def test_a_flat_folder_is_one_part(self, s3_bucket: str) -> None:
        store = SmallPages(s3_bucket, field="input", retries=QUICK)
        names = [f"{number:02}.jpg" for number in range(30)]
        fill(store, dict.fromkeys(["deep/99.jpg", *names], b""))
        (part,) = store.list_in_parts()
        assert [item.key for item in part] == keys(store) == [*names, "deep/99.jpg"]

    def test_folder_placeholders_are_no_objects(self, s3_bucket: str) -> None:
        store = SmallPages(f"{s3_bucket}/x", field="input", retries=QUICK)
        assert [item for part in store.list_in_parts() for item in part] == []
        open_store(s3_bucket, field="input").put_if_absent("x/", b"")
        fill(store, {"a/": b"", "a/b": b""})
        assert keys(store) == [item.key for part in store.list_in_parts() for item in part] == ["a/b"]


class TestReading:
    def test_stream_keeps_to_one_version(self, store: Store) -> None:
        item = fill(store, {"a": bytes(1_000_000)})["a"]
        with store.open("a") as file:
            file.read(1)
            store.put_if_match("a", bytes(999_999), item.etag)
            file.seek(900_000)
            with pytest.raises(ObjectChanged):
                file.read(1)

    def test_remote_folder_and_file(self, store: Store) -> None:
        fill(store, {"m/1/config.json": b"{}", "m/1/sub/weights": b"w", "m/10/config.json": b"other"})
        with to_local(f"{store.root}/m/1/", field="model") as folder:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            assert names == ["config.json", "sub/weights"]
            assert (folder / "sub" / "weights").read_bytes() == b"w"
        assert not folder.exists()
        with to_local(f"{store.root}/m/1/sub/weights", field="model") as file:
            assert file.name == "weights"
            assert file.read_bytes() == b"w"
        with to_local(store.root, field="model") as folder:
            assert (folder / "m" / "10" / "config.json").is_file()
        with pytest.raises(ConfigError, match="no file or folder"), to_local(f"{store.root}/m/2", field="model"):
            pass

    def test_no_key_leads_out_of_the_folder(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The listing of a store that allows such keys is played: this server does not take them."""
        (item,) = fill(store, {"m/x": b"x"}).values()
        monkeypatch.setattr(type(store), "list", lambda *_, **__: iter([dataclasses.replace(item, key="a//tmp/x")]))
        outside = pytest.raises(ConfigError, match=r"'a//tmp/x' leads out of its folder: rename it$")
        with outside, to_local(f"{store.root}/m", field="model"):
            pass

    def test_no_secret_travels(self, store: Store) -> None:
        keys(store)
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(store)
        assert len(pickle.dumps(store)) < 1000


def raised(results: ReadResults) -> None:
    """Raise what the first read of some has raised."""
    assert isinstance(results[0], Exception)
    raise results[0]


class TestMistakes:
    def test_missing_bucket(self, s3_bucket: str) -> None:
        store = open_store(f"{s3_bucket}-nope/x", field="input")
        for action in (
            lambda: keys(store),
            lambda: store.read("a"),
            lambda: raised(store.read_many([("a", None)])),
            lambda: store.put_if_absent("a", b""),
            lambda: list(store.list_in_parts()),
            store.check_writable_atomically,
        ):
            with mistake(f"{s3_bucket}-nope/x", "no such bucket"):
                action()

    def test_invalid_bucket(self, s3_bucket: str) -> None:
        with mistake("s3://A_b c", "no valid bucket name"):
            keys(open_store("s3://A_b c", field="input"))

    @pytest.mark.parametrize(
        ("name", "value", "parts"),
        [
            ("AWS_ACCESS_KEY_ID", "wrongwrongwrong", ["access key", "set AWS_ACCESS_KEY_ID"]),
            ("AWS_SECRET_ACCESS_KEY", "wrongwrongwrong", ["secret key", "set AWS_ACCESS_KEY_ID"]),
            ("AWS_PROFILE", "nobody", ["nobody"]),
            ("AWS_ENDPOINT_URL", "localhost:9000", ["localhost:9000"]),
        ],
    )
    def test_wrong_environment(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str, parts: list[str]
    ) -> None:
        assert keys(store) == []
        monkeypatch.setenv(name, value)
        for action in (lambda: keys(store), lambda: raised(store.read_many([("a", None), ("b", None)]))):
            with mistake(store.root, *parts):
                action()

    def test_no_credentials(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with mistake("no credentials", "set AWS_ACCESS_KEY_ID"):
            keys(store)

    def test_insufficient_permissions(self, s3_server: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        requests = [(item.key, item.etag) for item in fill(store, {"a": b"1", "b": b"2"}).values()]
        self.become("reader", s3_server, monkeypatch)
        assert store.read_many(requests) == [b"1", b"2"]
        with mistake(f"{store.root}/c", "may not write"):
            store.put_if_absent("c", b"3")
        self.become("lister", s3_server, monkeypatch)
        assert keys(store) == ["a", "b"]
        with pytest.raises(ObjectDenied, match=r"^Denied: .*/a: these credentials may not read it"):
            store.read("a")
        with pytest.raises(ObjectDenied, match="look at"):
            store.open("a")
        assert all(isinstance(result, ObjectDenied) for result in store.read_many(requests))

    def become(self, role: str, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in server.environment(role).items():
            monkeypatch.setenv(name, value)


class TestFaults:
    def test_archived_objects_are_told_as_such(self, store: Store, s3_proxy: FaultProxy) -> None:
        requests = [(item.key, item.etag) for item in fill(store, {"a": b"1", "b": b"2"}).values()]
        rule = s3_proxy.add(Rule(refusal(403, "InvalidObjectState"), method="GET", path="/[ab]"))
        for result in store.read_many(requests):
            assert isinstance(result, ObjectArchived)
            assert str(result) == f"Denied: {result.uri} is archived: restore it first"
        with store.open("a") as file, pytest.raises(ObjectArchived):
            file.read(1)
        assert len(rule.hits) == 3

    @pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
    def test_ignored_conditions_are_refused(self, store: Store, s3_proxy: FaultProxy, condition: str) -> None:
        store.check_replaces_atomically()
        s3_proxy.add(Rule(ignoring(condition), method="PUT"))
        with mistake(store.root, f"use one that honours {condition}"):
            store.check_replaces_atomically()

    @pytest.mark.parametrize(("condition", "what"), [("If-None-Match", "new objects"), ("If-Match", "to replace")])
    def test_a_store_that_always_refuses_is_told_before_the_work(
        self, store: Store, s3_proxy: FaultProxy, condition: str, what: str
    ) -> None:
        s3_proxy.add(Rule(with_header(condition, refusal(412, "PreconditionFailed")), method="PUT"))
        with mistake(store.root, f"this storage refuses {what}", condition):
            store.check_replaces_atomically()

    def test_no_read_mixes_versions_where_conditions_are_ignored(self, store: Store, s3_proxy: FaultProxy) -> None:
        item = fill(store, {"a": b"1"})["a"]
        s3_proxy.add(Rule(ignoring("If-Match"), method="GET"))
        with store.open("a") as file, pytest.raises(ObjectChanged):
            file.read(1)
        with pytest.raises(ObjectChanged):
            store.read_if("a", item.etag)

    @pytest.mark.parametrize(
        ("status", "code"), [(500, "Strange"), (429, "Strange"), (503, "SlowDown"), (400, "SlowDown")]
    )
    def test_what_may_pass_is_tried_again(self, store: Store, s3_proxy: FaultProxy, status: int, code: str) -> None:
        fill(store, {"a": b"1"})
        s3_proxy.add(Rule(refusal(status, code), method="GET", times=2))
        assert store.read("a") == b"1"
        rule = s3_proxy.add(Rule(refusal(status, code), method="GET"))
        with pytest.raises(TransientStorageError, match=rf"after 3 attempts \({code}\)"):
            store.read("a")
        assert len(rule.hits) == 3

    @pytest.mark.parametrize(
        ("code", "remedy"),
        [
            ("RequestTimeTooSkewed", "clock"),
            ("ExpiredToken", "expired"),
            ("301", "AWS_DEFAULT_REGION"),
            ("Strange", ": the storage refused to list it (Strange: Said so.)"),
        ],
    )
    def test_what_the_user_can_mend_is_told(self, store: Store, s3_proxy: FaultProxy, code: str, remedy: str) -> None:
        rule = s3_proxy.add(Rule(refusal(400, code), method="GET"))
        with mistake(store.root, remedy):
            keys(store)
        assert len(rule.hits) == 1

    def test_a_read_that_hangs(self, store: Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(cast(dict[str, object], s3._S3_CONFIG), "read_timeout", 1)
        fill(store, {"a": b"1"})
        rule = s3_proxy.add(Rule(hang, method="GET", times=1))
        assert store.read("a") == b"1"
        assert len(rule.hits) == 1

    @pytest.mark.parametrize(("fault", "mine"), [(reset, True), (slow_down, True), (lose_answer, False)])
    def test_a_put_is_repeated(self, store: Store, s3_proxy: FaultProxy, fault: Fault, mine: bool) -> None:
        """After a lost answer the retry finds what the first attempt has put."""
        rule = s3_proxy.add(Rule(fault, method="PUT", times=1))
        assert store.put_if_absent("a", b"data") is mine
        assert len(rule.hits) == 1
        assert store.read("a") == b"data"

    def test_lost_answer_of_a_replacement(self, store: Store, s3_proxy: FaultProxy) -> None:
        item = fill(store, {"a": b"old"})["a"]
        rule = s3_proxy.add(Rule(lose_answer, method="PUT", times=1))
        assert store.put_if_match("a", b"new", item.etag)
        assert len(rule.hits) == 1
        assert store.read("a") == b"new"

    @pytest.mark.parametrize("fault", [lose_answer, truncate, reset, slow_down])
    def test_reads_and_listings_are_repeated(self, store: Store, s3_proxy: FaultProxy, fault: Fault) -> None:
        data = os.urandom(50_000)
        item = fill(store, {"a": data})["a"]
        attempts: list[tuple[Callable[[], object], object]] = [
            (lambda: store.read_if("a", item.etag), data),
            (lambda: store.read_many([("a", item.etag)]), [data]),
            (lambda: store.open("a").read(), data),
            (lambda: keys(store), ["a"]),
        ]
        for attempt, expected in attempts:
            rule = s3_proxy.add(Rule(fault, method="GET", times=2))
            assert attempt() == expected
            assert len(rule.hits) == 2

    def test_storage_that_stays_away(self, store: Store, s3_proxy: FaultProxy) -> None:
        fill(store, {"a": b"1", "b": b"2"})
        for action in (
            lambda: keys(store),
            lambda: store.read("a"),
            lambda: raised(store.read_many([("a", None), ("b", None)])),
            lambda: store.put_if_absent("c", b""),
        ):
            s3_proxy.add(Rule(reset))
            with pytest.raises(TransientStorageError, match="after 3 attempts") as caught:
                action()
            assert s3_proxy.endpoint in str(caught.value)
            s3_proxy.clear()
        assert store.read_many([("a", None), ("b", None)]) == [b"1", b"2"]

    def test_nobody_listens(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hidden@127.0.0.1:{port}")
        with pytest.raises(TransientStorageError, match=rf"from http://\*\*\*@127.0.0.1:{port} after 3") as caught:
            keys(store)
        assert "AWS_ENDPOINT_URL" in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_a_certificate_that_cannot_be_verified_is_told_at_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Retries(attempts=12, first_wait=60.0)
    with serving(Answers, untrusted()) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_store(s3_bucket, field="input", retries=patient)
        for act in (lambda: list(store.list()), lambda: store.read("a.jpg")):
            with pytest.raises(ConfigError, match=r"^input=s3:.*certificate of https://127.*set AWS_CA_BUNDLE"):
                act()
