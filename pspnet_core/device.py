"""Where the network runs: the device, its number format and its memory layout. The only room that asks about GPUs."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def best_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The number format that makes convolutions faster on this device, or None for plain float32.

    bfloat16 where the hardware multiplies it: NVIDIA from Ampere on, CPUs with AVX-512 BF16 or AMX. Elsewhere
    bfloat16 is emulated: measured at 0.13 times the speed of float32 on an AVX2 CPU (PSPNet-18).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else None


def _cpu_multiplies_bfloat16() -> bool:
    # Absent from the older releases in our range; without an answer float32 is the safe one.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


@contextlib.contextmanager
def autocast(device: torch.device, *, gradients: bool = False) -> Iterator[None]:
    """Run the enclosed operations in ``autocast_dtype(device)``.

    Args:
        gradients: whether a backward pass follows. Gradients underflow in float16, so float32 takes its place.
    """
    dtype = autocast_dtype(device)
    if gradients and dtype == torch.float16:
        dtype = None
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device in the layout its convolutions like (channels last, on CPU and GPU alike)."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
