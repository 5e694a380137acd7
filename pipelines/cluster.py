"""The Ray session of a job, and how its actors and tasks share the cluster's resources."""

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import ray
import ray.data
from ray.exceptions import RayTaskError

from pspnet_core.errors import ConfigError, PspnetError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WorkerRange:
    """``--workers N`` or ``MIN:MAX``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "WorkerRange":
        """Read ``N`` or ``MIN:MAX``; ConfigError for anything else."""
        parts = str(text).split(":")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError("workers", text, "give a number such as 4, or a range such as 1:8")
        low, high = int(parts[0]), int(parts[-1])
        if low > high:
            raise ConfigError("workers", text, "the smaller number comes first")
        return cls(low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Logical resources of each of ``workers`` actors."""

    workers: int
    cpus: float
    gpus: float

    def threads_here(self) -> int:
        """Threads that one of the actors may keep busy on the node that this is called on."""
        node = ray.get_runtime_context().get_node_id()
        resources = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)
        return self.threads(resources)

    def threads(self, node: Mapping[str, float]) -> int:
        """The node's CPUs divided by the actors that fit on it (but no more than there are)."""
        cpus = node.get("CPU", 0.0)
        fitting = min(self.workers, cpus // self.cpus, *([node.get("GPU", 0.0) // self.gpus] if self.gpus else []))
        return max(1, int(cpus // max(1, fitting)))


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names or that runs on this machine, else start one in the process.

    Leaves on the way out, unless the caller was connected before.

    Raises:
        ConfigError: when there is no such cluster, or it refuses the connection.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "RAY_ADDRESS", address, f"cannot connect ({reason}); start that cluster, or unset it"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def share(workers: int, gpus: float | None, *, reserve: float, resources: Mapping[str, float]) -> Share:
    """Divide the cluster among ``workers`` equal actors.

    Args:
        gpus: GPUs of each actor; None gives one each when the cluster has any.
        reserve: share of the CPUs that stays free for other tasks, in [0, 1).
        resources: what the cluster has, as ``ray.cluster_resources()`` tells.

    Raises:
        ConfigError: when the cluster cannot hold them, naming what is missing.
    """
    cpus, present = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = gpus if gpus is not None else (1.0 if present else 0.0)
    if each < 0 or (each > 1 and each != int(each)):
        raise ConfigError("gpus", each, "give a fraction below 1, or a whole number")
    if each * workers > present and gpus is None:
        raise ConfigError("workers", workers, f"the cluster has {present:g} GPUs; ask for fewer workers or set --gpus")
    if cpus <= 0:
        raise ConfigError("workers", workers, "the cluster has no CPUs")
    # GPU actors leave the CPUs to the stages that feed them; CPU actors are the work themselves.
    free = cpus * (1 - reserve)
    cpu_share = min(1.0, free / workers) if each else free / workers
    rounded = math.floor(cpu_share * 100) / 100 if cpu_share < 1 else float(math.floor(cpu_share))
    if rounded < 0.05:
        raise ConfigError("workers", workers, f"the cluster has {cpus:g} CPUs; ask for fewer workers")
    return Share(workers=workers, cpus=rounded, gpus=each)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many model actors there are, and what each may use."""

    low: int
    high: int
    share: Share

    @classmethod
    def of(cls, workers: str | None, gpus: float | None, *, reserve: float) -> "Pool":
        """The pool for ``--workers`` and ``--gpus`` on the connected cluster; arguments and errors as ``share``."""
        resources = ray.cluster_resources()
        most = int(resources.get("GPU", 0) // (gpus or 1))
        wanted = WorkerRange.parse(workers) if workers else WorkerRange(low=1, high=max(1, most))
        return cls(
            low=wanted.low,
            high=wanted.high,
            share=share(wanted.high, gpus, reserve=reserve, resources=resources),
        )


def quiet_ray_data() -> None:
    """Leave progress to us: Ray Data's own bars and lines would stand beside ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # so that own_errors finds ours
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def own_errors(rows: Iterable[T]) -> Iterator[T]:
    """Pass rows on; an error of ours that travelled inside one of Ray's comes out as itself."""
    try:
        yield from rows
    except RayTaskError as error:
        if isinstance(error.cause, PspnetError):
            raise error.cause from error
        raise
