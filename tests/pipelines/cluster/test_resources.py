"""How workers and actors share a cluster: refused with a remedy when they do not fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cluster.resources import WorkerRange, divide
from pspnet_core.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(("text", "low", "high"), [("4", 4, 4), ("1:8", 1, 8), ("3:3", 3, 3)])
def test_worker_ranges(text: str, low: int, high: int) -> None:
    assert WorkerRange.parse(text) == WorkerRange(low=low, high=high)


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1:", ":4", "8:1", "1:2:3", "1.5"])
def test_bad_worker_ranges(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^workers="):
        WorkerRange.parse(text)


@given(st.integers(1, 64), st.integers(1, 256), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, derandomize=True)
def test_cpu_actors_fit_and_leave_the_reserve(workers: int, cpus: int, reserve: float) -> None:
    try:
        part = divide(workers, None, reserve=reserve, resources={"CPU": cpus})
    except ConfigError:
        assert workers > cpus  # only a crowd is refused
        return
    assert part.gpus == 0
    assert 1 <= part.on({"CPU": cpus}, machine=GIB).threads <= cpus
    assert part.cpus >= 0.05
    assert workers * part.cpus <= cpus * (1 - reserve) + 1e-9


def test_gpu_actors_take_one_gpu_each_by_default() -> None:
    part = divide(4, None, reserve=0.5, resources={"CPU": 16, "GPU": 4})
    assert (part.gpus, part.cpus) == (1.0, 1.0)
    assert divide(8, 0.5, reserve=0.5, resources={"CPU": 16, "GPU": 4}).gpus == 0.5
    with pytest.raises(ConfigError, match="the cluster has 4 GPUs"):
        divide(5, None, reserve=0.5, resources={"CPU": 16, "GPU": 4})


def test_threads_follow_the_node_and_not_the_head() -> None:
    part = divide(8, 1.0, reserve=0.5, resources={"CPU": 6})  # an idle cluster: only the head is there
    assert part.on({"CPU": 8, "GPU": 1}, machine=GIB).threads == 8
    assert part.on({"CPU": 48, "GPU": 4}, machine=GIB).threads == 12


def test_memory_for_a_pass_is_half_of_an_actors_share() -> None:
    part = divide(4, None, reserve=0.5, resources={"CPU": 16})
    assert part.on({"CPU": 16}, machine=64 * GIB).pass_memory == 8 * GIB
    assert part.on({"CPU": 4}, machine=64 * GIB).pass_memory == 16 * GIB  # two fit
    assert part.on({"CPU": 1}, machine=64 * GIB).pass_memory == 32 * GIB  # the node is smaller than the others


@pytest.mark.parametrize(("gpus", "expected"), [(1.0, 40), (0.25, 10), (2.0, 40)])
def test_memory_for_a_pass_is_the_gpus_where_there_is_one(gpus: float, expected: float) -> None:
    part = divide(2, gpus, reserve=0.5, resources={"CPU": 16, "GPU": 4})
    assert part.on({"CPU": 16, "GPU": 4}, machine=64 * GIB, gpu=80 * GIB).pass_memory == expected * GIB


def test_logical_gpus_divide_the_machine() -> None:
    part = divide(2, 0.5, reserve=0.5, resources={"CPU": 16, "GPU": 1})
    assert part.on({"CPU": 16, "GPU": 1}, machine=64 * GIB).pass_memory == 16 * GIB


def test_gpus_may_be_asked_for_before_the_autoscaler_has_brought_them() -> None:
    assert divide(2, 1.0, reserve=0.5, resources={"CPU": 8}).gpus == 1.0
