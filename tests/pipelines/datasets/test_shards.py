"""Packed shards: what a random row costs, what any Parquet reader sees, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.datasets.dataset import Dataset, Pair, PairError
from pipelines.datasets.layouts import open_dataset
from pipelines.datasets.shards import GROUP_BYTES, ShardRows, ShardWriter, shard_metadata, shard_path
from pipelines.process.retrying import Retries
from pipelines.storage import Store, open_store
from pipelines.storage.s3 import S3Store
from pspnet_core.errors import ConfigError
from pspnet_core.images.masks import to_png
from tests.pipelines.datasets.test_dataset import CLASSES
from tests.pipelines.datasets.test_layouts import pack

SIDE = 64
PAIRS = 30


class RecordingS3(S3Store):
    """Remembers the length of each range that is asked for."""

    def __init__(self, root: str) -> None:
        super().__init__(root, field="data", retries=Retries())
        self.ranges: list[int] = []

    def read_range(self, path: str, etag: str, start: int, stop: int) -> bytes:
        self.ranges.append(stop - start)
        return super().read_range(path, etag, start, stop)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Noise, which no codec makes smaller: images of 12 kB."""
    store = open_store(str(tmp_path_factory.mktemp("source")), field="data")
    store.put_if_absent("classes.json", json.dumps(CLASSES).encode())
    random = np.random.default_rng(0)
    for number in range(PAIRS):
        image = random.integers(0, 256, (SIDE, SIDE * 3), dtype=np.uint8)
        split = "train" if number < 24 else "val"
        store.put_if_absent(f"images/{split}/{number:02d}.png", to_png(image[:, :SIDE]) + bytes(8000))
        store.put_if_absent(f"masks/{split}/{number:02d}.png", to_png(image[:, :SIDE] % 2))
    return open_dataset(store.root, "folder")


def test_any_parquet_reader_sees_the_files_as_they_were(source: Dataset, tmp_path: Path) -> None:
    output = open_store(str(tmp_path), field="output")
    parts = pack(source, output, 100_000)
    rows = [row for path in sorted(tmp_path.glob("shards/*.parquet")) for row in pq.read_table(path).to_pylist()]
    pairs = [*source.split("train"), *source.split("val")]
    assert rows == [{"key": pair.key, **source.fetch(pair)._asdict(), "split": pair.split} for pair in pairs]
    assert len(parts) == len(list(tmp_path.glob("shards/*.parquet"))) > 4
    packed = open_dataset(str(tmp_path), "shards")
    sizes = [pq.read_metadata(tmp_path / shard_path(number)).num_rows for number in range(len(parts))]
    assert packed.blocks("train") + packed.blocks("val") == tuple(sizes)


def test_images_and_masks_are_not_compressed_once_more(source: Dataset, tmp_path: Path) -> None:
    pack(source, open_store(str(tmp_path), field="output"), 10**9)
    metadata = pq.read_metadata(tmp_path / shard_path(0))
    assert metadata.num_row_groups > 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
        assert {columns["image"].compression, columns["mask"].compression} == {"UNCOMPRESSED"}
        assert not columns["image"].is_stats_set  # the least and the largest image would be in the footer
        assert group.total_byte_size < 1.02 * GROUP_BYTES


def write_large_rows(store: Store) -> tuple[Pair, ...]:
    """Write a shard of three rows, each larger than a row group."""
    writer = ShardWriter()
    for key in "abc":
        writer.add(key, key.encode() * 3 * GROUP_BYTES, b"mask " + key.encode(), "train")
    store.put_if_absent(shard_path(0), writer.finish("{}"))
    places = [f"{shard_path(0)}/{row}" for row in range(3)]
    return tuple(Pair(key="", image=place, mask=place) for place in places)


@pytest.mark.parametrize("large", [False, True], ids=["small rows", "one larger than a row group"])
def test_a_row_costs_one_range_of_an_object(source: Dataset, s3_bucket: str, large: bool) -> None:
    store, reader = RecordingS3(s3_bucket), ShardRows()
    if large:
        pairs = write_large_rows(store)
    else:
        pack(source, store, 10**9)
        pairs = open_dataset(s3_bucket, "shards").split("train")
    reader.fetch(store, pairs[0])
    for pair in (pairs[-1], pairs[1]):
        store.ranges.clear()
        sample = reader.fetch(store, pair)
        (length,) = store.ranges
        assert isinstance(sample.mask, bytes)
        assert len(sample.image) <= length < max(GROUP_BYTES, len(sample.image) + len(sample.mask)) + 2000


@given(st.lists(st.tuples(st.integers(0, 2 * GROUP_BYTES), st.integers(0, 1000)), max_size=12))
def test_rows_are_where_the_footer_says(tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    writer = ShardWriter()
    rows = [(bytes([number]) * image, bytes([99 - number]) * mask) for number, (image, mask) in enumerate(sizes)]
    for number, (image, mask) in enumerate(rows):
        writer.add(str(number), image, mask, "train")
    store = open_store(str(folder), field="output")
    store.put_if_absent("x.parquet", writer.finish('{"a": 1}'))
    assert shard_metadata(store, "x.parquet") == '{"a": 1}'
    read = [ShardRows().fetch(store, Pair(key="", image=f"x.parquet/{row}", mask="")) for row in range(len(rows))]
    assert read == rows


@pytest.mark.parametrize("name", ["index.parquet", "classes.json"])
def test_a_damaged_folder_is_told(source: Dataset, tmp_path: Path, name: str) -> None:
    output = open_store(str(tmp_path), field="output")
    pack(source, output, 10**9)
    (tmp_path / name).write_bytes(b"{not at all")
    with pytest.raises(ConfigError, match=r"is damaged \(.*\); prepare the data once more into an empty folder"):
        open_dataset(str(tmp_path), "shards")
    output.delete(name)
    with pytest.raises(ConfigError, match=rf"{name}: not there; prepare the data once more"):
        open_dataset(str(tmp_path), "shards")


def test_a_damaged_shard_is_named(source: Dataset, tmp_path: Path) -> None:
    pack(source, open_store(str(tmp_path), field="output"), 10**9)
    dataset = open_dataset(str(tmp_path), "shards")
    (tmp_path / shard_path(0)).write_bytes(b"PAR1")
    with pytest.raises(PairError, match=r"shards/000000\.parquet: is damaged"):
        dataset.read(dataset.split("train")[0])
    (tmp_path / shard_path(0)).unlink()
    with pytest.raises(PairError, match=r"shards/000000\.parquet: is gone"):
        dataset.read(dataset.split("train")[1])


def test_packing_what_is_packed_gives_the_same_shards(source: Dataset, tmp_path: Path) -> None:
    first, second = (open_store(f"{tmp_path}/{name}", field="output") for name in ("first", "second"))
    pack(source, first, 100_000)
    packed = open_dataset(first.root, "shards")
    pack(packed, second, 10**9)
    again = open_dataset(second.root, "shards")
    assert len(again.blocks("train")) < len(packed.blocks("train"))
    for split in ("train", "val"):
        assert again.fingerprint(split) == packed.fingerprint(split)
        assert [again.fetch(pair) for pair in again.split(split)] == [
            packed.fetch(pair) for pair in packed.split(split)
        ]


def test_another_class_table_is_other_data(source: Dataset) -> None:
    other = replace(source, classes=replace(source.classes, names=("sky", "street")))
    assert other.fingerprint("val") != source.fingerprint("val")
