"""Training batches: which samples, in which order, augmented how, as pure functions of seed and step.

The order does not depend on the number of workers: step ``s`` takes the same images whether one worker processes them
or eight. A worker's part of a step is a function of (seed, step, rank, number of workers), so that a run resumes
from any step with any number of workers.

A loader makes a worker's batches ahead of the network: in threads of the worker, or on the cluster's CPUs by Ray Data.

Shapes: ``b`` images of one worker's part of a batch, ``h w`` pixels of the crop.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data.block import BlockAccessor
from torch import Tensor

from pipelines.cluster.ray_data import blocks_of, quiet_ray_data
from pipelines.datasets.dataset import Dataset, Mask, Pair
from pspnet_core.threads import map_ahead
from pspnet_core.training.augment import AugmentConfig, augment

Crop = tuple[NDArray[np.uint8], Mask]

WINDOW = 8192
"""Samples that are shuffled together where reading neighbours is cheap: several packed shards."""
AHEAD = 2
"""Batches of a worker that are made ahead in threads."""
TASK_STEPS = 8
"""Steps that one task of Ray Data makes: long enough that starting it does not matter."""
TASK_CPUS = 0.1
"""CPUs that a task of Ray Data claims where the workers leave it no whole one."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A worker's index among all workers."""

    index: int = 0
    world: int = 1


class Batch(NamedTuple):
    """One worker's part of a step: images ``(b, 3, h, w)`` uint8 RGB and masks ``(b, h, w)`` of class ids."""

    images: Tensor
    masks: Tensor


@dataclass(frozen=True, kw_only=True)
class Crops:
    """The crops of every step; small enough to send to any process.

    Attributes:
        pairs: the training split.
        blocks: sizes of the runs of pairs that are cheap to read together, as ``Dataset.blocks`` gives.
        mean: the network's mean colour, RGB, which crops are padded with.
        batch: images per step over all workers.
    """

    dataset: Dataset
    pairs: tuple[Pair, ...]
    blocks: tuple[int, ...]
    augment: AugmentConfig
    mean: tuple[float, ...]
    batch: int
    seed: int
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": {}}

    @property
    def steps(self) -> int:
        """Steps per epoch; the last partial batch is left out, so that BatchNorm always sees a full one."""
        return len(self.pairs) // self.batch

    def samples(self, step: int) -> NDArray[np.int64]:
        """Positions among the pairs of a step's samples over all workers: ``(batch,)``."""
        epoch, number = divmod(step, self.steps)
        if epoch not in self._orders:
            self._orders.clear()  # the steps come one after another
            self._orders[epoch] = epoch_order(self.blocks, seed=self.seed, epoch=epoch)
        return self._orders[epoch][number * self.batch : (number + 1) * self.batch]

    def keys(self, step: int) -> list[str]:
        """Keys of the images of a step, over all workers."""
        return [self.pairs[sample].key for sample in self.samples(step)]

    def mine(self, step: int, rank: Rank) -> list[tuple[int, int]]:
        """``(step, sample)`` of each crop of this worker's part of a step."""
        return [(step, int(sample)) for sample in self.samples(step)[rank.index :: rank.world]]

    def crop(self, step: int, sample: int) -> Crop:
        """Make one augmented crop. Raises as ``Dataset.read``."""
        image, mask = self.dataset.read(self.pairs[sample])
        seed, ignore = (self.seed, step // self.steps, sample), self.dataset.classes.ignore
        return augment(image, mask, self.augment, seed, mean=self.mean, ignore=ignore)


def epoch_order(blocks: Sequence[int], *, seed: int, epoch: int, window: int = WINDOW) -> NDArray[np.int64]:
    """Shuffle the samples of an epoch: blocks are shuffled, then the samples within windows of blocks.

    Args:
        blocks: samples of each block; where all are 1 the order is a permutation like any other.
        seed, epoch: what the order is a function of.
        window: samples of consecutive blocks that are shuffled together, at least.

    Returns:
        A permutation of ``0 .. sum(blocks) - 1``.
    """
    random = np.random.default_rng((seed, epoch))
    sizes = np.asarray(blocks, dtype=np.int64)
    turn = random.permutation(len(sizes))
    before = np.cumsum(sizes[turn]) - sizes[turn]
    # Samples in the order of the shuffled blocks: each block's first one, and how far each sample is from it.
    starts = (np.cumsum(sizes) - sizes)[turn]
    samples = np.repeat(starts - before, sizes[turn]) + np.arange(sizes.sum())
    # A random number within the window's own interval sorts the samples within it.
    windows = np.repeat(before // window, sizes[turn])
    return samples[np.argsort(windows + random.random(len(samples)), kind="stable")]


@contextlib.contextmanager
def load_by_threads(crops: Crops, rank: Rank, start: int, stop: int, *, threads: int) -> Iterator[Iterator[Batch]]:
    """Make a worker's batches of the steps ``start .. stop - 1`` in its own threads (the codecs release the GIL)."""

    part = len(range(rank.index, crops.batch, rank.world))
    places = itertools.chain.from_iterable(crops.mine(step, rank) for step in range(start, stop))
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as collector:
        made = map_ahead(pool, lambda place: crops.crop(*place), places, depth=AHEAD * part)
        # Putting a batch together takes milliseconds, too: it is done before it is asked for.
        sizes = itertools.repeat(part, stop - start)
        try:
            yield map_ahead(collector, lambda size: _to_batch(*_stack(itertools.islice(made, size))), sizes, depth=1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            collector.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def load_by_ray(crops: Crops, rank: Rank, start: int, stop: int, *, cpus: float) -> Iterator[Iterator[Batch]]:
    """Make the batches of ``load_by_threads`` by tasks of Ray Data, on CPUs anywhere in the cluster.

    Args:
        cpus: CPUs that each task claims.
    """
    quiet_ray_data()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # each batch travels as soon as it is made
    handed = [ray.put(crops)]  # in a list, so that it arrives as a reference

    def make(rows: Any) -> Iterator[dict[str, NDArray[Any]]]:
        here = _fetch(handed[0])
        for first in rows["id"] * TASK_STEPS + start:
            for step in range(first, min(first + TASK_STEPS, stop)):
                images, masks = _stack([here.crop(*place) for place in here.mine(step, rank)])
                yield {"images": images[None], "masks": masks[None]}

    tasks = -(-(stop - start) // TASK_STEPS)
    with ray.data.DataContext.current(context):
        rows = ray.data.range(tasks, override_num_blocks=tasks).map_batches(make, num_cpus=cpus)
        found = blocks_of(rows)

    def take(step: int) -> Batch:
        row = cast("dict[str, NDArray[Any]]", BlockAccessor.for_block(next(found)).to_numpy())
        # Copies, since what lies in the object store must not be written to; by NumPy, which wakes no other threads.
        return _to_batch(row["images"][0].copy(), row["masks"][0].copy())

    # Fetching and copying take milliseconds, too: a batch is there before it is asked for.
    with ThreadPoolExecutor(1) as collector:
        try:
            yield map_ahead(collector, take, range(start, stop), depth=AHEAD)
        finally:
            collector.shutdown(cancel_futures=True)
            found.close()


@functools.lru_cache(maxsize=1)
def _fetch(crops: "ray.ObjectRef[Crops]") -> Crops:
    """Fetch what a worker of Ray Data makes crops from, once per process."""
    return ray.get(crops)


def _stack(crops: Iterable[Crop]) -> Crop:
    """Stack crops to images ``(b, h, w, 3)`` and masks ``(b, h, w)``."""
    images, masks = zip(*crops, strict=True)
    return np.stack(images), np.stack(masks)


def _to_batch(images: NDArray[np.uint8], masks: Mask) -> Batch:
    """Turn what ``_stack`` gave into tensors over the same memory."""
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks))
