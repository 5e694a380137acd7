"""What feeds training against a plain torch DataLoader: how long a trainer waits, and what a crop costs.

The trainer is a stand-in that sleeps 50 ms for each batch of 8 crops of 473 pixels, as a GPU that is busy for so long:
it needs no CPU and lets other threads run. Every feed makes the same crops of the same images, one after the other,
and is measured in the middle of its work: it has begun long before, and has more to make when the last step is counted.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pipelines.cluster.session import ray_session
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.demo import draw_dataset
from pipelines.training.loading import Crops, Rank, load_by_ray, load_by_threads
from pspnet_core.network.pspnet import IMAGENET_MEAN
from pspnet_core.training.augment import AugmentConfig

BATCH = 8
CROP = 473
STEP_S = 0.05
WARM_UP = 96
STEPS = 160
AFTER = 96
CORES = 2


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one feed did."""

    idle: float
    """Share of the time that the trainer waited."""
    cpu_ms: float
    """CPU milliseconds of the whole machine per crop."""


class PlainDataset(TorchDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The crops of a run of steps, one after the other, as torch's DataLoader wants them."""

    def __init__(self, crops: Crops, steps: int) -> None:
        self.crops = crops
        self.places = [place for step in range(steps) for place in crops.mine(step, Rank())]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.crops.crop(*self.places[index])
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)


@contextlib.contextmanager
def plain(crops: Crops, steps: int) -> Iterator[Iterator[Any]]:
    """A plain DataLoader with a process per core."""
    torch.set_num_threads(1)
    yield iter(DataLoader(PlainDataset(crops, steps), batch_size=BATCH, num_workers=CORES))


@contextlib.contextmanager
def by_ray(crops: Crops, steps: int) -> Iterator[Iterator[Any]]:
    """Tasks of Ray Data, with a Ray of their own."""
    with ray_session(), load_by_ray(crops, Rank(), 0, steps, cpus=1.0) as batches:
        yield batches


FEEDS: dict[str, Callable[[Crops, int], AbstractContextManager[Iterator[Any]]]] = {
    "torch DataLoader, 2 processes": plain,
    "ours, threads": lambda crops, steps: load_by_threads(crops, Rank(), 0, steps, threads=CORES),
    "ours, Ray Data": by_ray,
}


def run(folder: Path, data: Path | None = None) -> dict[str, Figures]:
    """Every feed in turn.

    Args:
        folder: for drawn scenes.
        data: labelled images in layout ``folder``; drawn scenes by default.
    """
    if data is None:
        draw_dataset(folder, train=256, val=1, seed=0)
    dataset = open_dataset(str(data or folder), "folder")
    pairs = dataset.split("train")
    crops = Crops(
        dataset=dataset,
        pairs=pairs,
        blocks=(1,) * len(pairs),
        augment=AugmentConfig(crop=CROP),
        mean=IMAGENET_MEAN,
        batch=BATCH,
        seed=0,
    )
    return {name: _measured(feed(crops, WARM_UP + STEPS + AFTER)) for name, feed in FEEDS.items()}


def _measured(feed: AbstractContextManager[Iterator[Any]]) -> Figures:
    with feed as batches:
        for _ in itertools.islice(batches, WARM_UP):
            time.sleep(STEP_S)
        busy, began, waited = _busy_seconds(), time.perf_counter(), 0.0
        for _ in range(STEPS):
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(STEP_S)
        seconds = time.perf_counter() - began
        return Figures(idle=waited / seconds, cpu_ms=1000 * (_busy_seconds() - busy) / (STEPS * BATCH))


def _busy_seconds() -> float:
    """CPU seconds of all processes of the machine since it started (Linux)."""
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / 100


def lines(figures: dict[str, Figures]) -> list[str]:
    """Figures for people."""
    head = f"feeding a trainer that takes {1000 * STEP_S:.0f} ms for {BATCH} crops of {CROP}: {STEPS} steps each"
    rows = (f"  {name:32} idle {found.idle:6.1%}, CPU {found.cpu_ms:5.1f} ms/crop" for name, found in figures.items())
    return [head, *rows]
