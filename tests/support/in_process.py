"""Training's driver and its one worker in the test's own process, without Ray."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import ray
import ray.train
import ray.train.torch
import torch

from pipelines.tracking.runs import Run
from pipelines.training import job
from pipelines.training.checkpointing import CheckpointFolder
from pipelines.training.loop import train_loop
from pipelines.training.scaling import Scaling
from pipelines.training.setup import Setup

CONTEXT = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1)


def local_trainer(setup: Setup, scaling: Scaling, folder: CheckpointFolder, run: Run) -> SimpleNamespace:
    """What takes the place of Ray's ``TorchTrainer``: ``fit`` runs the loop here."""
    return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=train_loop(setup, folder, run)))


def replace_ray(patch: pytest.MonkeyPatch) -> None:
    """Let ``job.train`` do without Ray, on a machine of four CPUs."""
    patch.setattr(job, "ray_session", contextlib.nullcontext)
    patch.setattr(job, "_torch_trainer", local_trainer)
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    patch.setattr(ray.train, "get_context", lambda: CONTEXT)
    patch.setattr(ray.train, "report", lambda metrics: None)
    patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
