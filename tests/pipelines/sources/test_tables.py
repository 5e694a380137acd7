"""Parquet files and manifests as they are met: every spelling of a column, what is missing, what is damaged."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.label_table.ledger import PlanSpec
from pipelines.label_table.listing import spool
from pipelines.label_table.schema import LISTING
from pipelines.labelling.stages.chunks import fetch
from pipelines.process.retrying import Retries
from pipelines.sources import SOURCES, Inputs, base
from pipelines.sources import manifests as manifests_module
from pipelines.storage import open_store
from pspnet_core.errors import ConfigError
from tests.pipelines.storage.test_storage import Quiet, mistake
from tests.support.buckets import DATE, LATER, listed, outcomes, parquet, put
from tests.support.faultproxy import FaultProxy, Rule, forbid
from tests.support.poisons import web_server
from tests.support.webserver import serving

DATA = [b"one" * 9, b"two" * 8, b"three" * 7]
COLUMNS = {
    "bytes": {"bytes": pa.array(DATA)},
    "large": {"image": pa.array(DATA, pa.large_binary())},
    "struct bytes": {"bytes": pa.array([{"bytes": data} for data in DATA])},
    "beside others": {"path": ["a", "b", "c"], "bytes": pa.array([1, 2, 3]), "image": pa.array(DATA), "uri": ["u"] * 3},
}


@pytest.mark.parametrize("columns", COLUMNS)
def test_columns_of_images(columns: str, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table(COLUMNS[columns]), row_group_size=2))
    assert outcomes("parquet", listed("parquet", tmp_path)) == {f"x.parquet/{row}": DATA[row] for row in range(3)}


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_with_keys_of_their_own(kind: pa.DataType, tmp_path: Path) -> None:
    keys = pa.array([7, None, 9]).cast(pa.string()).cast(kind)
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"key": keys, "image": DATA})))
    found = outcomes("parquet", listed("parquet", tmp_path))
    assert found == {"x.parquet/7": DATA[0], "x.parquet/1": DATA[1], "x.parquet/9": DATA[2]}


def test_of_rows_with_one_key_the_first_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"key": ["a", "b", "a"], "image": DATA})))
    table = listed("parquet", tmp_path)
    assert outcomes("parquet", table) == {"x.parquet/a": DATA[0], "x.parquet/b": DATA[1]}


def test_a_row_without_bytes_is_an_error_of_its_own(tmp_path: Path) -> None:
    images = pa.array([DATA[0], None, b""], pa.binary())
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"image": images}), row_group_size=1))
    first, second, third = SOURCES["parquet"].read(listed("parquet", tmp_path), threads=1)
    assert (first, str(second), third) == (DATA[0], "Missing: row 1 holds no bytes", b"")


def test_only_the_row_groups_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [bytes([row]) * 50 for row in range(100)]
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"image": images}), row_group_size=10))
    table = listed("parquet", tmp_path)
    groups: list[int] = []
    read = pq.ParquetFile.iter_batches

    def noted(file: pq.ParquetFile, rows: int, *, row_groups: list[int], **how: Any) -> Iterator[pa.RecordBatch]:
        groups.extend(row_groups)
        return cast(Iterator[pa.RecordBatch], read(file, rows, row_groups=row_groups, **how))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    found = outcomes("parquet", table.take([95, 3, 31, 5]))
    assert found == {f"x.parquet/{row}": images[row] for row in (95, 3, 31, 5)}
    assert groups == [0, 3, 9]


def test_a_column_of_uris_is_read_like_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DATA[0])
    (tmp_path / "rows.parquet").write_bytes(parquet(pa.table({"image": DATA[1:2]})))
    (tmp_path / "uris.parquet").write_bytes(parquet(pa.table({"uri": ["a.jpg", "gone.jpg"]})))
    found = outcomes("parquet", listed("parquet", tmp_path))
    assert found == {"rows.parquet/0": DATA[1], f"{tmp_path}/a.jpg": DATA[0], f"{tmp_path}/gone.jpg": "Missing"}


def test_a_damaged_parquet_file_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = parquet(pa.table({"image": DATA}))
    for name, data in zip("abcd", (whole, whole[:-20], b"", whole[:-60] + b"\xff" * 52 + whole[-8:]), strict=True):
        (tmp_path / f"{name}.parquet").write_bytes(data)
    table = listed("parquet", tmp_path)
    assert table["key"].to_pylist() == ["a.parquet/0", "a.parquet/1", "a.parquet/2"]
    for name in "bcd":
        assert f"{tmp_path}/{name}.parquet is damaged" in caplog.text


def test_damage_among_the_images_is_told_per_row(tmp_path: Path) -> None:
    images = [b"\0" * 5000, b"\1" * 5000]
    whole = bytearray(parquet(pa.table({"image": images}), row_group_size=1))
    whole[4:40] = b"\xff" * 36  # the first page's header
    (tmp_path / "x.parquet").write_bytes(bytes(whole))
    table = listed("parquet", tmp_path)
    assert set(outcomes("parquet", table.slice(0, 1)).values()) == {"Truncated"}
    assert outcomes("parquet", table.slice(1)) == {"x.parquet/1": images[1]}


def test_a_parquet_file_of_something_else_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"image": ["text"], "bytes": [7]})))
    with pytest.raises(ConfigError, match=r"^input=.*/x\.parquet: has no column image or bytes"):
        listed("parquet", tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos a, b and c."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in zip("abc", DATA, strict=True):
        (folder / f"{name}.jpg").write_bytes(data)
    return folder


def etag(path: Path) -> str:
    found = open_store(str(path.parent), field="input").stat(path.name)
    assert found is not None
    return found.etag


def write_list(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    """A manifest of these rows; the text form has no room for etags."""
    path = folder / f"list.{kind}"
    if kind == "parquet":
        path.write_bytes(parquet(pa.Table.from_pylist(rows)))
    elif kind == "csv":
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(f'"{row[name] or ""}"' for name in columns) for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    else:
        path.write_text("".join(f"  {row['uri']}\r\n\r\n" for row in rows), encoding="utf-8")
    return path


def write_uris(folder: object, where: Path, *names: str) -> Path:
    return write_list(where, "txt", [{"uri": f"{folder}/{name}.jpg"} for name in names])


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_uris_of_every_form(kind: str, photos: Path, tmp_path: Path, s3_bucket: str) -> None:
    put(open_store(s3_bucket, field="input"), "deep/x y.jpg", b"in a bucket")
    uris = [f"{photos}/a.jpg", f"file://{photos}/../photos/b.jpg", "photos/c.jpg", f"{s3_bucket}/deep/x y.jpg"]
    manifest = write_list(tmp_path, kind, [{"uri": uri} for uri in uris])
    table = listed("manifest", manifest, None, s3_bucket)
    expected = [f"{photos}/a.jpg", f"{photos}/b.jpg", f"{photos}/c.jpg", f"{s3_bucket}/deep/x y.jpg"]
    assert table["uri"].to_pylist() == table["key"].to_pylist() == expected
    assert list(outcomes("manifest", table).values()) == [*DATA, b"in a bucket"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_that_says_etag_and_bytes_is_taken_at_its_word(kind: str, photos: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"uri": f"{photos}/a.jpg", "etag": etag(photos / "a.jpg"), "bytes": len(DATA[0])},
        {"uri": f"{photos}/b.jpg", "etag": '"of-old"' if kind == "parquet" else "of-old", "bytes": 5},
        {"uri": f"{photos}/c.jpg", "etag": "of-old", "bytes": None},
        {"uri": f"{photos}/gone.jpg", "etag": "of-old", "bytes": 5},
        {"uri": f"{photos}/never.jpg", "etag": None, "bytes": None},
    ]
    table = listed("manifest", write_list(tmp_path, kind, rows))
    assert table["etag"].to_pylist() == [rows[0]["etag"], "of-old", etag(photos / "c.jpg"), "of-old", ""]
    assert table["bytes"].to_pylist() == [len(DATA[0]), 5, len(DATA[2]), 5, 0]
    assert list(outcomes("manifest", table).values()) == [DATA[0], "Changed", DATA[2], "Missing", "Missing"]


def test_odd_lines_hide_no_others(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no UTF-8, sizes that are none, and lines that name what they may not, wherever they stand."""
    monkeypatch.setattr(manifests_module, "LOOKED_UP", 2)
    lines = [b"uri,etag,bytes", b"photos/a.jpg,,", b"photos/\xe9.jpg,,", b"photos/b.jpg,1-1,12.0"]
    lines += [b"/elsewhere/x.jpg,,"] * 4 + [b"photos/c.jpg,,"]
    (tmp_path / "list.csv").write_bytes(b"\n".join(lines))
    found = outcomes("manifest", listed("manifest", tmp_path / "list.csv"))
    assert list(found.values()) == [DATA[0], "Missing", DATA[1], "Denied", DATA[2]]


def test_a_web_server_that_fails_now_and_then_is_asked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Retries(attempts=1, first_wait=0, longest_wait=0, jitter=0)
    monkeypatch.setattr(base, "open_store", functools.partial(open_store, retries=quick))
    with web_server() as url:
        names = [f"{url}/{'500' if number < 40 else '404'}/{number}.jpg" for number in range(60)]
        (tmp_path / "list.txt").write_text("\n".join(names))
        etags = listed("manifest", tmp_path / "list.txt", None, url)["etag"].to_pylist()
    assert etags == [base.UNKNOWN] * 40 + [base.ABSENT] * 20


def test_an_image_that_was_not_there_is_missing_until_it_comes_as_a_new_version(photos: Path, tmp_path: Path) -> None:
    manifest = write_uris(photos, tmp_path, "late")
    before = listed("manifest", manifest)
    (photos / "late.jpg").write_bytes(b"here now")
    assert outcomes("manifest", before) == {f"{photos}/late.jpg": "Missing"}
    after = listed("manifest", manifest)
    assert outcomes("manifest", after) == {f"{photos}/late.jpg": b"here now"}
    assert before["etag"].to_pylist() == [""] != after["etag"].to_pylist()


def test_a_denied_image_is_new_if_granted(photos: Path, tmp_path: Path, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    put(open_store(s3_bucket, field="input"), "other/team.jpg", b"ours now")
    uris = [f"{photos}/a.jpg", f"{s3_bucket}/other/team.jpg"]
    manifest = write_list(tmp_path, "txt", [{"uri": uri} for uri in uris])
    rule = s3_proxy.add(Rule(forbid, method="HEAD", path=r"/other/"))
    before = listed("manifest", manifest, None, s3_bucket)
    assert rule.reached(1, seconds=10)
    s3_proxy.clear()
    assert outcomes("manifest", before) == dict(zip(uris, [DATA[0], "Denied"], strict=True))
    after = listed("manifest", manifest, None, s3_bucket)
    assert outcomes("manifest", after) == dict(zip(uris, [DATA[0], b"ours now"], strict=True))
    assert before["etag"].to_pylist()[1] != after["etag"].to_pylist()[1]


def test_if_no_image_may_be_looked_at_it_is_a_mistake(tmp_path: Path, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    manifest = write_uris(s3_bucket, tmp_path, *"ab")
    s3_proxy.add(Rule(forbid, method="HEAD"))
    with pytest.raises(ConfigError, match=rf"input={manifest}: none of the images that it names may be looked at"):
        listed("manifest", manifest, None, s3_bucket)


def test_a_manifest_names_only_what_lies_with_it_or_is_allowed(tmp_path: Path, s3_bucket: str) -> None:
    """Whoever can write one could else have any file, and any address of the network, read."""
    bucket = open_store(s3_bucket, field="input")
    put(bucket, "lists/here.jpg", DATA[0])
    put(bucket, "other.jpg", DATA[1])
    (tmp_path / "secret.jpg").write_bytes(DATA[2])
    outside = [
        f"{tmp_path}/secret.jpg",
        "s3://another/x.jpg",
        "http://169.254.169.254/latest",
        "https://a.b/c/../d.jpg",
    ]
    uris = ["here.jpg", f"{s3_bucket}/other.jpg", *outside]
    put(bucket, "lists/x.txt", "\n".join(uris).encode())
    found = list(outcomes("manifest", listed("manifest", f"{s3_bucket}/lists/x.txt")).values())
    assert found == [DATA[0], DATA[1], *["Denied"] * len(outside)]
    allowed = listed("manifest", f"{s3_bucket}/lists/x.txt", None, str(tmp_path), "https://a.b/c")
    assert list(outcomes("manifest", allowed).values()) == [DATA[0], DATA[1], DATA[2], *["Denied"] * 3]
    put(bucket, "lists/y.txt", "\n".join(outside).encode())
    with pytest.raises(ConfigError, match=rf"names images outside its own place: add --allow {tmp_path}$"):
        listed("manifest", f"{s3_bucket}/lists/y.txt")


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_a_manifest_that_may_not_be_read_is_told(kind: str, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    put(open_store(s3_bucket, field="input"), f"lists/x.{kind}", b"")
    s3_proxy.add(Rule(forbid, method="HEAD", path=f"/x.{kind}"))
    with pytest.raises(ConfigError, match=rf"^input={s3_bucket}/lists/x\.{kind}: cannot be read .*may not look at it"):
        listed("manifest", f"{s3_bucket}/lists")


class Signed(Quiet):
    """Gives an image to whoever signs."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.endswith(("&X-Amz-Signature=opensesame", "token=opendoor")) else 403)
        self.send_header("Content-Length", "3")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"yes")


def test_signed_uris_are_read_and_labels_keep_no_signature(tmp_path: Path) -> None:
    with serving(Signed) as url:
        uris = [
            f"{url}/a.jpg?w=9&X-Amz-Signature=opensesame",
            f"{url}/b.jpg?token=opendoor",
            f"{url}/b.jpg?token=wrong",
        ]
        entries: list[dict[str, object]] = [{"uri": uri, "etag": "", "bytes": ""} for uri in uris]
        entries[2] |= {"etag": "v1", "bytes": 3}  # whose signature has ended
        manifest = write_list(tmp_path, "csv", entries)
        plan = listed("manifest", manifest, None, url)
        spec = PlanSpec(source="manifest", input=[str(manifest)], date="2026-01-31", mask="rle")
        rows = fetch(spec, plan)
        again = fetch(spec, rows.select(LISTING.names))  # as a retry reads them
    assert [(data, (error or "").partition(":")[0]) for data, error in values(rows, "data", "error")] == [
        (b"yes", ""),
        (b"yes", ""),
        (None, "Denied"),
    ]
    assert "open" not in str(rows.to_pylist())
    assert rows["uri"].to_pylist() == rows["key"].to_pylist() == plan["uri"].to_pylist()
    assert len(set(plan["uri"].to_pylist())) == 3
    assert (plan["etag"][2].as_py(), rows["etag"][2].as_py()) == ("v1", base.DENIED)
    assert plan["uri"][0].as_py().endswith("/a.jpg?w=9")
    assert {error.partition(":")[0] for _, error in values(again, "data", "error")} == {"Denied"}


def test_a_uri_with_a_password_is_not_read_and_labels_do_not_keep_it(tmp_path: Path) -> None:
    uris = ["http://me:hushhush@127.0.0.1:1/a.jpg", "ftp://me:hushhush@host/b.jpg", "https://hushhush@host/c.jpg"]
    plan = listed("manifest", write_list(tmp_path, "txt", [{"uri": uri} for uri in uris]), None, "http://127.0.0.1:1")
    assert "hushhush" not in str(plan.to_pylist())
    assert set(outcomes("manifest", plan).values()) == {"Denied"}


def values(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def test_an_image_named_twice_counts_once(photos: Path, tmp_path: Path) -> None:
    manifest = write_uris(photos, tmp_path, *"abab")
    with spool(SOURCES["manifest"].find(Inputs.of(f"{manifest},{tmp_path}", date=DATE))) as listing:
        assert listing.pending([], 9)["key"].to_pylist() == [f"{photos}/a.jpg", f"{photos}/b.jpg"]


def test_more_lines_than_are_looked_up_together(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests_module, "LOOKED_UP", 2)
    manifest = write_uris(photos, tmp_path, *"abcba")
    assert [uri[-5] for uri in listed("manifest", manifest)["uri"].to_pylist()] == list("abcba")


def test_images_count_by_their_own_age(photos: Path, tmp_path: Path) -> None:
    manifest = write_uris(photos, tmp_path, "a", "gone")  # what is not there has no age
    assert listed("manifest", manifest, since=LATER)["uri"].to_pylist() == [f"{photos}/gone.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("x.csv", b"path,etag\na.jpg,1\n", "has no column uri"),
        ("x.csv", b"", "has no column uri"),
        pytest.param("x.csv", b'uri\n"' + b"aa\n" * 70_000, "is no CSV", id="a quote that never ends"),
        pytest.param("x.csv", b'"' + b"aa\n" * 70_000, "is no CSV", id="one that never ends in the first line"),
        pytest.param("x.txt", b"a" * 70_000, "has a line of more than 65536", id="a line that never ends"),
        ("x.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("x.parquet", b"PAR1", "cannot be read"),
        ("x.parquet", parquet(pa.table({"path": ["a"]})), "has no column uri"),
    ],
)
def test_what_is_no_manifest(name: str, content: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with mistake(remedy):
        listed("manifest", tmp_path / name)
