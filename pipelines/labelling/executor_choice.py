"""Which executor carries a plan: Ray, or a child process of the driver for a few images on this machine's CPUs."""

import os
from dataclasses import dataclass

import ray

from pipelines.labelling.config import LabelConfig
from pipelines.labelling.executor import RayExecutor
from pipelines.labelling.in_process import InProcessExecutor
from pipelines.labelling.stages.walk import Executor
from pspnet_core.device import best_device
from pspnet_core.errors import ConfigError

FEW_IMAGES = 256
"""Images that are labelled without Ray by default: one chunk of the default size, which no second actor would share.
``make bench ARGS=executors`` times both executors."""


@dataclass(frozen=True, kw_only=True)
class Executors:
    """The two executors of a run."""

    config: LabelConfig
    on_ray: RayExecutor
    in_process: InProcessExecutor

    def suited_to(self, images: int) -> Executor:
        """The one for so many images."""
        wanted = images <= FEW_IMAGES if self.config.local is None else self.config.local
        return self.in_process if wanted and not _obstacle_to_local(self.config) else self.on_ray


def check_local(config: LabelConfig) -> None:
    """ConfigError for ``--local`` where that cannot be."""
    if config.local and (obstacle := _obstacle_to_local(config)):
        raise ConfigError("local", True, f"{obstacle}; leave out --local")


def _obstacle_to_local(config: LabelConfig) -> str:
    """Why this machine's CPUs are not to label without Ray; empty where they may."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return "RAY_ADDRESS names a cluster"
    if not config.local and (ray.is_initialized() or config.actors.workers or config.actors.gpus):
        return "Ray is asked for"
    return "" if best_device().type == "cpu" else "this machine has a GPU"
