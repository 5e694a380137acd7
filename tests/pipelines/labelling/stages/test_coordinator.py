"""How often a chunk is tried, and what ended its processes."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pytest

from pipelines.label_table.ledger import ChunkLimits, Plan, PlanSpec
from pipelines.label_table.schema import LISTING, MASKS, utc_now
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import Chunk, Read, RunContext, Write
from pipelines.labelling.stages.coordinator import (
    ALL_ALONE,
    ALONE,
    ATTEMPTS,
    TOGETHER,
    ChunkStates,
    Coordinator,
)
from pipelines.labelling.stages.ray_line import start_coordinator
from pspnet_core.errors import ImageError
from tests.pipelines.labelling.stages.test_segment import context_in
from tests.support.waiting import until


def processes() -> list[psutil.Process]:
    """Those of coordinators, among the children of this process and their children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if "ChunkStates" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_attempts_are_counted_until_a_chunk_is_done() -> None:
    states = ChunkStates()
    assert [states.begin(chunk).number for chunk in (0, 1, 0, 0)] == [1, 1, 2, 3]
    assert (states.ended(0), states.ended(2)) == (3, 0)
    states.done(0)
    assert [states.begin(chunk).number for chunk in (0, 1)] == [1, 2]
    states.renew()
    assert states.begin(1).number == 1


def test_images_are_labelled_together_then_alone_then_given_up() -> None:
    states = ChunkStates()
    attempts = [states.begin(0) for _ in range(TOGETHER + ALONE + 2)]
    assert [attempt.is_alone for attempt in attempts] == [False] * TOGETHER + [True] * (ALONE + 2)
    assert [attempt.gives_up for attempt in attempts] == [False] * (TOGETHER + ALONE) + [True] * 2


def test_an_image_is_to_blame_for_the_process_that_ends_with_it_alone() -> None:
    states = ChunkStates()
    states.begin(0)
    for image in (7, 8, 9):
        states.announce(0, image)
    attempt = states.begin(0)
    assert (set(attempt.good), set(attempt.to_blame)) == ({7, 8}, {9})
    states.announce(0, 3)
    states.announce(0, None)
    assert (set(states.begin(0).good), set(states.begin(0).to_blame)) == ({3, 7, 8}, {9})
    states.done(0)
    assert (states.begin(0).good, states.begin(0).to_blame) == (frozenset(), {})


def test_attempts_go_on_as_long_as_each_finds_an_image_to_blame() -> None:
    states = ChunkStates()
    for _ in range(TOGETHER):
        states.begin(0)
    late = ImageError("TimedOut", "the network")
    for image in range(ALL_ALONE):
        attempt = states.begin(0)
        assert (attempt.is_alone, attempt.gives_up, len(attempt.to_blame)) == (True, False, image)
        states.announce(0, image)
        states.explain(0, late)
    last = states.begin(0)
    assert (last.gives_up, last.reason, len(last.to_blame)) == (True, "the network", ALL_ALONE)
    assert set(last.to_blame.values()) == {late}


def test_the_last_attempt_trusts_no_image() -> None:
    states = ChunkStates()
    states.begin(0)
    states.announce(0, 1)
    states.announce(0, 2)
    attempts = [states.begin(0) for _ in range(TOGETHER + ALONE + 1)]
    assert [set(attempt.good) for attempt in attempts[-2:]] == [{1}, set()]
    assert set(attempts[-1].to_blame) == {2}


def test_what_was_announced_before_a_coordinator_came_back_does_not_count() -> None:
    states = ChunkStates()
    states.announce(0, 7)
    assert not states.begin(0).to_blame


def test_no_chunk_begins_once_it_is_closed() -> None:
    states = ChunkStates()
    assert states.admit(0) == 1
    states.close()
    assert states.admit(1) == 0


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return context_in(tmp_path, ChunkStates())


@pytest.fixture
def plan(context: RunContext, tmp_path: Path) -> Plan:
    """One chunk of one image, which is not there."""
    image = str(tmp_path / "a.jpg")
    pending = pa.table({"uri": [image], "key": ["a.jpg"], "etag": ["1"], "bytes": [1]}, schema=LISTING)
    spec = PlanSpec(source="images", input=(str(tmp_path),), date="2026-01-31", mask="rle")
    return context.ledger.make_plan(pending, spec, ChunkLimits(images=1, bytes=1), None)


def errors(table: pa.Table) -> list[str]:
    return [text.partition(":")[0] for text in table["error"].to_pylist()]


def test_images_whose_reading_ends_the_process_again_and_again_are_crashed(context: RunContext, plan: Plan) -> None:
    read = Read(context, plan)
    for _ in range(ATTEMPTS):  # of which nothing came back
        assert errors(read(0).table) == ["Missing"]
    chunk = read(0)
    assert (errors(chunk.table), chunk.totals.given_up) == (["Crashed"], 1)


def test_a_chunk_that_ends_its_writers_becomes_error_rows_then_is_given_up(context: RunContext, plan: Plan) -> None:
    row = {"uri": "a", "key": "a", "etag": "1", "bytes": 1, "status": "ok", "mask_lengths": [4], "run_id": "run"}
    table = pa.Table.from_pylist([row | {"labelled_at": utc_now()}], schema=MASKS)
    whole = Chunk(number=0, table=table, totals=Totals(images=1, labelled=1))
    write = Write(context, plan)
    # Of attempts that succeed there may be any number; who finds the chunk written counts none of its images.
    assert [write(whole).totals.labelled for _ in range(ATTEMPTS + 1)] == [1] + [0] * ATTEMPTS
    for _ in range(ATTEMPTS):
        with pytest.raises(ZeroDivisionError), context.coordinator.writing(0):
            raise ZeroDivisionError  # breaks off in the middle, as with a process
    path = context.ledger.paths.chunk(plan.date, plan.number, 0)
    context.output.delete(path)
    chunk = write(whole)
    assert (chunk.totals.labelled, chunk.totals.kinds, chunk.totals.given_up) == (0, {"Crashed": 1}, 1)
    (written,) = context.ledger.rows(plan, ["status", "error", "mask_lengths"])
    assert (written["status"].to_pylist(), written["mask_lengths"].to_pylist()) == (["error"], [None])
    for _ in range(2 * ATTEMPTS):
        with pytest.raises(ZeroDivisionError), context.coordinator.writing(0):
            raise ZeroDivisionError
    context.output.delete(path)
    chunk = write(whole)
    assert (chunk.totals.done, chunk.totals.given_up) == (0, 1)
    assert not context.output.exists(path), "the run says at its end what is missing"


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_dies_comes_back_and_ends_with_the_run() -> None:
    with start_coordinator() as line:
        coordinator = Coordinator(line)
        assert [coordinator.begin(0).number, coordinator.begin(0).number] == [1, 2]
        before = processes()
        os.kill(before[0].pid, signal.SIGKILL)
        before[0].wait(60)
        assert coordinator.admit(1)
        assert coordinator.begin(0).number in (1, 2), "it has forgotten the attempts, which only bounds them later"
        assert coordinator.has_failed(0)
    until(lambda: not processes())
