"""Plans: how chunks are cut, that only one of two drivers makes a plan, what is pending, and how much a plan holds."""

import dataclasses
import datetime
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.label_table import ledger as ledgers
from pipelines.label_table.index import read_label_file
from pipelines.label_table.ledger import UNSIZED, ChunkLimits, Ledger, PlanSpec, chunk_bounds
from pipelines.label_table.listing import spool
from pipelines.label_table.schema import LISTING, MASKS, Paths
from pipelines.process.retrying import Retries
from pipelines.storage import StoredObject, open_store
from pipelines.storage.arrow import to_parquet
from pipelines.storage.base import LeftOut
from pipelines.storage.local import LocalStore
from pspnet_core.errors import ConfigError
from tests.support.stores import CountingStore

SPEC = PlanSpec(source="images", input=["/bucket"], date="2026-01-31", mask="rle")
LIMITS = ChunkLimits(images=3, bytes=1000)


def listing(*keys: str, etag: str = "1", size: int = 10) -> pa.Table:
    rows = [{"uri": f"/bucket/{key}", "key": key, "etag": etag, "bytes": size} for key in keys]
    return pa.Table.from_pylist(rows, schema=LISTING)


def pending(ledger: Ledger, listed: pa.Table) -> pa.Table:
    with spool(listed.to_batches()) as found:
        return ledger.pending(found)


def unlisted(ledger: Ledger, listed: pa.Table) -> int:
    with spool(listed.to_batches()) as found:
        return ledger.unlisted(found)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    store = open_store(str(tmp_path / "labels"), field="output")
    store.check_writable_atomically()
    return Ledger(store, Paths(partition="m-0123"))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 9), st.integers(1, 120))
def test_chunks_cover_everything_within_the_limits(sizes: list[int], images: int, limit: int) -> None:
    bounds = chunk_bounds(np.array(sizes, np.int64), ChunkLimits(images=images, bytes=limit))
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(len(sizes)))
    for start, stop in bounds:
        assert 1 <= stop - start <= images
        assert sum(sizes[start:stop]) <= limit or stop - start == 1
    # No two neighbours would fit into one chunk, up to what the first image of the next brings.
    for (start, stop), _ in itertools.pairwise(bounds):
        assert stop - start == images or sum(sizes[start:stop]) + sizes[stop] > limit


def test_images_of_untold_size_fill_no_chunk_beyond_its_bytes() -> None:
    sizes = np.array([0, -5] * 4 + [UNSIZED], np.int64)
    assert chunk_bounds(sizes, ChunkLimits(images=100, bytes=4 * UNSIZED)) == [(0, 4), (4, 8), (8, 9)]


def test_a_plan_says_what_it_was_told(ledger: Ledger) -> None:
    assert ledger.latest_plan() is None
    made = ledger.make_plan(listing(*"abcdefg"), SPEC, LIMITS, None)
    assert (made.number, made.chunks, made.images, made.spec, made.date) == (0, 3, 7, SPEC, "2026-01-31")
    assert ledger.latest_plan() == made
    chunks = ["".join(ledger.read_chunk(made, chunk)["key"].to_pylist()) for chunk in range(3)]
    assert chunks == ["abc", "def", "g"]
    assert ledger.missing_chunks(made) == [0, 1, 2]
    assert not ledger.is_finished(made)


def test_of_two_drivers_the_second_gets_the_first_ones_plan(ledger: Ledger) -> None:
    first = ledger.make_plan(listing("a", "b"), SPEC, LIMITS, None)
    second = ledger.make_plan(listing("b", "c", "d"), SPEC, LIMITS, None)
    assert second == first
    following = ledger.make_plan(listing("z"), SPEC, LIMITS, first)
    assert following.number == 1
    assert ledger.latest_plan() == following


def label_rows(ledger: Ledger, keys: str, chunk: int, etag: str = "1", plan: int = 0) -> None:
    row = {"etag": etag, "bytes": 1, "status": "ok", "run_id": "r", "labelled_at": 0}
    rows = [row | {"uri": f"/bucket/{key}", "key": key} for key in keys]
    path = ledger.paths.chunk("2026-01-31", plan, chunk)
    assert ledger.store.put_if_absent(path, to_parquet(pa.Table.from_pylist(rows, schema=MASKS)))


def test_pending_is_what_no_row_names_with_its_etag(ledger: Ledger) -> None:
    label_rows(ledger, "abc", 0)
    label_rows(ledger, "d", 1, etag="old")
    assert pending(ledger, listing(*"edcba"))["key"].to_pylist() == ["d", "e"]
    plan = ledger.make_plan(listing(*"edcba"), SPEC, LIMITS, None)
    assert ledger.missing_chunks(plan) == []  # both of its chunks are there, by name


def test_another_model_is_another_ledger(ledger: Ledger) -> None:
    label_rows(ledger, "abc", 0)
    other = Ledger(ledger.store, Paths(partition="m-4567"))
    assert len(pending(other, listing(*"abc"))) == 3


def test_a_plan_of_nothing_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        ledger.make_plan(listing(), SPEC, LIMITS, None)
    assert ledger.latest_plan() is None


def test_images_of_an_open_plan_that_are_gone_count_as_unlisted(ledger: Ledger) -> None:
    assert unlisted(ledger, listing("a")) == 0
    plan = ledger.make_plan(listing("a", "b", "c"), SPEC, LIMITS, None)
    assert unlisted(ledger, listing("c", "d")) == 2
    assert ledger.store.put_if_absent(ledger.paths.run(plan.run_id), b"{}")
    assert unlisted(ledger, listing("c", "d")) == 0


def test_what_a_plan_has_no_room_for_waits_for_the_next(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on images and one on chunks; the plans together hold everything, once."""
    monkeypatch.setattr(ledgers, "PLAN_IMAGES", 5)
    monkeypatch.setattr(ledgers, "PLAN_CHUNKS", 2)
    letters = "abcdefghijk"
    listed, plan, planned = listing(*reversed(letters)), None, []
    while len(rest := pending(ledger, listed)):
        assert len(rest) <= 5
        plan = ledger.make_plan(rest, SPEC, ChunkLimits(images=2, bytes=1000), plan)
        chunks = ["".join(ledger.read_chunk(plan, chunk)["key"].to_pylist()) for chunk in range(plan.chunks)]
        planned.append(chunks)
        for number, keys in enumerate(chunks):
            label_rows(ledger, keys, number, plan=plan.number)
    assert planned == [["ab", "cd"], ["ef", "gh"], ["ij", "k"]]
    assert plan
    assert plan.number == 2


def test_rows_come_in_the_order_of_the_chunks(ledger: Ledger) -> None:
    letters = "".join(chr(ord("a") + number) for number in range(26))
    plan = ledger.make_plan(listing(*letters), SPEC, ChunkLimits(images=1, bytes=1000), None)
    for chunk in reversed(range(26)):
        label_rows(ledger, letters[chunk], chunk)
    label_rows(ledger, "other", 0, plan=1)
    batches = list(ledger.rows(plan, ["status", "key"]))
    assert [key for batch in batches for key in batch["key"].to_pylist()] == list(letters)
    assert batches[0].schema.names == ["status", "key"]


def test_looking_up_a_chunk_does_not_cost_more_in_a_longer_plan(tmp_path: Path) -> None:
    """But for the first one in a process, which reads the plan's footer."""
    costs = []
    for images in (10, 1000):
        store = CountingStore(tmp_path / f"{images}")
        ledger = Ledger(store, Paths(partition="m-0123"))
        keys = [f"{number:04d}" for number in range(images)]
        plan = ledger.make_plan(listing(*keys), SPEC, ChunkLimits(images=1, bytes=1000), None)
        ledger.read_chunk(plan, 0)
        store.read_bytes = 0
        assert [ledger.read_chunk(plan, chunk)["key"].to_pylist() for chunk in (3, 7)] == [["0003"], ["0007"]]
        costs.append(store.read_bytes)
    assert costs[0] == costs[1] > 0


class Lagging(LocalStore):
    """Shows in listings of the label table and of plans only what was there when it was last let catch up."""

    def __init__(self, root: str) -> None:
        super().__init__(root, field="output", retries=Retries())
        self.shown = frozenset[str]()

    def catch_up(self) -> None:
        self.shown = frozenset(item.key for item in super()._list(""))

    def _list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
        return (item for item in super()._list(prefix, left_out) if item.key in self.shown)


def test_what_no_listing_shows_yet_is_labelled_all_the_same(tmp_path: Path) -> None:
    """Some stores list what was written a minute later, though they give it to whoever asks for it."""
    store = Lagging(str(tmp_path))
    store.check_writable_atomically()
    ledger, plan, listed = Ledger(store, Paths(partition="m-0123")), None, listing(*"abc")
    for number, more in enumerate(("", "de", "f")):
        listed = pa.concat_tables([listed, listing(*more)])
        plan = ledger.make_plan(pending(ledger, listed), SPEC, LIMITS, plan)
        assert ledger.latest_plan() == plan
        assert "".join(ledger.read_chunk(plan, 0)["key"].to_pylist()) == ("abc", "de", "f")[number]
        assert ledger.lost_chunks(plan) == [0]
        label_rows(ledger, ("abc", "de", "f")[number], 0, plan=number)
        assert (ledger.missing_chunks(plan), ledger.lost_chunks(plan)) == ([0], [])
        assert len(pending(ledger, listed)) == 0
    store.catch_up()
    assert len(pending(ledger, listed)) == 0
    assert ledger.latest_plan() == plan


def test_a_plan_is_younger_than_the_one_before_whatever_the_clock_says(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = ledger.make_plan(listing("a"), SPEC, LIMITS, None)
    earlier = first.made - datetime.timedelta(hours=2)
    monkeypatch.setattr(ledgers, "utc_now", lambda: earlier)
    second = ledger.make_plan(listing("b"), SPEC, LIMITS, first)
    assert second.made > first.made
    assert second.run_id > first.run_id
    (told,) = caplog.messages
    assert told.startswith(f"the clock says {earlier.isoformat(timespec='seconds')}, ")


HEADER: dict[str, Any] = {
    "schema": 1,
    "run_id": "r",
    "made": "2026-01-31T12:00:00+00:00",
    "spec": dataclasses.asdict(SPEC),
}


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ({}, "schema"),
        (HEADER | {"run_id": "../../etc"}, "run_id"),
        (HEADER | {"made": "yesterday"}, "made"),
        (HEADER | {"made": "2026-01-31T12:00:00"}, "made"),
        (HEADER | {"made": "9999-12-31T23:59:59+00:00"}, "made"),
        (HEADER | {"spec": {**HEADER["spec"], "date": "2026-01-31/../../x"}}, "spec.date"),
        (HEADER | {"spec": {**HEADER["spec"], "mask": "jpeg"}}, "spec.mask"),
        (HEADER | {"spec": {**HEADER["spec"], "input": "/bucket"}}, "spec.input"),
        (None, ""),
    ],
)
def test_what_is_no_plan_is_told_in_one_line(ledger: Ledger, header: dict[str, Any] | None, place: str) -> None:
    data = b"PAR1" if header is None else to_parquet(listing("a"), metadata=header)
    assert ledger.store.put_if_absent(ledger.paths.plan(3), data)
    with pytest.raises(ConfigError, match=rf"000003\.parquet: is no plan \({place}[^\n]*\): restore it") as found:
        ledger.latest_plan()
    assert "\n" not in str(found.value)


def test_a_plan_without_a_column_is_told_too(ledger: Ledger) -> None:
    rows = listing("a").drop_columns(["etag"])
    assert ledger.store.put_if_absent(ledger.paths.plan(0), to_parquet(rows, metadata=HEADER))
    plan = ledger.latest_plan()
    assert plan is not None
    with pytest.raises(ConfigError, match="is no plan"):
        ledger.read_chunk(plan, 0)


def test_copies_in_folders_of_their_own_are_neither_plans_nor_chunks(ledger: Ledger) -> None:
    plan = ledger.make_plan(listing("a"), SPEC, LIMITS, None)
    data = ledger.store.read(ledger.paths.plan(0))
    assert ledger.store.put_if_absent(f"{ledger.paths.plans}old/000007.parquet", data)
    assert ledger.store.put_if_absent(f"{ledger.paths.day(SPEC.date)}backup/000000-000000.parquet", data)
    assert ledger.latest_plan() == plan
    assert ledger.lost_chunks(plan) == [0]


def test_any_damage_is_told_in_one_line(ledger: Ledger) -> None:
    """One bit of a plan, or of a label file, that has turned over."""
    plan = ledger.make_plan(listing(*"abcdefgh"), SPEC, LIMITS, None)
    label_rows(ledger, "abc", 0)
    chunk = ledger.paths.chunk(SPEC.date, 0, 0)

    def read_rows() -> object:
        return read_label_file(ledger.store, chunk, ["uri", "etag"])

    def read_plan() -> object:
        return ledger.read_plan(0), ledger.read_chunk(plan, 1)

    reads: dict[str, Callable[[], object]] = {ledger.paths.plan(0): read_plan, chunk: read_rows}
    chance, told = random.Random(7), set[str]()
    for path, read in reads.items():
        whole, place = ledger.store.read(path), Path(ledger.store.uri_of(path))
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            place.write_bytes(damaged)
            ledgers._footer.cache_clear()
            try:
                read()
            except ConfigError as error:
                told.add(str(error).partition("(")[0])
        place.write_bytes(whole)
    assert {text.partition(": ")[2].partition(": ")[0] for text in told} <= {"is no plan ", "this is no label file"}
    assert len(told) == 2
