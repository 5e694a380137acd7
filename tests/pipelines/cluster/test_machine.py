"""The memory and the CPUs that there are, in a container and out of it."""

import ctypes
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from pipelines.cluster import machine
from pipelines.cluster.machine import give_memory_back, machine_cpus, machine_memory


@pytest.mark.parametrize("text", ["max\n", str(2**62)])  # no limit, by either version of control groups
def test_without_a_limit_it_is_the_machines(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "limit"
    limit.write_text(text)
    monkeypatch.setattr(machine, "LIMITS", (limit, tmp_path / "absent"))
    assert machine_memory() == psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "limit"
    limit.write_text("536870912\n")
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "absent", limit))
    assert machine_memory() == 512 * 2**20


def test_where_there_are_no_control_groups_it_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LIMITS", ())
    assert machine_memory() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000\n", 8), ("200000 100000\n", 2), ("50000 100000\n", 1), (None, 8)]
)
def test_cpus_are_those_of_a_containers_quota(
    text: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text:
        (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine_cpus() == expected


def test_memory_that_nothing_refers_to_is_let_go_of() -> None:
    class Knot:
        pass

    knot = Knot()
    knot.own = knot  # type: ignore[attr-defined]
    seen = weakref.ref(knot)
    del knot
    give_memory_back()
    assert seen() is None


def test_a_c_library_without_a_way_to_give_memory_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name))
    give_memory_back()
    assert asked == [None]


def test_a_c_library_with_a_way_to_give_memory_back_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=kept.append))
    give_memory_back()
    assert kept == [0]
