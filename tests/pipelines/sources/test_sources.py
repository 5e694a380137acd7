"""The contract of every input format: what is listed can be read, and what cannot be had is an error of its image."""

import functools
import random
import re
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.label_table.schema import LISTING
from pipelines.process.retrying import Retries
from pipelines.sources import SOURCES, Inputs, base, find_source, read_listed
from pipelines.sources import inputs as inputs_module
from pipelines.storage import Store, TransientStorageError, open_store
from pspnet_core.errors import ConfigError
from tests.support.buckets import DATE, LATER, WRITERS, Bucket, listed, outcomes, put
from tests.support.faultproxy import FaultProxy, Rule, forbid, refusal, reset, slow_down


def test_every_source_is_tested() -> None:
    assert set(WRITERS) == set(SOURCES)


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = str(tmp_path / "in put") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/in put"
    return open_store(root, field="input")


def test_what_is_listed_can_be_read(source: str, store: Store) -> None:
    bucket = WRITERS[source](store)
    table = listed(source, bucket.input)
    assert table.schema == LISTING
    assert sorted(table["key"].to_pylist()) == sorted(bucket.images)
    assert outcomes(source, table) == bucket.images
    for key, uri, etag in zip(*(table[name].to_pylist() for name in ("key", "uri", "etag")), strict=True):
        holder = store.stat(bucket.holders[key])
        assert holder is not None
        assert etag == holder.etag
        assert uri in (key, f"{store.root}/{key}")
    if source != "parquet":  # where a size is the mean of its row group
        assert table["bytes"].to_pylist() == [len(bucket.images[key]) for key in table["key"].to_pylist()]


def test_any_rows_in_any_order_give_the_same(source: str, store: Store) -> None:
    bucket = WRITERS[source](store)
    table = listed(source, bucket.input)
    order = list(range(len(table)))
    random.Random(0).shuffle(order)
    assert outcomes(source, table.take(order)) == bucket.images
    for index in order:
        row = table.slice(index, 1)
        assert outcomes(source, row) == {key: bucket.images[key] for key in row["key"].to_pylist()}
    assert outcomes(source, table.slice(0, 0)) == {}


def test_what_changed_or_went_is_told_per_image(source: str, store: Store) -> None:
    bucket = WRITERS[source](store)
    table = listed(source, bucket.input)
    changed, gone = bucket.holders[min(bucket.images)], bucket.holders[max(bucket.images)]
    put(store, changed, b"something else")
    store.delete(gone)
    told = {changed: "Changed", gone: "Missing"}
    assert outcomes(source, table) == {key: told.get(bucket.holders[key], data) for key, data in bucket.images.items()}


def test_an_empty_place_lists_nothing(source: str, tmp_path: Path) -> None:
    assert len(listed(source, str(tmp_path))) == 0


def test_only_what_is_new_enough_is_listed_and_once(source: str, store: Store) -> None:
    bucket = WRITERS[source](store)
    assert len(listed(source, bucket.input, LATER)) == 0
    once = listed(source, bucket.input, LATER.replace(year=1999))
    assert len(once) == len(bucket.images)
    again = listed(source, f"{bucket.input},{store.root}/*,{store.root},{bucket.input}")  # each image comes once
    assert sorted(again["uri"].to_pylist()) == sorted(once["uri"].to_pylist())


def test_memory_is_bounded(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing comes in batches, and an image that would not fit is a row."""
    bucket = WRITERS[source](open_store(str(tmp_path), field="input"))
    monkeypatch.setattr(base, "BATCH_ROWS", 2)
    monkeypatch.setattr(base, "MAX_BYTES", 5)
    batches = list(SOURCES[source].find(Inputs.of(bucket.input, date=DATE)))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(batch.schema == LISTING for batch in batches)
    assert set(outcomes(source, pa.Table.from_batches(batches)).values()) == {"TooLarge"}


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"manifest"}))  # which knows no folder to look for
def test_a_machine_without_the_folder_is_no_missing_image(source: str, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    bucket: Bucket = WRITERS[source](open_store(str(mount), field="input"))
    table = listed(source, bucket.input)
    mount.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mount it on every node"):
        read_listed(SOURCES[source], table, inputs=[bucket.input])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage is asked twice, without a wait."""
    retries = Retries(attempts=2, first_wait=0, longest_wait=0, jitter=0)
    base._store.cache_clear()
    for module in (base, inputs_module):
        monkeypatch.setattr(module, "open_store", functools.partial(open_store, retries=retries))


@pytest.mark.usefixtures("impatient")
def test_an_outage_of_one_input_is_no_image_s_fault(tmp_path: Path, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    """However well another one answers; one image without an answer among others is."""
    for root in (str(tmp_path / "disk"), s3_bucket):
        for name in "ab":
            put(open_store(root, field="input"), f"{name}.jpg", b"x")
    inputs = [str(tmp_path / "disk"), s3_bucket]
    table = pa.concat_tables([listed("images", root) for root in inputs])
    s3_proxy.add(Rule(reset, method="GET", path=r"/b\.jpg$"))
    *good, bad = read_listed(SOURCES["images"], table, inputs=inputs)
    assert good == [b"x"] * 3
    assert str(bad).startswith("Failed: TransientStorageError: ")
    s3_proxy.add(Rule(reset))
    with pytest.raises(TransientStorageError):
        read_listed(SOURCES["images"], table, inputs=inputs)


@pytest.mark.usefixtures("impatient")
def test_credentials_that_expire_are_no_image_s_fault(source: str, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    """An answer to HEAD does not say what it refuses for."""
    bucket = WRITERS[source](open_store(s3_bucket, field="input"))
    table = listed(source, bucket.input)
    s3_proxy.add(Rule(refusal(400, "ExpiredToken")))
    with pytest.raises(ConfigError, match="the credentials have expired"):
        read_listed(SOURCES[source], table, inputs=[bucket.input])


@pytest.mark.usefixtures("impatient")
def test_objects_that_nobody_can_read_are_an_outage(s3_bucket: str, s3_proxy: FaultProxy) -> None:
    """Though the listing answers."""
    put(open_store(s3_bucket, field="input"), "a.jpg", b"x")
    table = listed("images", s3_bucket)
    s3_proxy.add(Rule(slow_down, method="GET", path=r"/a\.jpg$"))
    with pytest.raises(TransientStorageError):
        read_listed(SOURCES["images"], table, inputs=[s3_bucket])


def test_what_may_not_be_read_is_told_per_image(source: str, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    """All of it, too: nobody's mistake stops a plan that is made."""
    bucket = WRITERS[source](open_store(s3_bucket, field="input"))
    table = listed(source, bucket.input)
    s3_proxy.add(Rule(forbid, method="GET|HEAD", path="|".join(map(re.escape, bucket.holders.values()))))
    assert outcomes(source, table) == dict.fromkeys(bucket.images, "Denied")


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_a_file_that_may_not_be_read_is_left_out(
    source: str, s3_bucket: str, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = WRITERS[source](open_store(s3_bucket, field="input"))
    first, second = sorted(set(bucket.holders.values()))
    rule = s3_proxy.add(Rule(forbid, method="HEAD", path=re.escape(first)))
    left = [key for key, holder in bucket.holders.items() if holder == second]
    inputs = Inputs.of(bucket.input, date=DATE)
    found = pa.Table.from_batches(SOURCES[source].find(inputs), LISTING)
    assert sorted(found["key"].to_pylist()) == sorted(left)
    assert inputs.omissions.files == 1
    assert f"{s3_bucket}/{first}: these credentials may not look at it" in caplog.text
    assert "left to the next run" in caplog.text
    assert rule.hits
    s3_proxy.add(Rule(forbid, method="GET", path=re.escape(second)))
    with pytest.raises(ConfigError, match=rf"^input={s3_bucket}: none of the files there may be read"):
        listed(source, bucket.input)


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_archived_files_are_no_mistake(source: str, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    bucket = WRITERS[source](open_store(s3_bucket, field="input"))
    holders = "|".join(map(re.escape, bucket.holders.values()))
    rule = s3_proxy.add(Rule(refusal(403, "InvalidObjectState"), method="GET", path=holders))
    assert len(listed(source, bucket.input)) == 0
    assert len(rule.hits) == 2


def test_an_unknown_source_is_told() -> None:
    with pytest.raises(ConfigError, match=r"source=tape: choose one of images, webdataset"):
        find_source("tape")
