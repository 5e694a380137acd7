"""The memory of the machine, or the container, that this runs in."""

import ctypes
import gc
from pathlib import Path

import psutil  # type: ignore[import-untyped]

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container's limit, by version of control groups."""


def machine_memory() -> int:
    """Bytes of memory, used or not: the machine's, or what a container may use of it."""
    limits = [path.read_text().strip() for path in LIMITS if path.is_file()]
    total: int = psutil.virtual_memory().total
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def give_memory_back() -> None:
    """Let go of what nothing refers to any more, and return to the system what the C library kept of it (glibc does).

    A process with many threads otherwise holds on to some of what each of them has freed, more and more of it.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
