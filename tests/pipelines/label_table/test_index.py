"""The index over the label files: whatever happens to it or to them, it says what the files say."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelines.label_table import index as label_index
from pipelines.label_table.index import LabelIndex, read_label_file
from pipelines.label_table.ledger import Ledger
from pipelines.label_table.listing import VERSION, spool
from pipelines.label_table.schema import LISTING, Paths
from pipelines.storage import ObjectChanged, Store, open_store
from pipelines.storage.arrow import to_parquet
from pspnet_core.errors import ConfigError
from tests.support.buckets import put
from tests.support.stores import CountingStore

PATHS = Paths(partition="m-0123")
FOLDER = ".index/model=m-0123"
ALL = [(f"/bucket/{letter}", etag) for letter in "abcdefgé" for etag in ("", "1", "2")]
"""By uri and etag."""

Version = tuple[str, str]


def label_file(rows: list[Version]) -> bytes:
    """The columns of a label file that matter here."""
    uris, etags = [uri for uri, _ in rows], [etag for _, etag in rows]
    return to_parquet(pa.table([uris, etags, ["ok"] * len(rows)], names=["uri", "etag", "status"]))


def indexed(store: Store) -> list[Version]:
    found = pa.Table.from_batches(LabelIndex(store, PATHS).images(), VERSION)
    return sorted(zip(found["uri"].to_pylist(), found["etag"].to_pylist(), strict=True))


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_index, "_PART_ROWS", 6)
        patch.setattr(label_index, "_FEWEST_FILES", 2)
        yield


class Life(RuleBasedStateMachine):
    """Label files come, change and go, and so does the index."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = open_store(str(self.root), field="output")
        self.ledger = Ledger(self.store, PATHS)
        self.files: dict[str, list[Version]] = {}
        self.numbers = itertools.count()
        rows = [{"uri": uri, "key": uri[1:], "etag": etag, "bytes": 1} for uri, etag in ALL]
        self.listing = pa.RecordBatch.from_pylist(rows, LISTING)

    def teardown(self) -> None:
        """What is pending in the end is what no file holds."""
        with spool([self.listing]) as listing:
            pending = self.ledger.pending(listing)
        shutil.rmtree(self.root)
        found = list(zip(pending["uri"].to_pylist(), pending["etag"].to_pylist(), strict=True))
        assert found == [version for version in ALL if version not in self.labelled]

    @property
    def labelled(self) -> set[Version]:
        return {version for rows in self.files.values() for version in rows}

    @property
    def parts(self) -> list[Path]:
        return sorted((self.root / FOLDER).glob("*"))

    @rule(rows=st.lists(st.sampled_from(ALL), max_size=4), day=st.integers(1, 2))
    def a_file_is_written(self, rows: list[Version], day: int) -> None:
        path = PATHS.chunk(f"2026-01-0{day}", next(self.numbers), 0)
        assert self.store.put_if_absent(path, label_file(rows))
        self.files[path] = rows

    @precondition(lambda self: self.files)
    @rule(rows=st.lists(st.sampled_from(ALL), max_size=4), data=st.data())
    def a_file_is_written_again(self, rows: list[Version], data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.files)))
        put(self.store, path, label_file(rows))
        self.files[path] = rows

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def a_file_is_deleted(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.files)))
        self.store.delete(path)
        del self.files[path]

    @precondition(lambda self: self.parts)
    @rule(data=st.data())
    def a_part_is_deleted(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.parts)).unlink()

    @rule()
    def the_index_is_deleted(self) -> None:
        shutil.rmtree(self.root / ".index", ignore_errors=True)

    @precondition(lambda self: self.parts)
    @rule(data=st.data())
    def a_part_is_damaged(self, data: st.DataObject) -> None:
        part = data.draw(st.sampled_from(self.parts))
        content = bytearray(part.read_bytes())
        # Not drawn from the length, which differs by a byte from one time to the next, for the time stamps in a part.
        place = data.draw(st.integers(0, 2**16)) % len(content)
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content = content[:place]
        part.write_bytes(content)

    @invariant()
    def the_index_says_what_the_files_say(self) -> None:
        assert set(indexed(self.store)) == self.labelled


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=12, stateful_step_count=14)


def fill(store: Store, files: int) -> list[Version]:
    rows = [(f"/bucket/{number}", "1") for number in range(2 * files)]
    for number in range(files):
        store.put_if_absent(PATHS.chunk("2026-01-31", 0, number), label_file(rows[2 * number : 2 * number + 2]))
    return sorted(rows)


def test_a_file_is_read_once(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    rows = fill(store, 9)
    assert indexed(store) == rows
    assert len(store.opened) == 9
    assert len(list((tmp_path / FOLDER).iterdir())) == 3
    store.opened.clear()
    assert indexed(store) == rows
    assert store.opened == []
    # One that has changed is read again: it alone.
    path = PATHS.chunk("2026-01-31", 0, 4)
    put(store, path, label_file([("/bucket/other", "1")]))
    assert indexed(store) == sorted({*rows, ("/bucket/other", "1")} - {("/bucket/8", "1"), ("/bucket/9", "1")})
    assert store.opened == [path]
    # Readers of the table do not meet the parts, which can be looked into.
    visible = {path.name for path in tmp_path.glob("**/*.parquet") if "/." not in str(path)}
    assert visible == {f"000000-{number:06d}.parquet" for number in range(9)}
    for part in (tmp_path / FOLDER).iterdir():
        assert pq.read_table(part).column_names == ["uri", "etag"]


def test_few_files_need_no_index(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), field="output")
    rows = fill(store, 1)
    assert indexed(store) == rows
    assert not (tmp_path / ".index").exists()


def test_on_object_storage(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/labels", field="output")
    rows = fill(store, 7)
    assert indexed(store) == rows
    parts = [item.key for item in store.list(FOLDER)]
    assert len(parts) == 2  # the last file alone is not worth one
    assert list(store.list("masks")) and not [item for item in store.list() if ".index" in item.key]
    damaged = store.read(parts[0])[:-1]
    put(store, parts[0], damaged)
    assert indexed(store) == rows
    assert indexed(store) == rows


@pytest.mark.parametrize("content", [b"", b"not Parquet", to_parquet(pa.table({"other": [1]}))])
def test_what_is_no_label_file_is_told(tmp_path: Path, content: bytes) -> None:
    store = open_store(str(tmp_path), field="output")
    path = PATHS.chunk("2026-01-31", 0, 0)
    store.put_if_absent(path, content)
    with pytest.raises(ConfigError, match=rf"^output={tmp_path}/{path}: this is no label file"):
        indexed(store)


class ShiftingStore(CountingStore):
    """Of what is opened first another version is there when it is read."""

    def open(self, path: str) -> BinaryIO:
        stream = super().open(path)
        if len(self.opened) == 1:
            stream.close()
            raise ObjectChanged(path, "has changed")
        return stream


def test_a_file_that_is_written_again_meanwhile(tmp_path: Path) -> None:
    store = ShiftingStore(tmp_path)
    rows = fill(store, 1)
    table = read_label_file(store, PATHS.chunk("2026-01-31", 0, 0), ["etag", "uri"])
    assert table.column_names == ["etag", "uri"]
    assert table["uri"].to_pylist() == [uri for uri, _ in rows]
    assert len(store.opened) == 2
