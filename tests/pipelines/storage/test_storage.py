"""Storage: the same promises on local disk and on a real S3 server; what is particular to disks and drivers."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import functools
import http.server
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.process.retrying import Retries
from pipelines.storage import (
    ATOMIC_SCHEMES,
    ObjectChanged,
    ObjectDenied,
    ObjectMissing,
    Store,
    StoredObject,
    TransientStorageError,
    open_store,
    to_local,
)
from pspnet_core.errors import ConfigError
from pspnet_core.paths import inside
from tests.support.buckets import parquet
from tests.support.poisons import web_server
from tests.support.webserver import Answers, serving, untrusted

QUICK = Retries(attempts=3, first_wait=0, longest_wait=0, jitter=0)
AWKWARD = ["plain.jpg", "a b/c d.jpg", "ä/日本.jpg", "100%/%41.jpg", "x#y/z?versionId=1.jpg", "a+b=c&d;e,f@g!.jpg"]
AWKWARD += ["model=net-1/dt=2024-01-01/0.parquet", "quote'\"/<tag>.jpg", "[1-9]*/{x}.jpg", "é:$|^`~_-./(a)!'.b"]
USER = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and list everything")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place that exists, in a folder with an awkward name."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/in put/ü=1"
    folder = tmp_path / "in put" / "ü=1"
    folder.mkdir(parents=True)
    return str(folder)


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root, field="input", retries=QUICK)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), field="input", retries=QUICK)


def fill(store: Store, contents: Mapping[str, bytes]) -> dict[str, StoredObject]:
    for path, data in contents.items():
        assert store.put_if_absent(path, data)
    return {item.key: item for item in store.list()}


def keys(store: Store, prefix: str = "", suffixes: set[str] | None = None) -> list[str]:
    return [item.key for item in store.list(prefix, suffixes)]


@contextlib.contextmanager
def mistake(*parts: str) -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """What is done in the context ends with the field, its value, a remedy, and no secret."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    text = str(caught.value)
    assert text.startswith("input=")
    assert all(part in text for part in parts), text
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "unset") not in text


class TestListing:
    def test_describes_every_object(self, store: Store) -> None:
        before = datetime.now(timezone.utc) - timedelta(seconds=5)
        (item,) = fill(store, {"deep/er/a.jpg": b"12345"}).values()
        assert (item.uri, item.key, item.bytes) == (f"{store.root}/deep/er/a.jpg", "deep/er/a.jpg", 5)
        assert item.etag
        assert '"' not in item.etag
        assert item.modified is not None
        assert before < item.modified < datetime.now(timezone.utc) + timedelta(seconds=5)
        assert item == store.stat("deep/er/a.jpg")

    def test_is_sorted_recursive_and_leaves_out_what_is_hidden(self, store: Store) -> None:
        names = ["a.JPG", "b/a.jpg", "b/c/d.jpeg", "b/d.txt", "bc/x.jpg", "jpg"]
        fill(store, dict.fromkeys([".hidden.jpg", ".tmp/a.jpg", "b/.git/b.jpg", "b/.z", *reversed(names)], b""))
        assert keys(store) == names
        assert keys(store, suffixes={".jpg", ".JPEG"}) == ["a.JPG", "b/a.jpg", "b/c/d.jpeg", "bc/x.jpg"]
        assert keys(store, "b") == keys(store, "b/") == names[1:4]
        assert keys(store, "none") == []

    def test_key_order_on_disk_is_that_of_whole_keys(self, local: Store) -> None:
        names = ["a/z", "a b", "a-b", "a.b", "a0", "é", "z", "Z", "日", "back\\slash"]
        fill(local, dict.fromkeys(names, b""))
        assert keys(local) == sorted(names, key=str.encode)


class TestAwkwardNames:
    def test_round_trip(self, store: Store) -> None:
        contents = {name: name.encode() for name in AWKWARD} | {"empty": b"", "large": os.urandom(300_000)}
        found = fill(store, contents)
        assert found.keys() == contents.keys()
        for name, item in found.items():
            assert store.read(item.key) == contents[name]
            parent, _, last = item.uri.rpartition("/")
            assert open_store(parent, field="input").read_if(last, item.etag) == contents[name]
            if "?versionId=" in name:  # s3fs takes that for a version, so its users must do without such keys
                continue
            with store.filesystem.open(store.path_of(name), "rb") as file:
                assert file.read() == contents[name]

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    @given(
        st.lists(
            st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
            .filter(lambda part: not part.startswith("."))
            .filter(lambda part: len(part.encode()) < 200),
            min_size=1,
            max_size=4,
        ).map("/".join)
    )
    def test_any_key_round_trips_on_disk(self, tmp_path: Path, key: str) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            store = open_store(folder, field="input")
            assert store.put_if_absent(key, b"data")
            (item,) = store.list()
            assert item.key == key
            assert item.uri == f"{folder}/{key}"
            assert store.read_if(key, item.etag) == b"data"

    def test_a_name_that_is_not_utf8_is_told(self, local: Store) -> None:
        Path(os.fsdecode(os.fsencode(local.root) + b"/\xff.jpg")).write_bytes(b"")
        with mistake(local.root, "not UTF-8"):
            keys(local)


class TestReading:
    def test_missing(self, store: Store) -> None:
        with pytest.raises(ObjectMissing, match=r"^Missing: there is no .*nope\.jpg"):
            store.read("nope.jpg")
        with pytest.raises(ObjectMissing):
            store.read_if("nope.jpg", "0-0")
        with pytest.raises(ObjectMissing):
            store.open("nope.jpg")
        fill(store, {"a/b.jpg": b""})
        with pytest.raises(ObjectMissing):
            store.read("a")
        for path in ("nope.jpg", "a"):  # a folder is no object
            assert not store.exists(path)
            assert store.stat(path) is None

    def test_changed(self, store: Store) -> None:
        old = fill(store, {"a.jpg": b"old"})["a.jpg"]
        assert store.put_if_match("a.jpg", b"newer", old.etag)
        with pytest.raises(ObjectChanged, match=r"^Changed: .*a\.jpg has changed") as caught:
            store.read_if("a.jpg", old.etag)
        assert caught.value.uri == old.uri
        new = store.stat("a.jpg")
        assert new is not None
        assert store.read_if("a.jpg", new.etag) == b"newer"

    def test_many_in_order_with_reasons(self, store: Store) -> None:
        contents = {f"{number}.bin": bytes([number]) * number for number in range(1, 80)}
        found = fill(store, contents)
        assert store.put_if_match("7.bin", b"other", found["7.bin"].etag)
        requests: list[tuple[str, str | None]] = [(item.key, item.etag) for item in found.values()]
        *results, missing, any_version = store.read_many([*requests, ("gone", "0-0"), ("8.bin", None)], threads=7)
        for (key, _), result in zip(requests, results, strict=True):
            assert isinstance(result, ObjectChanged) if key == "7.bin" else result == contents[key]
        assert isinstance(missing, ObjectMissing)
        assert any_version == contents["8.bin"]
        for threads in (1, 100):
            assert store.read_many([], threads=threads) == []
            assert store.read_many([("8.bin", None)], threads=threads) == [contents["8.bin"]]

    def test_stream_can_be_read_in_parts(self, store: Store) -> None:
        data = os.urandom(1_000_000)
        fill(store, {"a": data, "empty": b""})
        with store.open("a") as file:
            assert file.read(10) == data[:10]
            assert file.seek(-20, os.SEEK_END) == len(data) - 20
            assert file.read() == data[-20:]
            assert file.read(1) == b""
            file.seek(500_000)
            assert file.read(7) == data[500_000:500_007]
            assert file.tell() == 500_007
            file.seek(0)
            assert file.read() == data
        with store.open("empty") as file:
            assert file.read() == b""

    def test_stream_serves_parquet(self, store: Store) -> None:
        table = pa.table({"x": range(1000)})
        fill(store, {"a.parquet": parquet(table, row_group_size=100)})
        with store.open("a.parquet") as file:
            assert pq.ParquetFile(file).read_row_group(3).equals(table.slice(300, 100))
        assert pq.read_table(store.path_of("a.parquet"), filesystem=store.filesystem).equals(table)


class TestWriting:
    def test_twenty_at_once_and_one_wins(self, store: Store) -> None:
        barrier = threading.Barrier(20)

        def put(number: int) -> bool:
            barrier.wait()
            return store.put_if_absent("race/a.bin", bytes([number]) * 200_000)

        with ThreadPoolExecutor(20) as pool:
            wins = list(pool.map(put, range(20)))
        assert sum(wins) == 1
        assert store.read("race/a.bin") == bytes([wins.index(True)]) * 200_000

    def test_put_if_match(self, store: Store) -> None:
        first = fill(store, {"a": b"one"})["a"]
        assert store.put_if_match("a", b"three", first.etag)
        assert not store.put_if_match("a", b"other", first.etag)
        assert store.put_if_match("a", b"three", first.etag), "what should be there is there"
        assert not store.put_if_match("gone", b"x", first.etag)
        assert store.read("a") == b"three"
        assert keys(store) == ["a"]

    def test_twenty_replace_and_one_wins(self, store: Store) -> None:
        first = fill(store, {"a": b"one"})["a"]
        with ThreadPoolExecutor(20) as pool:
            wins = list(pool.map(lambda n: store.put_if_match("a", bytes([n]) * 1000, first.etag), range(20)))
        assert sum(wins) == 1
        assert store.read("a") == bytes([wins.index(True)]) * 1000

    def test_delete(self, store: Store) -> None:
        fill(store, {"a/b/one": b"1", "a/two": b"2"})
        store.delete("a/b/one")
        store.delete("a/b/one")
        store.delete("never/there")
        assert keys(store) == ["a/two"]
        assert not store.exists("a/b/one")
        assert store.put_if_absent("a/b/one", b"again")
        assert store.read("a/b/one") == b"again"

    def test_a_folder_that_is_deleted_meanwhile_is_made_again(self, store: Store) -> None:
        def work(number: int) -> bool:
            created = all(store.put_if_absent(f"race/deep/{number}-{turn}", b"x") for turn in range(20))
            for turn in range(20):
                store.delete(f"race/deep/{number}-{turn}")
            return created

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
        assert keys(store) == []

    def test_check_writable_atomically_leaves_nothing_to_see(self, root: str) -> None:
        for _ in range(2):
            store = open_store(f"{root}/new/er", field="output")
            store.check_writable_atomically()
            assert keys(store) == []

    def test_a_failed_write_leaves_no_trace(self, local: Store) -> None:
        fill(local, {"file": b""})
        with mistake("a file is in the way"):
            local.put_if_absent("file/a", b"x")
        assert keys(local) == ["file"]

    def test_left_overs_of_killed_writers_are_swept(self, local: Store, tmp_path: Path) -> None:
        old, fresh = ".tmp/" + "0" * 32, ".tmp/" + "1" * 32
        fill(local, {old: b"", fresh: b""})
        os.utime(tmp_path / old, (0, 0))
        local.check_writable_atomically()
        assert (local.exists(old), local.exists(fresh)) == (False, True)

    @pytest.mark.parametrize("replaces", [False, True])
    def test_a_file_that_is_being_written_is_not_swept_whatever_the_clock_says(
        self, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
    ) -> None:
        etag = fill(local, {"a": b"old"})["a"].etag
        own, later = os.fsync, time.time() + 90_000

        def sweep_meanwhile(descriptor: int) -> None:
            own(descriptor)
            if threading.current_thread() is threading.main_thread():
                with monkeypatch.context() as context, ThreadPoolExecutor(1) as other:
                    context.setattr(time, "time", lambda: later)
                    other.submit(open_store(str(tmp_path), field="output").check_writable_atomically).result()

        monkeypatch.setattr(os, "fsync", sweep_meanwhile)
        assert local.put_if_match("a", b"new", etag) if replaces else local.put_if_absent("b", b"new")
        assert local.read("a" if replaces else "b") == b"new"

    @pytest.mark.parametrize("replaces", [False, True])
    def test_what_somebody_deletes_before_it_has_its_name_is_written_again(
        self, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
    ) -> None:
        etag = fill(local, {"a": b"old"})["a"].etag
        function = "replace" if replaces else "link"
        own, times = getattr(os, function), iter([True])

        def deleted_before(source: str, target: str) -> None:
            if next(times, False):
                os.unlink(source)
            own(source, target)

        monkeypatch.setattr(os, function, deleted_before)
        assert local.put_if_match("a", b"new", etag) if replaces else local.put_if_absent("b", b"new")
        assert local.read("a" if replaces else "b") == b"new"

    def test_the_lock_of_one_user_does_not_stop_the_next(self, local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        etag = fill(local, {"a": b"old"})["a"].etag
        assert local.put_if_match("a", b"mine", etag)
        own = os.open

        def of_another_user(path: str, flags: int, *mode: int, **more: int) -> int:
            if str(path).endswith("replace.lock") and flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return own(path, flags, *mode, **more)

        monkeypatch.setattr(os, "open", of_another_user)
        assert local.put_if_match("a", b"theirs", next(local.list()).etag)
        assert local.read("a") == b"theirs"

    def test_a_lock_that_a_server_gives_its_owner_only_is_told(
        self, local: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over NFS a lock is one of bytes, for which the file has to be open for writing."""
        etag = fill(local, {"a": b"old"})["a"].etag

        def refuse(file: object, operation: int) -> None:
            if operation == fcntl.LOCK_EX:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with mistake("another user made replace.lock"):
            local.put_if_match("a", b"new", etag)


class TestLocalFolders:
    def test_links_are_followed_and_loops_end(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        inside = tmp_path / "inside"
        for folder in (outside / "deep", inside / "own"):
            folder.mkdir(parents=True)
        (outside / "deep" / "a.jpg").write_bytes(b"a")
        (inside / "folder").symlink_to(outside)
        (inside / "file.jpg").symlink_to(outside / "deep" / "a.jpg")
        (inside / "own" / "up").symlink_to(inside)
        (inside / "self").symlink_to(inside / "self")
        store = open_store(str(inside), field="input")
        assert keys(store, suffixes={".jpg"}) == ["file.jpg", "folder/deep/a.jpg"]
        assert store.read("folder/deep/a.jpg") == b"a"

    def test_a_broken_link_is_listed_and_missing_and_a_pipe_is_no_file(self, local: Store, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "a.jpg").symlink_to(tmp_path / "nowhere")
        (item,) = local.list()
        assert isinstance(local.read_many([(item.key, item.etag)])[0], ObjectMissing)

    def test_a_folder_that_vanishes_meanwhile_holds_nothing(self, local: Store, tmp_path: Path) -> None:
        fill(local, {"a/1": b"", "b/1": b"", "c": b""})
        listing = local.list()
        assert next(listing).key == "a/1"
        (tmp_path / "b" / "1").unlink()
        (tmp_path / "b").rmdir()
        (tmp_path / "c").unlink()
        assert list(listing) == []

    def test_change_while_reading_is_noticed_by_time_too(self, local: Store, tmp_path: Path) -> None:
        item = fill(local, {"a": b"same"})["a"]
        os.utime(tmp_path / "a", ns=(1, 1))
        with pytest.raises(ObjectChanged):
            local.read_if("a", item.etag)

    @USER
    def test_denied_files(self, local: Store, tmp_path: Path) -> None:
        requests = [(item.key, item.etag) for item in fill(local, {"a": b"1", "b": b"2"}).values()]
        (tmp_path / "a").chmod(0)
        denied, fine = local.read_many(requests)
        assert isinstance(denied, ObjectDenied)
        assert fine == b"2"
        (tmp_path / "b").chmod(0)
        assert all(isinstance(result, ObjectDenied) for result in local.read_many(requests))

    @USER
    def test_a_denied_folder_is_told(self, local: Store, tmp_path: Path) -> None:
        fill(local, {"a/1": b"", "b/1": b""})
        (tmp_path / "b").chmod(0)
        try:
            with mistake(f"{tmp_path}/b: may not be used"):
                keys(local)
        finally:
            (tmp_path / "b").chmod(0o700)

    def test_paths_stay_inside(self, local: Store) -> None:
        with pytest.raises(ObjectDenied, match="leads out of its folder"):
            local.read("../x")

    def test_forms_of_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path.parent)
        path, name = str(tmp_path), tmp_path.name
        for uri in (path, f"{path}/", f"file://{path}", f"FILE://{path}/", f"{path}/../{name}", name):
            assert open_store(uri, field="input").root == path
        assert open_store("file:///", field="input").uri_of("etc/x") == "/etc/x"


@given(st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "\0", "tmp", " ", "~", "C:"]), min_size=1).map("/".join))
def test_no_key_leads_out_of_a_folder(key: str) -> None:
    folder = Path("/a/folder")
    try:
        target = inside(folder, key)
    except ValueError:
        assert {"..", ".", "", "\0"} & set(key.split("/"))
    else:
        assert os.path.normpath(target) == str(target) == f"{folder}/{key}"


class TestMistakes:
    @pytest.mark.parametrize("uri", ["", "s3://", "file://", "s3:///"])
    def test_incomplete(self, uri: str) -> None:
        with mistake("give a folder"):
            open_store(uri, field="input")

    def test_schemes_without_a_driver(self) -> None:
        for uri, remedy in (("https://me:hushhush@host/x", "~/.netrc"), ("ftp://me:hushhush@host", "FSSPEC_FTP_")):
            with mistake("***@host", f"holds a password, which would be kept: put it into {remedy}") as caught:
                open_store(uri, field="input")
            assert "hushhush" not in str(caught.value)
        with mistake("htps://host/x", "unknown scheme"):
            open_store("htps://host/x", field="input")
        with mistake("not installed", "adlfs"):
            open_store("abfs://container/x", field="input")

    def test_no_folder(self, tmp_path: Path) -> None:
        with mistake(f"{tmp_path}/nope", "no such folder"):
            keys(open_store(f"{tmp_path}/nope", field="input"))
        assert keys(open_store(f"{tmp_path}/nope", field="input"), "masks") == []
        (tmp_path / "a").write_bytes(b"")
        with mistake("is no folder"):
            keys(open_store(f"{tmp_path}/a", field="input"))


def test_stores_and_errors_travel(store: Store) -> None:
    fill(store, {"a": b"1"})
    assert pickle.loads(pickle.dumps(store)).read_many([("a", None)]) == [b"1"]
    for error in (ObjectChanged("u"), ObjectMissing("u", "m"), TransientStorageError("m")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_a_file_that_has_grown_beyond_memory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = open_store(str(tmp_path), field="input")
    (item,) = store.list()
    os.truncate(tmp_path / "a", 2**43)
    (result,) = store.read_many([("a", item.etag)])
    assert isinstance(result, ObjectChanged)


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"w")
    for path in (tmp_path, tmp_path / "weights.pth"):
        with to_local(f"file://{path}", field="model") as found:
            assert found == path
    with pytest.raises(ConfigError, match=r"^model=.*nope: no such file"), to_local(f"{tmp_path}/nope", field="model"):
        pass


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class TestOtherDrivers:
    @pytest.fixture
    def memory(self) -> Iterator[str]:
        files = fsspec.filesystem("memory")
        files.pipe({"/things/a.jpg": b"1", "/things/b/c.jpg": b"22", "/things/.d/e.jpg": b"3"})
        yield "memory://things"
        files.rm("/things", recursive=True)

    def test_can_be_read(self, memory: str) -> None:
        store = pickle.loads(pickle.dumps(open_store(memory, field="input")))
        found = {item.key: item for item in store.list(suffixes={".jpg"})}
        assert {item.uri: item.bytes for item in found.values()} == {f"{memory}/a.jpg": 1, f"{memory}/b/c.jpg": 2}
        etag = found["a.jpg"].etag
        fsspec.filesystem("memory").pipe("/things/b/c.jpg", b"new")
        results = store.read_many([("a.jpg", etag), ("b/c.jpg", found["b/c.jpg"].etag), ("gone", None)])
        assert results[0] == b"1"
        assert [type(result) for result in results[1:]] == [ObjectChanged, ObjectMissing]
        assert keys(store, "b") == ["b/c.jpg"]
        with store.open("a.jpg") as file:
            assert file.read() == b"1"

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("404/x", "Missing: "),
            ("410/x", "Missing: "),
            ("403/x", "Denied: "),
            ("451/x", "Denied: .*refused to give .*451"),
            ("503/x", "http.*no good answer after 3 attempts"),
            ("200/endless", "TooLarge: "),
            ("302/x", "Denied: .*redirects to http://169.254.169.254"),
        ],
    )
    def test_what_web_servers_answer(self, path: str, expected: str) -> None:
        with web_server() as url:
            (result,) = open_store(url, field="input", retries=QUICK).read_many([(path, None, 2**20)])
        assert re.match(expected, str(result))

    def test_passwords_of_web_servers_are_those_of_netrc(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Guarded(Quiet):
            def do_GET(self) -> None:
                known = self.headers.get("Authorization") == f"Basic {base64.b64encode(b'me:hushhush').decode()}"
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", "0")
                self.end_headers()

        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hushhush")
        (tmp_path / "netrc").chmod(0o600)
        with serving(Guarded) as url:
            for file, expected in (("none", "Denied: "), ("netrc", "b''")):
                monkeypatch.setenv("NETRC", str(tmp_path / file))
                (result,) = open_store(url, field="input", retries=QUICK).read_many([("a", None)])
                assert str(result).startswith(expected)

    def test_a_certificate_that_cannot_be_verified_is_told_at_once(self) -> None:
        patient = Retries(attempts=12, first_wait=60.0)
        with serving(Answers, untrusted()) as url:
            (result,) = open_store(url, field="input", retries=patient).read_many([("a.jpg", None)])
        assert re.match("Denied: the certificate of its server cannot be verified: set SSL_CERT_FILE", str(result))

    def test_a_folder_must_be_there_and_be_listed(self, memory: str) -> None:
        with mistake("memory://nothing", "no such folder"):
            keys(open_store("memory://nothing", field="input"))
        fsspec.filesystem("memory").mkdir("/things/empty")
        assert keys(open_store(f"{memory}/empty", field="input")) == []
        with web_server() as url, mistake(f"{url}/403", "check the credentials"):
            keys(open_store(f"{url}/403", field="input"))

    def test_are_refused_for_writing(self, memory: str) -> None:
        for refused in (
            lambda: open_store(memory, field="output", writable=True),
            lambda: open_store(memory, field="output").check_writable_atomically(),
        ):
            with pytest.raises(ConfigError, match=r"^output=memory://things: .*file://, s3://"):
                refused()

    def test_are_walked_folder_by_folder(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        files = fsspec.filesystem("memory")
        names = ["a b.jpg", "a-b.jpg", "b/a.jpg", "b/z/ü#1.jpg", "b0.jpg", "c/d/e/f.jpg"]
        files.pipe({f"/things/{name}": b"x" for name in names})
        files.mkdir("/things/empty")
        asked: list[str] = []
        ls = type(files).ls

        def noted(self: object, path: str, *args: bool, **how: bool) -> object:
            asked.append(path)
            return ls(self, path, *args, **how)

        monkeypatch.setattr(type(files), "ls", noted)
        listing = open_store(memory, field="input").list()
        assert next(listing).key == "a b.jpg"
        assert asked == ["/things", "/things/.d"]
        assert [item.key for item in listing] == sorted([*names, "a.jpg", "b/c.jpg"])[1:]

    def test_of_a_server_that_links_to_its_files(self, local: Store, tmp_path: Path) -> None:
        fill(local, {name: name.encode() for name in ("a.jpg", "b c/d.jpg", "b c/deep/e.jpg")})
        with serving(functools.partial(Quiet, directory=str(tmp_path))) as root:
            found = {item.key: item.bytes for item in open_store(root, field="input", retries=QUICK).list()}
            for nowhere in (f"{root}/nope", "memory://nope"):
                with mistake(nowhere, "no such folder"):
                    keys(open_store(nowhere, field="input", retries=QUICK))
        assert found == {"a.jpg": 5, "b%20c/d.jpg": 9, "b%20c/deep/e.jpg": 14}


@pytest.mark.parametrize(("scheme", "name"), [("file", "LocalStore"), ("s3", "S3Store"), ("s3a", "S3Store")])
def test_every_writable_scheme_opens_its_store(scheme: str, name: str) -> None:
    assert scheme in ATOMIC_SCHEMES
    assert type(open_store(f"{scheme}://bucket/a/", field="output", writable=True)).__name__ == name


def test_local_paths_load_no_driver_of_another_storage() -> None:
    script = (
        "import sys\n"
        "from pipelines.storage import open_store\n"
        "open_store('/', field='input').read_many([('etc/hosts', None)])\n"
        "assert not {'aiobotocore', 'aiohttp', 's3fs'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
