"""Device of the network: number format, memory layout, transfers and compilation. No other module asks for these."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pspnet_core.errors import check_choice


def best_device() -> torch.device:
    """Choose CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inference_dtype(device: torch.device) -> torch.dtype:
    """Choose the number format in which convolutions are fastest on this device.

    bfloat16 where the hardware multiplies it: NVIDIA from Ampere on, CPUs with AVX-512 BF16 or AMX. Elsewhere on CPUs
    bfloat16 is emulated (measured at 0.13 times the speed of float32 on an AVX2 CPU, PSPNet-18) and float32 it is; on
    older GPUs float16.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # Absent from the older releases in our range; without an answer float32 is the safe one.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


PRECISIONS = {
    "auto": "the fastest that the hardware has: bfloat16, on older GPUs float16, on other CPUs float32",
    "float32": "everything in float32",
    "bfloat16": "forward and backward of convolutions in bfloat16, the rest in float32",
    "float16": "the same in float16, with the loss scaled so that small gradients do not vanish",
}


def training_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Choose the number format of the convolutions in training; the weights stay float32.

    Args:
        precision: a row of ``PRECISIONS``.

    Raises:
        ConfigError: for another one.
    """
    check_choice("precision", precision, PRECISIONS)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return inference_dtype(device) if precision == "auto" else formats[precision]


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run the enclosed forward pass of training in ``dtype`` where it is safe; float32 leaves it as it is."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def make_deterministic() -> None:
    """Make this process repeat its results to the last bit; some kernels are slower for it.

    Call it before anything runs on a GPU. An operation that has no deterministic form on the device raises RuntimeError
    when it is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def training_layout(device: torch.device) -> torch.memory_format:
    """The memory layout of weights and images in training: channels last on GPUs.

    Not on CPUs, where the backward pass of convolutions is slower that way: measured at 1.2 times the time of the plain
    layout for a step of PSPNet-50 (AVX2). Inference is faster channels last everywhere, and ``deploy`` makes it
    so.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model that is to be trained to the device, in ``training_layout``."""
    model.to(device)
    model.to(memory_format=training_layout(device))  # type: ignore[call-overload]
    return model


def is_async(device: torch.device) -> bool:
    """Whether the device runs asynchronously (CUDA): calls return before their work is done."""
    return device.type == "cuda"


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's own memory, used or not; None for a device that has none."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device; to a GPU from pinned memory, asynchronously."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if is_async(device) else tensor.to(device)


class ToHost:
    """A copy of tensors to the host, queued behind the earlier work of their device and ahead of the later.

    Args:
        tensors: of one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        non_blocking = is_async(tensors[0].device)
        self._tensors = [tensor.to("cpu", non_blocking=non_blocking) for tensor in tensors]
        self._arrival = None
        if non_blocking:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def arrays(self) -> list[NDArray[Any]]:
        """Wait for the copy, and return the tensors as arrays."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def compile_network(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compile a function over a network whose weights stay as they are: CUDA graphs on a GPU, frozen weights on a CPU.

    Each size of input is compiled anew, which takes from seconds to minutes: worth it for many images of one size.
    """
    if device.type == "cuda":
        return torch.compile(function, mode="reduce-overhead")
    return torch.compile(function, options={"freezing": True})
