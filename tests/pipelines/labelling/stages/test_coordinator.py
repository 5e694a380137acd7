"""The small actor that all stages of a run ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pytest

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.label_table.ledger import Ledger, Plan
from pipelines.label_table.schema import Paths, Stamp, utc_now
from pipelines.labelling.executor import Stage
from pipelines.labelling.retry_errors import FailedFile, Rewrite
from pipelines.labelling.stages.chunks import ENCODED, Work, Write
from pipelines.labelling.stages.coordinator import ATTEMPTS, ChunkFailed, coordinated
from pipelines.storage import open_store
from pipelines.storage.arrow import to_ipc
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def processes() -> list[psutil.Process]:
    """Those of coordinators, among the children of this process and their children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # ended meanwhile
            continue
        if "_State" in title:
            found.append(process)
    return found


def only_process() -> psutil.Process:
    """The one that is left once those of coordinators before it have gone."""
    until(lambda: len(processes()) == 1)
    (process,) = processes()
    return process


def test_attempts_are_counted_until_a_chunk_is_done() -> None:
    with coordinated() as coordinator:
        assert [coordinator.begin(chunk) for chunk in (0, 1, 0, 0)] == [1, 1, 2, 3]
        coordinator.done(0)
        assert [coordinator.begin(chunk) for chunk in (0, 1)] == [1, 2]
        coordinator.withdraw(1)
        assert coordinator.begin(1) == 2


def test_an_image_is_to_blame_for_the_second_process_that_ends_with_it_alone() -> None:
    with coordinated() as coordinator:
        assert [coordinator.begin(0) for _ in range(3)] == [1, 2, 3]
        for image, deadly in ((7, set()), (8, set()), (7, {7}), (8, {7, 8})):
            coordinator.announce(0, image)
            assert coordinator.begin(0) == 3, "it is the image's attempt"
            assert coordinator.deadly(0) == deadly
        coordinator.announce(0, 9)
        coordinator.announce(0, None)
        assert coordinator.begin(0) == 4
        assert coordinator.deadly(1) == set()
        coordinator.done(0)
        assert (coordinator.begin(0), coordinator.deadly(0)) == (1, frozenset())


def test_what_was_announced_before_a_coordinator_came_back_does_not_count() -> None:
    with coordinated() as coordinator:
        coordinator.announce(0, 7)
        assert (coordinator.begin(0), coordinator.begin(0)) == (1, 2)


def test_a_chunk_that_ends_too_many_processes_is_not_begun_again() -> None:
    with coordinated() as coordinator:
        assert [coordinator.begin(1) for _ in range(ATTEMPTS)] == list(range(1, ATTEMPTS + 1))
        with pytest.raises(ChunkFailed, match=rf"^chunk 1 ended the process that segments it {ATTEMPTS} times"):
            coordinator.begin(1)
        assert coordinator.begin(2) == 1


WRITERS: dict[str, Callable[[Work], Stage]] = {
    "write": lambda work: Write(work, cast(Plan, None)),
    "rewrite": lambda work: Rewrite(work, cast(list[FailedFile], [None]), ("all",)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_chunk_that_ends_its_writers_is_not_written_for_ever(writer: str, tmp_path: Path) -> None:
    whole = to_ipc(ENCODED.empty_table())
    row = {"chunk": 0, "payload": whole, "images": 0}
    store = open_store(str(tmp_path), field="output")
    with coordinated() as coordinator:
        work = Work(
            ledger=Ledger(store, Paths(partition="grey-0")),
            stamp=Stamp(run_id="run", made=utc_now(), mask="rle"),
            model="grey",
            classes=SCENE_CLASSES,
            pixels=1,
            coordinator=coordinator,
        )
        stage = WRITERS[writer](work)
        for _ in range(ATTEMPTS + 1):  # of attempts that succeed there may be any number
            stage(row)
        for _ in range(ATTEMPTS):
            with pytest.raises(pa.ArrowInvalid):  # breaks off in the middle, as with a process
                stage(row | {"payload": whole[:20]})
        with pytest.raises(ChunkFailed, match=rf"^chunk 0 ended the process that writes it {ATTEMPTS} times"):
            stage(row)


def test_no_chunk_begins_once_it_is_closed() -> None:
    with coordinated() as coordinator:
        assert coordinator.admits(0)
        coordinator.close()
        assert not coordinator.admits(1)
    with coordinated() as another:
        assert another.admits(0)


def test_one_that_dies_comes_back() -> None:
    with coordinated() as coordinator:
        assert [coordinator.begin(0), coordinator.begin(0)] == [1, 2]
        process = only_process()
        process.kill()
        process.wait(60)
        assert coordinator.admits(1)
        assert coordinator.begin(0) in (1, 2), "it has forgotten the attempts, which only bounds them later"


def test_it_ends_with_the_run() -> None:
    with coordinated() as coordinator:
        coordinator.admits(0)
        process = only_process()
    process.wait(60)
