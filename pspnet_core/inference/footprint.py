"""Memory of a forward pass per pixel, measured on a small one: larger passes take as much for each pixel."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIDE = 256
"""Side of the square input: large enough that the fixed part of a pass does not count."""


def bytes_per_pixel(network: Callable[[Tensor], Tensor], *, bands: int, device: torch.device) -> float:
    """Measure the bytes that a pass holds at its peak for each pixel of its input, beside weights and input.

    A pure function of the network and its number format. Memory that kernels allocate inside is not counted.

    Args:
        network: takes ``(1, bands, SIDE, SIDE)`` uint8 on the device; runs once.
    """
    pixels = torch.zeros(1, bands, SIDE, SIDE, dtype=torch.uint8, device=device)
    with torch.inference_mode(), _Allocations() as allocations:
        network(pixels)
    most: int = allocations.most
    return most / SIDE**2


class _Allocations(TorchDispatchMode):
    """Sum of the tensors that are alive of those made within it.

    Attributes:
        most: bytes at the peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to skip the compiler torch would load it (2 s)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):  # tensors made before count nothing, nor do their views
            self._follow(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        self.most = max(self.most, self._now)
        return result

    def _follow(self, tensor: Tensor, size: int) -> None:
        """Count a tensor's memory once, until nothing refers to it."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in self._known:
            self._known.add(address)
            self._now += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
