"""Number formats by hardware, with the hardware's answers made up, and the memory layout of a placed model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pspnet_core import device
from pspnet_core.device import (
    PRECISIONS,
    ToHost,
    autocast,
    best_device,
    compile_network,
    inference_dtype,
    is_async,
    place,
    to_device,
    total_memory,
    training_dtype,
    training_layout,
)
from pspnet_core.errors import ConfigError

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
QUESTION = "_is_avx512_bf16_supported"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16)],
)
def test_cuda_takes_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    asked: list[torch.device] = []

    def answer(asked_for: torch.device) -> tuple[int, int]:
        asked.append(asked_for)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
    assert inference_dtype(CUDA) == expected
    assert asked == [CUDA]


@pytest.mark.parametrize(("hardware", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_takes_bfloat16_where_its_hardware_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, hardware: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, QUESTION, lambda: hardware, raising=False)
    assert inference_dtype(CPU) == expected


def test_cpu_stays_at_float32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, QUESTION, raising=False)
    assert inference_dtype(CPU) == torch.float32


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {CUDA: SimpleNamespace(total_memory=24 * 2**30)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    assert total_memory(CUDA) == 24 * 2**30
    assert total_memory(CPU) is None


@pytest.mark.parametrize(("present", "expected"), [(True, "cuda"), (False, "cpu")])
def test_best_device(monkeypatch: pytest.MonkeyPatch, present: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert best_device().type == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_sets_the_format_and_takes_it_back(dtype: torch.dtype) -> None:
    values = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (values @ values).dtype == dtype
    assert (values @ values).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_training_takes_the_format_of_inference_unless_told(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "inference_dtype", lambda _: dtype)
    assert training_dtype(CUDA) == dtype
    assert {name: training_dtype(CUDA, name) for name in PRECISIONS if name != "auto"} == {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    with pytest.raises(ConfigError, match=r"^precision=half: choose one of auto, float32, bfloat16, float16$"):
        training_dtype(CUDA, "half")


def test_deterministic_mode_is_for_the_whole_process() -> None:
    program = """
import os, torch
from pspnet_core.device import make_deterministic
make_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("where", "expected"), [(CUDA, {"mode": "reduce-overhead"}), (CPU, {"options": {"freezing": True}})]
)
def test_compilation_is_asked_for_by_device(
    monkeypatch: pytest.MonkeyPatch, where: torch.device, expected: dict[str, object]
) -> None:
    asked: list[dict[str, object]] = []

    def compile_(function: Callable[[int], int], **options: object) -> Callable[[int], int]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    assert compile_network(abs, where)(-1) == 1
    assert asked == [expected]


@pytest.mark.parametrize(
    ("where", "expected"),
    [(CUDA, torch.channels_last), (CPU, torch.contiguous_format), (META, torch.contiguous_format)],
)
def test_layouts_of_training(where: torch.device, expected: torch.memory_format) -> None:
    assert training_layout(where) == expected


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_place_changes_the_layout_and_no_value(monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
    monkeypatch.setattr(device, "training_layout", lambda _: layout)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert place(model, CPU) is model
    assert model.state_dict()["0.weight"].is_contiguous(memory_format=layout)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class OnGpu:
    """A tensor that says it lies on a GPU, and how it was asked to leave."""

    device = CUDA

    def __init__(self, tensor: torch.Tensor, said: list[str]) -> None:
        self.tensor, self.said = tensor, said

    def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
        self.said.append(f"to {device}, {'behind' if non_blocking else 'before'} the rest")
        return self.tensor


def test_what_comes_from_a_gpu_is_waited_for_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    coming = ToHost(*(OnGpu(torch.full((2, 3), value), said) for value in (1, 2)))  # type: ignore[arg-type]
    assert said == ["to cpu, behind the rest", "to cpu, behind the rest", "record"]
    assert [array.tolist() for array in coming.arrays()] == [[[1, 1, 1]] * 2, [[2, 2, 2]] * 2]
    assert said[3:] == ["synchronize"]


def test_to_the_cpu_and_back_nothing_is_copied_or_waited_for() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    tensor = to_device(array, CPU)
    (back,) = ToHost(tensor).arrays()
    assert np.shares_memory(array, back)
    np.testing.assert_array_equal(array, back)


def test_a_gpu_does_not_need_its_caller() -> None:
    assert [is_async(where) for where in (CPU, META, CUDA)] == [False, False, True]
