"""The small actor that all stages of a run ask."""

from __future__ import annotations

import os
import signal

import psutil  # type: ignore[import-untyped]
import pytest

from pipelines.coordinator import coordinated

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


def test_attempts_are_counted_until_a_chunk_is_done() -> None:
    with coordinated() as coordinator:
        assert [coordinator.begin(chunk) for chunk in (0, 1, 0, 0)] == [1, 1, 2, 3]
        coordinator.done(0)
        assert [coordinator.begin(chunk) for chunk in (0, 1)] == [1, 2]
        coordinator.withdraw(1)
        assert coordinator.begin(1) == 2


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
        (process,) = processes()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        assert coordinator.admits(1)
        assert coordinator.begin(0) in (1, 2), "it has forgotten the attempts, which only bounds them later"


def test_it_ends_with_the_run() -> None:
    with coordinated() as coordinator:
        coordinator.admits(0)
        (process,) = processes()
    process.wait(60)
