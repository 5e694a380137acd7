"""Number and resources of the training workers, and where their crops are made."""

from dataclasses import dataclass

import ray
from ray.train import ScalingConfig as RayScaling

from pipelines.cluster.resources import ActorResources, WorkerRange, divide, living_nodes
from pipelines.training.loading import TASK_CPUS
from pspnet_core.errors import check_choice, check_not_negative, check_positive

LOADERS = ("auto", "threads", "ray")
LOADER_RESERVE = 0.2
"""Share of the CPUs that is left to Ray Data where it makes the crops."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers, and the loader of their crops."""

    workers: str = "1"
    """Data-parallel workers: N, or MIN:MAX for as many as the cluster has room for, which may change meanwhile."""
    gpus: float | None = None
    """GPUs per worker; by default 1 when the cluster has any."""
    max_failures: int = 10
    """How often the run restarts after the death of workers or their nodes before it fails."""
    resize_interval: float = 60.0
    """Seconds between checks for room for more workers, with --workers MIN:MAX."""
    loader: str = "auto"
    """What makes the crops: threads (of each worker), ray (Ray Data on all CPUs of the cluster), or auto: ray where the
    workers have GPUs."""

    def __post_init__(self) -> None:
        check_not_negative(max_failures=self.max_failures)
        check_positive(resize_interval=self.resize_interval)
        check_choice("loader", self.loader, LOADERS)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Number and resources of the workers, and of the tasks that make their crops."""

    workers: WorkerRange
    actor: ActorResources
    loader_cpus: float
    """CPUs that each task of Ray Data claims to make crops; 0 makes them in the workers' threads."""

    @classmethod
    def of(cls, config: ScalingConfig, workers: WorkerRange) -> "Scaling":
        """Divide the connected cluster: a fixed number of workers shares its CPUs, those of a range have one each."""
        resources = ray.cluster_resources()
        has_gpus = resources.get("GPU", 0) > 0
        by_ray = config.loader == "ray" or (config.loader == "auto" and has_gpus and config.gpus != 0)
        reserve = LOADER_RESERVE if by_ray else 0.0
        if workers.low == workers.high:
            part = divide(workers.high, config.gpus, reserve=reserve, resources=resources, nodes=living_nodes())
        else:
            gpus = config.gpus if config.gpus is not None else float(has_gpus)
            part = ActorResources(workers=workers.high, cpus=1 - reserve, gpus=gpus)
        spare = resources.get("CPU", 0) - part.cpus * workers.high
        return cls(workers=workers, actor=part, loader_cpus=(1.0 if spare >= 1 else TASK_CPUS) if by_ray else 0.0)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.workers.low < self.workers.high

    def for_ray(self, resize_interval: float) -> RayScaling:
        """Translate to Ray Train's."""
        resources = {"CPU": self.actor.cpus} | ({"GPU": self.actor.gpus} if self.actor.gpus else {})
        return RayScaling(  # type: ignore[call-arg]  # typed as Train V1, which V2 replaces at import
            num_workers=(self.workers.low, self.workers.high) if self.elastic else self.workers.high,  # type: ignore[arg-type]
            use_gpu=self.actor.gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=resize_interval,
        )
