"""Tar archives as they are met: long and odd names, doubled members, damage."""

import gzip
import io
import random
import re
import tarfile
import tracemalloc
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources import SOURCES, archives, read_listed
from pipelines.sources.archives import _Place
from pipelines.storage import Store, TransientStorageError, open_store
from pipelines.storage.local import LocalStore
from pspnet_core.errors import ConfigError, PspnetError
from tests.support import buckets
from tests.support.buckets import outcomes, put, tar
from tests.support.faultproxy import FaultProxy, Rule, forbid
from tests.support.stores import CountingStore

SOURCE = SOURCES["webdataset"]
KINDS = ["x.tar", "x.tar.gz", "x.tgz"]


def members(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    return [(f"{number:03d}.jpg", bytes([number]) * size) for number in range(count)]


def listed(folder: object) -> pa.Table:
    return buckets.listed("webdataset", folder)


def keys(folder: Path) -> list[str]:
    found: list[str] = listed(folder)["key"].to_pylist()
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_every_kind(tmp_path: Path, kind: str, form: int) -> None:
    long = "/".join(["folder" * 10] * 3) + "/a.jpg"
    found = {long: b"long", "top.jpg": b"dot", "abs.png": b"absolute", "deep/1.x.WebP": b"dots", "ümlaut.bmp": b"u"}
    names = [long, "./top.jpg", "/abs.png", "deep/1.x.WebP", "ümlaut.bmp"]
    content = list(zip(names, found.values(), strict=True))
    left_out = [("._top.jpg", b"of a Mac"), ("a/.git/b.jpg", b"hidden"), ("1.txt", b"no image"), ("jpg", b"neither")]
    (tmp_path / kind).write_bytes(tar(content + left_out, kind, form=form))
    table = listed(tmp_path)
    expected = {f"{kind}/{name}": data for name, data in found.items()}
    assert outcomes("webdataset", table) == expected
    assert table["uri"].to_pylist() == [f"{tmp_path}/{key}" for key in expected]


def test_names_that_are_no_utf8_are_spelt_out(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar([("caf\udce9.jpg", b"latin")]))
    assert outcomes("webdataset", listed(tmp_path)) == {"x.tar/caf\\xe9.jpg": b"latin"}


def test_folders_links_and_sparse_files_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (kinds | {"sparse": tarfile.GNUTYPE_SPARSE, "real": tarfile.REGTYPE}).items():
            header = tarfile.TarInfo(f"{name}.jpg")
            header.type, header.linkname, header.size = kind, "real.jpg" if name in kinds else "", 4 * (name == "real")
            archive.addfile(header, io.BytesIO(b"real"))
    assert outcomes("webdataset", listed(tmp_path)) == {"x.tar/real.jpg": b"real"}
    told = f"{tmp_path}/x.tar: link.jpg, hard.jpg, sparse.jpg left out: links, sparse files, or names without end"
    assert caplog.messages == [told]


@pytest.mark.parametrize("kind", KINDS)
def test_doubled_members_are_told(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    content = [("s/1.jpg", b"1"), ("s/1.json", b"{}"), ("s/2.seg.png", b"2"), ("s/1.cls", b"7"), ("s/1.jpg", b"again")]
    (tmp_path / kind).write_bytes(tar(content, kind))
    assert outcomes("webdataset", listed(tmp_path)) == {f"{kind}/s/1.jpg": b"1", f"{kind}/s/2.seg.png": b"2"}
    assert caplog.messages == [f"{tmp_path}/{kind}: s/1.jpg more than once; the first of each name is taken"]


def record(keyword: bytes, value: bytes) -> bytes:
    """A record of an extended header, of which the length counts its own digits."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def extended(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header of these records."""
    info, content = tarfile.TarInfo("x"), b"".join(records)
    info.size, info.type = len(content), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def member(name: str, data: bytes = b"x") -> bytes:
    """A member of an archive, without the mark of an end."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


SAID = {
    "a path of many digits": [extended(record(b"path", b"7" * 110 + b".jpg")) + member("x")],
    "an attribute of many digits": [extended(record(b"SCHILY.xattr.user.x", b"8" * 9000))],
    "a comment of zeros": [extended(record(b"comment", b"0" * 100))],
    "a time of many digits": [extended(record(b"mtime", b"1." + b"0" * 120))],
    "an attribute with a line break": [extended(record(b"LIBARCHIVE.xattr.user.a\nb", b"YWJj"))],
    "what a Mac keeps with a file": [extended(record(b"LIBARCHIVE.xattr.com.apple.ResourceFork", b"A" * 3 * 2**20))],
    "the map of a sparse file": [
        extended(record(b"GNU.sparse.size", b"9"), record(b"GNU.sparse.map", b"0,0," * 2**19 + b"0,0"))
        + member("s.jpg")
    ],
    "commits": [extended(record(b"comment", b"%040x" % n), kind=tarfile.XGLTYPE) + member(".git") for n in range(1500)],
    "one thing for all, in turn": [extended(record(b"linkpath", b"l" * 900), kind=tarfile.XGLTYPE) + member(".x")] * 90,
}


@pytest.mark.parametrize("kind", ["x.tar", "x.tgz"])
@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_members_does_not_end_an_archive(tmp_path: Path, name: str, kind: str) -> None:
    data = b"".join([member("0.jpg"), *SAID[name], member("1.jpg"), member("2.jpg"), bytes(1024)])
    (tmp_path / kind).write_bytes(data if kind == "x.tar" else gzip.compress(data, 1))
    digits = ["7" * 110 + ".jpg"] * (name == "a path of many digits")
    expected = {f"{kind}/{name}": b"x" for name in ["0.jpg", *digits, "1.jpg", "2.jpg"]}
    assert outcomes("webdataset", listed(tmp_path)) == expected


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("charset", [b"BINARY", b"ISO-IR 10646 2000 UTF-8", b""])
def test_names_of_either_charset(tmp_path: Path, charset: bytes, is_shared: bool) -> None:
    told, path = record(b"hdrcharset", charset), record(b"path", "ü.jpg".encode())
    header = extended(told, kind=tarfile.XGLTYPE) + extended(path) if is_shared else extended(path, told)
    (tmp_path / "x.tar").write_bytes(header + member("x") + bytes(1024))
    assert keys(tmp_path) == ["x.tar/ü.jpg"]


def test_a_name_of_a_million_digits_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(extended(record(b"path", b"7" * 10**6)) + member("x") + member("1.jpg"))
    assert keys(tmp_path) == ["x.tar/1.jpg"]


def damaged(kind: str, how: str) -> bytes:
    """An archive of 20 members, whole up to the fifth at least."""
    whole = tar(members(20), "x.tar")
    step = 3 * tarfile.BLOCKSIZE  # header and two blocks of data
    if how == "ends in a member":
        data = whole[: 10 * step + 600]
    elif how == "ends between members":
        data = whole[: 10 * step]
    elif how == "bad header":
        data = whole[: 10 * step] + b"\xff" * step + whole[11 * step :]
    else:
        data = whole
    if kind != "x.tar":
        data = gzip.compress(data)
    return data[: len(data) * 3 // 4] if how == "cut off" else data


@pytest.mark.parametrize("how", ["ends in a member", "ends between members", "bad header", "cut off"])
@pytest.mark.parametrize("kind", ["x.tar", "x.tgz"])
def test_images_before_damage_are_found(tmp_path: Path, kind: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / kind).write_bytes(damaged(kind, how))
    (tmp_path / "whole.tar").write_bytes(tar(members(2)))
    table = listed(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/{kind} is damaged (")
    found = outcomes("webdataset", table)
    assert [found.pop(f"whole.tar/{name}") for name, _ in members(2)] == [data for _, data in members(2)]
    content = {f"{kind}/{name}": data for name, data in members(20)}
    assert len(found) >= 5
    # At most the last one, in which the damage lies, has a header and no bytes.
    *whole, last = found
    assert {key: found[key] for key in whole} == {key: content[key] for key in whole}
    assert found[last] in (content[last], "Truncated")


@pytest.mark.parametrize("data", [b"", b"no archive at all", b"\x1f\x8b\x08" + b"\0" * 100, b"x" * 5000])
@pytest.mark.parametrize("kind", ["x.tar", "x.tgz"])
def test_what_is_no_archive_is_told(tmp_path: Path, kind: str, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / kind).write_bytes(data)
    assert keys(tmp_path) == []
    assert "is damaged" in caplog.text


def test_a_member_that_claims_a_negative_size_ends_the_walk(tmp_path: Path) -> None:
    data = bytearray(tar(members(2)))
    header = data[: tarfile.BLOCKSIZE]
    header[124:136] = b"\xff" * 11 + b"\x00"  # base 256, negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(data[tarfile.BLOCKSIZE :]))
    assert keys(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_header_that_claims_a_negative_size_ends_the_walk(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / kind, "w" if kind == "x.tar" else "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members(3):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name == "001.jpg":
                member.pax_headers = {"size": "-3000"}
            archive.addfile(member, io.BytesIO(data))
    assert keys(tmp_path) == [f"{kind}/000.jpg"]


def test_an_archive_of_several_gzip_streams_is_read_to_its_end(tmp_path: Path) -> None:
    whole = tar(members(4))
    (tmp_path / "x.tgz").write_bytes(gzip.compress(whole[:4000]) + gzip.compress(whole[4000:]))
    assert list(outcomes("webdataset", listed(tmp_path)).values()) == [data for _, data in members(4)]


@pytest.mark.parametrize("is_open", [False, True])
def test_an_archive_that_goes_while_it_is_listed_is_left_to_the_next_run(
    is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be all that was in its folder."""
    (tmp_path / "a.tar").write_bytes(tar(members(2)))
    opened = LocalStore.open

    def vanishing(store: Store, path: str) -> BinaryIO:
        stream = opened(cast(LocalStore, store), path) if is_open else None
        store.delete(path)
        return stream or opened(cast(LocalStore, store), path)

    monkeypatch.setattr(LocalStore, "open", vanishing)
    table = listed(tmp_path)
    (tmp_path / "other").touch()  # or reading would take the folder for one that is not mounted
    assert outcomes("webdataset", table) == dict.fromkeys(["a.tar/000.jpg", "a.tar/001.jpg"] * is_open, "Missing")
    assert ("the 2 images before that are listed" if is_open else "left to the next run") in caplog.text


NESTED = {"x.tar/y.tgz/1.jpg": b"1", "x.tar/z.tar/y.tgz/1.jpg": b"2", "z.tar/1.jpg": b"3"}


def nested(root: str) -> tuple[Store, pa.Table]:
    """Archives in folders that are named like archives, and their listing."""
    store = open_store(root, field="input")
    put(store, "x.tar/y.tgz", tar([("1.jpg", b"1")], "y.tgz"))
    put(store, "x.tar/z.tar", tar([("y.tgz/1.jpg", b"2")]))
    put(store, "z.tar", tar([("1.jpg", b"3")]))
    return store, listed(store.root)


def test_folders_may_be_named_like_archives(tmp_path: Path) -> None:
    store, table = nested(str(tmp_path))
    assert outcomes("webdataset", table) == NESTED
    store.delete("x.tar/z.tar")
    assert outcomes("webdataset", table) == NESTED | {"x.tar/z.tar/y.tgz/1.jpg": "Missing"}


@pytest.mark.parametrize("name", ["x.tar/y.tgz", "x.tar/z.tar"])
def test_one_of_folders_named_like_archives_may_be_denied(name: str, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    _, table = nested(s3_bucket)
    assert outcomes("webdataset", table) == NESTED
    s3_proxy.add(Rule(forbid, method="HEAD", path=rf"/{re.escape(name)}$"))
    denied = {key: "Denied" if key.startswith(name) else data for key, data in NESTED.items()}
    assert outcomes("webdataset", table) == denied


def test_of_a_plain_archive_little_more_than_the_wanted_members_is_read(tmp_path: Path) -> None:
    size = 300_000
    (tmp_path / "x.tar").write_bytes(tar(members(60, size)))
    store = CountingStore(tmp_path)
    archive = store.stat("x.tar")
    assert archive
    wanted = [f"{number:03d}.jpg" for number in (3, 4, 5, 40)]
    found = archives._take(store, "x.tar", archive.etag, wanted, threads=2)
    assert found == {name: data for name, data in members(60, size) if name in wanted}
    assert store.read_bytes < 4 * size + 60_000


@pytest.mark.parametrize("error", [ConfigError("input", "x", "expired"), TransientStorageError("no answer")])
@pytest.mark.parametrize("kind", KINDS)
def test_failing_is_no_damage(tmp_path: Path, kind: str, error: PspnetError, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(0)  # which does not shrink
    (tmp_path / kind).write_bytes(tar([(name, noise.randbytes(9000)) for name, _ in members(3)], kind))
    table = listed(tmp_path)

    class Failing(io.FileIO):
        def readinto(self, buffer: object) -> int | None:
            if self.tell() >= 512:
                raise error
            return super().readinto(memoryview(buffer)[:512])  # type: ignore[arg-type]

        def read(self, size: int | None = -1, /) -> bytes:
            buffer = bytearray(512 if size is None or size < 0 else min(size, 512))
            return bytes(buffer[: self.readinto(buffer)])

    monkeypatch.setattr(LocalStore, "open", lambda store, path: Failing(f"{tmp_path}/{path}"))
    assert all(result is error for result in SOURCE.read(table, threads=1))
    monkeypatch.setattr(LocalStore, "trouble", lambda store: error)
    with pytest.raises(type(error)):
        read_listed(SOURCE, table, inputs=[str(tmp_path)])
    if isinstance(error, TransientStorageError):
        with pytest.raises(TransientStorageError):
            listed(tmp_path)


@pytest.mark.parametrize("kind", ["x.tar", "x.tgz"])
def test_an_archive_is_never_held_whole(tmp_path: Path, kind: str) -> None:
    noise = random.Random(0)
    content = [(name, noise.randbytes(2**20)) for name, _ in members(12)]
    (tmp_path / kind).write_bytes(tar(content, kind))
    tracemalloc.start()
    try:
        table = listed(tmp_path)
        assert outcomes("webdataset", table.slice(9, 1)) == {f"{kind}/009.jpg": content[9][1]}
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 6 * 2**20  # a copy or two of the member


@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 5_000_000)), max_size=30))
def test_spans_cover_all_members_and_stay_small(gaps: list[tuple[int, int]]) -> None:
    places: dict[str, _Place] = {}
    end = 0
    for number, (gap, size) in enumerate(gaps):
        places[f"{number}"] = _Place(end + gap, end + gap + size)
        end += gap + size
    spans = list(archives._spans(places))
    assert [name for span in spans for name in span] == list(places)
    for span in spans:
        places_of = list(span.values())
        assert len(span) == 1 or places_of[-1].stop - places_of[0].start <= archives.SPAN
