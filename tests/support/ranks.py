"""One of several processes that train together; a module of its own, so that such a process imports little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from pipelines.training.loading import Rank
from pipelines.training.setup import Setup
from pipelines.training.trainer import Trainer


def make_trainer(setup: Setup, rank: int = 0, world: int = 1) -> Trainer:
    """A trainer on the CPU; all of one setup start with the same weights."""
    torch.manual_seed(0)
    return Trainer(setup, Rank(index=rank, world=world), torch.device("cpu"))


def take_steps(rank: int, setups: Sequence[Setup], batches: Sequence[tuple[Tensor, Tensor]], folder: str) -> None:
    """Join the others, and take one step by each setup with a fresh trainer.

    Args:
        batches: images and masks of each process.
        folder: where to meet, and where ``<rank>.pt`` is written: the loss and the state after each setup's step.
    """
    torch.set_num_threads(1)
    world = len(batches)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = []
    for setup in setups:
        trainer = make_trainer(setup, rank, world)
        loss = trainer.step(*batches[rank], lr=0.1)
        results.append((loss, trainer.model.state_dict()))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
