"""How the actors of a job share the cluster's resources, and what one of them may use where it is."""

import gc
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray.data

from pipelines.cluster.machine import PASS_SHARE, LocalResources, machine_memory
from pspnet_core.device import best_device, total_memory
from pspnet_core.errors import ConfigError, check, check_positive

log = logging.getLogger(__name__)
Resources = Mapping[str, float]
"""What a node or a cluster has, by Ray's names: ``CPU`` and ``GPU`` among others."""

PLACE_S = 60.0
"""Seconds that actors wait for room on a cluster that is large enough: actors of a job that ends may still be there."""
ARRIVE_S = 900.0
"""Seconds that actors wait for nodes that an autoscaler may bring."""
LEAST_CPUS = 0.05
"""Least share of a CPU that an actor is given."""


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
class ActorConfig:
    """The actors that hold the model."""

    workers: str | None = None
    """Model actors: N or MIN:MAX; by default up to one per GPU, or one on CPUs."""
    gpus: float | None = None
    """GPUs per actor, fractions allowed; by default 1 when the cluster has any."""
    batch: int = 8
    """Most images in one forward pass, or on CPUs at a time; fewer where an actor's memory does not hold them."""
    compile: bool = False
    """Whether the network is compiled (CUDA graphs on GPUs): for many images of one size."""

    def __post_init__(self) -> None:
        check_positive(batch=self.batch)
        if self.workers is not None:
            WorkerRange.parse(self.workers)
        gpus = 0.0 if self.gpus is None else self.gpus
        fits = 0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))
        check(fits, "gpus", gpus, "give a fraction below 1, or a whole number")


@dataclass(frozen=True, kw_only=True)
class ActorResources:
    """Logical resources of each of ``workers`` actors."""

    workers: int
    cpus: float
    gpus: float

    def here(self) -> LocalResources:
        """What one of the actors may use on the node that this is called on."""
        here = ray.get_runtime_context().get_node_id()
        node = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == here)
        return self.on(node, machine=machine_memory(), gpu=total_memory(best_device()))

    def on(self, node: Resources, *, machine: int, gpu: int | None = None) -> LocalResources:
        """What one of the actors may use on a node: its CPUs and its memory divided by the actors that fit on it.

        The memory follows from what there is, not from what is free at the moment, so that batches are the same each
        time.

        Args:
            machine: the node's memory in bytes.
            gpu: a GPU's, where the actors use them.
        """
        fitting = self._fitting(node)
        memory = machine / fitting if gpu is None else gpu * min(1.0, self.gpus or 1.0)
        threads = max(1, int(node.get("CPU", 0.0) // fitting))
        return LocalResources(threads=threads, pass_memory=PASS_SHARE * memory, cpus=self.cpus, gpus=self.gpus)

    def _fitting(self, node: Resources) -> float:
        """Actors that fit on a node, at least 1."""
        gpus = [node.get("GPU", 0.0) // self.gpus] if self.gpus else []
        return max(1, min(self.workers, node.get("CPU", 0.0) // self.cpus, *gpus))


def living_nodes() -> list[Resources]:
    """What each node of the connected cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def divide(
    workers: int, gpus: float | None, *, reserve: float, resources: Resources, nodes: Sequence[Resources] = ()
) -> ActorResources:
    """Divide the cluster among ``workers`` equal actors.

    Args:
        gpus: GPUs of each actor; None gives one each when the cluster has any. Nodes that have those which are asked
            for may be still to come.
        reserve: share of the CPUs that stays free for other tasks, in [0, 1).
        resources: what the cluster has, as from ``ray.cluster_resources()``.
        nodes: what each node has, since an actor lies on one; by default all is on one node.

    Raises:
        ConfigError: when the cluster cannot hold them, naming what is missing.
    """
    nodes = nodes or [resources]
    cpus, present = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = gpus if gpus is not None else (1.0 if present else 0.0)
    places = sum(_gpu_places(node, each) for node in nodes) if each else workers
    if present and not places:
        most = max(node.get("GPU", 0.0) for node in nodes)
        raise ConfigError("gpus", each, f"an actor lies on one node, and none has more than {most:g}; ask for fewer")
    if places < workers and gpus is None:
        raise ConfigError("workers", workers, f"the cluster has {present:g} GPUs; ask for fewer workers or set --gpus")
    if cpus <= 0:
        raise ConfigError("workers", workers, "the cluster has no CPUs")
    if places:
        found = _cpus_each(min(workers, places), each, nodes, reserve)
    else:  # the nodes that they will lie on are not there yet
        found = _rounded(min(1.0, cpus * (1 - reserve) / workers))
    if found < LEAST_CPUS:
        beside = " beside its GPUs" if each else ""
        raise ConfigError("workers", workers, f"the cluster has {cpus:g} CPUs{beside}; ask for fewer workers")
    return ActorResources(workers=workers, cpus=found, gpus=each)


def _gpu_places(node: Resources, each: float) -> int:
    """Actors that a node's GPUs hold; those that share a GPU do not reach over to the next one."""
    whole = int(node.get("GPU", 0.0))
    return whole * int(1 / each + 1e-9) if each < 1 else whole // int(each)


def _cpus_each(workers: int, gpus: float, nodes: Sequence[Resources], reserve: float) -> float:
    """The most CPUs that so many actors can have, each of them on one node; 0 if they do not fit.

    GPU actors leave the CPUs to the stages that feed them and take one at most; CPU actors are the work themselves.
    """
    free = [(node.get("CPU", 0.0) * (1 - reserve), _gpu_places(node, gpus) if gpus else workers) for node in nodes]
    sizes = {_rounded(cpus / count) for cpus, places in free for count in range(1, min(workers, places) + 1)}
    if gpus:
        sizes = {min(1.0, size) for size in sizes}
    for size in sorted(sizes, reverse=True):
        if size and sum(min(places, int(cpus / size + 1e-9)) for cpus, places in free) >= workers:
            return size
    return 0.0


def _rounded(cpus: float) -> float:
    """Down to a whole number, or to hundredths below one, as Ray counts them."""
    return math.floor(cpus * 100) / 100 if cpus < 1 else float(math.floor(cpus))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many model actors there are, and what each may use."""

    low: int
    high: int
    actor: ActorResources

    @classmethod
    def of(cls, config: ActorConfig, *, reserve: float) -> "Pool":
        """The pool for ``--workers`` and ``--gpus`` on the connected cluster, once there is room for the least of it.

        Args:
            reserve: as for ``divide``.

        Raises:
            ConfigError: when the pool would wait for ever, or for long: the cluster cannot hold it, or other jobs have
                taken what it needs. Names what is missing and what to do.
        """
        nodes, gpus = living_nodes(), config.gpus
        most = 0 if gpus == 0 else sum(_gpu_places(node, gpus or 1) for node in nodes)
        wanted = WorkerRange.parse(config.workers) if config.workers else WorkerRange(low=1, high=max(1, most))
        part = divide(wanted.high, gpus, reserve=reserve, resources=ray.cluster_resources(), nodes=nodes)
        pool = cls(low=wanted.low, high=wanted.high, actor=part)
        pool.await_room(arriving=most < wanted.low if part.gpus else False)
        return pool

    def await_room(self, *, arriving: bool) -> None:
        """Wait until the least number of actors fits on the cluster beside what runs there.

        Args:
            arriving: whether nodes have to come first, which takes longer.

        Raises:
            ConfigError: they still do not fit.
        """
        patience = ARRIVE_S if arriving else PLACE_S
        claim = {name: value for name, value in (("CPU", self.actor.cpus), ("GPU", self.actor.gpus)) if value}
        text = f"{self.low} x {' and '.join(f'{value:g} {name}' for name, value in claim.items())}"
        if arriving:
            log.info("waiting for nodes with %s", text)
        gc.collect()  # the actors of a run that failed in this process stay as long as what its error refers to
        # Ray decides whether they fit; a group that waits also makes an autoscaler bring nodes.
        group = ray.util.placement_group([claim] * self.low)
        try:
            if group.wait(patience):
                return
        finally:
            ray.util.remove_placement_group(group)
        if arriving:
            remedy = (
                f"no nodes with {text} came in {patience:g} s; ask for fewer, or see why the autoscaler brings none"
            )
        else:
            left = ray.available_resources()
            free = ", ".join(f"{left.get(name, 0.0):g} {name}" for name in claim)
            remedy = (
                f"needs {text} and after {patience:g} s the other jobs on the cluster leave {free}; "
                "wait until they are done, or ask for fewer workers"
            )
        raise ConfigError("workers", self.low, remedy)
