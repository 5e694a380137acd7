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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max\n", None), (str(2**62), None), ("536870912\n", 512 * 2**20), (None, None)],  # by either version of cgroups
)
def test_memory_is_the_machines_or_a_containers_limit(
    text: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text:
        (tmp_path / "limit").write_text(text)
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "absent", tmp_path / "limit"))
    assert machine_memory() == (expected or psutil.virtual_memory().total)


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


@pytest.mark.parametrize("has_a_way", [True, False])
def test_the_c_library_gives_memory_back_where_it_can(has_a_way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    library = SimpleNamespace(malloc_trim=kept.append) if has_a_way else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    give_memory_back()
    assert kept == [0] * has_a_way
