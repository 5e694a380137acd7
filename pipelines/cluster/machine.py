"""What the machine, or the container, has that this process runs in."""

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's memory limit, by version of control groups."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File with a container's CPU quota, of control groups version 2: microseconds of CPU time, and in how many."""

LONGEST_SILENCE_S = 24 * 3600.0
"""Seconds without a result after which work is taken for stuck: Ray Data's no-progress timeout, and that of a child
process. A chunk of huge images at many scales takes hours on a slow machine; an actor watches its own work closer."""

PASS_SHARE = 0.5
"""Share of an actor's memory that a forward pass may take by our count. The rest is for weights, images that wait, the
kernels' own needs and, on CPUs, the object store."""


def machine_cpus() -> int:
    """CPUs that this process may use: those that it is bound to, or as many of them as a container's quota allows."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = CPU_QUOTA.read_text().split() if CPU_QUOTA.is_file() else ("max", "1")
    return max(1, min(bound, int(quota) // int(period))) if quota.isdecimal() else bound


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


@dataclass(frozen=True, kw_only=True)
class LocalResources:
    """What one actor may use on the machine that it is on.

    Attributes:
        threads: threads that it may keep busy.
        pass_memory: bytes that its forward passes may take.
        cpus, gpus: what it holds of the cluster.
    """

    threads: int
    pass_memory: float
    cpus: float
    gpus: float

    @classmethod
    def of_machine(cls) -> "LocalResources":
        """All CPUs of this machine, or container, for one process without a GPU."""
        cpus = machine_cpus()
        return cls(threads=cpus, pass_memory=PASS_SHARE * machine_memory(), cpus=cpus, gpus=0.0)
