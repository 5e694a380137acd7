"""Listings on disk: what is left of one without what is labelled, beside plain Python sets."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.label_table import listing
from pipelines.label_table.listing import VERSION, spool
from pipelines.label_table.schema import LISTING
from pipelines.sources.base import Row


def batches(rows: Sequence[tuple[object, ...]], schema: pa.Schema, size: int = 3) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        some = [dict(zip(schema.names, row, strict=True)) for row in rows[start : start + size]]
        yield pa.RecordBatch.from_pylist(some, schema)


# Few letters, so that uris and etags meet and share their ends; what separates parts, ends strings or is not ASCII.
TEXTS = st.text("ab1:/ \0'é漢\U0001f600", max_size=4)
VERSIONS = st.tuples(TEXTS, TEXTS)
IMAGES = st.builds(Row, TEXTS, TEXTS, TEXTS, st.integers(0, 2**40))


@given(st.lists(IMAGES, max_size=30), st.lists(VERSIONS, max_size=30), st.integers(0, 40), st.data())
@settings(max_examples=40)
def test_what_is_left_is_the_difference_of_two_sets(
    images: list[Row], others: list[tuple[str, str]], limit: int, data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.sampled_from(images), max_size=10)) if images else []
    labelled = [*others, *((image.uri, image.etag) for image in again)]
    left: dict[tuple[str, str], Row] = {}
    for image in images:  # of several with one uri and etag the one that was listed first
        if (image.uri, image.etag) not in labelled:
            left.setdefault((image.uri, image.etag), image)
    expected = sorted(left.values(), key=lambda image: [text.encode() for text in (image.key, image.uri, image.etag)])
    with spool(batches(images, LISTING)) as found:
        assert found.images == len(images)
        pending = found.pending(batches(labelled, VERSION), limit)
    assert pending.schema == LISTING
    assert pending.to_pylist() == [image._asdict() for image in expected[:limit]]


@given(st.lists(IMAGES, max_size=10), st.lists(VERSIONS, max_size=10))
@settings(max_examples=20)
def test_how_many_of_some_images_are_not_listed(images: list[Row], others: list[tuple[str, str]]) -> None:
    present = {(image.uri, image.etag) for image in images}
    with spool(batches(images, LISTING)) as found:
        assert found.absent(batches([*others, *present], VERSION)) == sum(version not in present for version in others)


FOLDER = "a-folder/" * 11


def numbered(count: int, size: int = 1000) -> Iterator[pa.RecordBatch]:
    """A listing of many images, in another order than that of their keys."""
    for start in range(0, count, size):
        keys = [f"{number * 7919 % count:09d}/{FOLDER}.jpg" for number in range(start, start + size)]
        yield pa.RecordBatch.from_pydict(
            {"uri": [f"s3://bucket/{key}" for key in keys], "key": keys, "etag": keys, "bytes": [1] * size}, LISTING
        )


def test_more_than_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB gets less memory than the listing takes, and not much more than the answer."""
    monkeypatch.setattr(listing, "MEMORY", "80MB")
    monkeypatch.setattr(listing, "_ROWS", 2**14)
    count = 300_000
    with spool(numbered(count)) as found:
        pending = found.pending((batch.select(VERSION.names) for batch in numbered(count // 2)), count)
    done = {key for batch in numbered(count // 2) for key in batch["key"].to_pylist()}
    assert pending.nbytes > 50e6
    assert pending["key"].to_pylist() == sorted(
        key for batch in numbered(count) for key in batch["key"].to_pylist() if key not in done
    )


def test_memory_does_not_grow_with_what_is_labelled_or_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_ROWS", 4000)
    peaks = [most_held(count) for count in (20_000, 160_000)]
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[0] > 4000 * 200  # something was measured


def most_held(count: int) -> int:
    """Most bytes of Arrow's while as many images were listed and subtracted, looked at with each batch."""
    before, most = pa.total_allocated_bytes(), 0

    def watched(schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        nonlocal most
        for batch in numbered(count):
            most = max(most, pa.total_allocated_bytes() - before)
            yield batch.select(schema.names)

    with spool(watched(LISTING)) as found:
        assert len(found.pending(watched(VERSION), 10)) == 0
    return most


def test_an_error_of_the_listing_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken() -> Iterator[pa.RecordBatch]:
        yield from numbered(1000)
        raise ConnectionResetError("by peer")

    with pytest.raises(ConnectionResetError, match="by peer"), spool(broken()):
        pytest.fail("there is no listing")
    assert not os.listdir(tmp_path)
    with spool(numbered(1000)) as found:
        assert os.listdir(tmp_path)
        with pytest.raises(ConnectionResetError, match="by peer"):
            found.pending((batch.select(VERSION.names) for batch in broken()), 10)
    assert not os.listdir(tmp_path)
