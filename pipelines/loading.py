"""Training batches: which samples, in which order, augmented how, as pure functions of seed, epoch and position.

The order does not depend on the number of workers: step ``s`` of an epoch takes the same images whether one worker
processes them or eight.

Shapes: ``b`` images of one worker's batch, ``h w`` pixels of the crop.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.datasets import Dataset, Mask, Pair
from pipelines.threads import map_ahead
from pspnet_core.transforms import AugmentConfig, augment

Crop = tuple[NDArray[np.uint8], Mask]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This worker among all of them."""

    rank: int = 0
    world: int = 1


class CropLoader:
    """Augmented crops for one worker, decoded ahead in threads (the codecs release the GIL).

    Args:
        pairs: the training split.
        batch: images per step over all workers.
        threads: decoding threads of this worker.
    """

    def __init__(
        self,
        dataset: Dataset,
        pairs: tuple[Pair, ...],
        config: AugmentConfig,
        *,
        batch: int,
        seed: int,
        shard: Shard,
        threads: int = 2,
    ) -> None:
        self.dataset, self.pairs, self.config = dataset, pairs, config
        self.batch, self.seed, self.shard, self.threads = batch, seed, shard, threads

    @property
    def steps(self) -> int:
        """Steps per epoch; the last partial batch is left out, so that BatchNorm always sees a full one."""
        return len(self.pairs) // self.batch

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch: images ``(b, 3, h, w)`` uint8 RGB and masks ``(b, h, w)`` of class ids."""
        order = epoch_order(len(self.pairs), seed=self.seed, epoch=number)
        batches = order[: self.steps * self.batch].reshape(self.steps, self.batch)
        mine = batches[:, self.shard.rank :: self.shard.world]
        with ThreadPoolExecutor(self.threads) as pool:
            crops = map_ahead(
                pool,
                lambda sample: self._crop(number, sample),
                mine.ravel().tolist(),
                depth=2 * mine.shape[1],
            )
            while batch := list(itertools.islice(crops, mine.shape[1])):
                yield _collate(batch)

    def _crop(self, epoch: int, sample: int) -> Crop:
        image, mask = self.dataset.read(self.pairs[sample])
        return augment(image, mask, self.config, (self.seed, epoch, sample))


def epoch_order(samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order ``(samples,)`` in which an epoch visits its samples."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def _collate(crops: Sequence[Crop]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*crops, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.stack(masks))
