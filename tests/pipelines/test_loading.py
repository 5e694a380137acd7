"""Training batches are pure functions of seed and epoch, however many workers share them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.datasets import Dataset, open_dataset
from pipelines.demo import draw_dataset
from pipelines.loading import CropLoader, Shard, epoch_order
from pipelines.threads import map_ahead
from pspnet_core.transforms import AugmentConfig

BATCH = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, train=11, val=2, seed=0)
    return open_dataset(str(folder), "folder")


def batches(dataset: Dataset, epoch: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    config = AugmentConfig(crop=(32, 40))
    shard = Shard(rank=rank, world=world)
    loader = CropLoader(dataset, dataset.split("train"), config, batch=BATCH, seed=seed, shard=shard)
    return [torch.cat([images.flatten(), masks.flatten()]) for images, masks in loader.epoch(epoch)]


def test_shapes_and_the_last_partial_batch(dataset: Dataset) -> None:
    loader = CropLoader(
        dataset, dataset.split("train"), AugmentConfig(crop=(32, 40)), batch=BATCH, seed=0, shard=Shard()
    )
    found = list(loader.epoch(0))
    assert len(found) == loader.steps == 2  # 11 images make two batches of 4
    images, masks = found[0]
    assert (images.shape, images.dtype) == ((BATCH, 3, 32, 40), torch.uint8)
    assert (masks.shape, masks.dtype) == ((BATCH, 32, 40), torch.uint8)


def test_the_same_epoch_is_the_same_again_and_another_is_not(dataset: Dataset) -> None:
    once, again = batches(dataset, 0), batches(dataset, 0)
    assert all(torch.equal(left, right) for left, right in zip(once, again, strict=True))
    assert not torch.equal(once[0], batches(dataset, 1)[0])
    assert not torch.equal(once[0], batches(dataset, 0, seed=1)[0])


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_same_steps(dataset: Dataset, world: int) -> None:
    config = AugmentConfig(crop=(16, 16))

    def crops(rank: int, of: int) -> list[list[bytes]]:
        shard = Shard(rank=rank, world=of)
        loader = CropLoader(dataset, dataset.split("train"), config, batch=BATCH, seed=3, shard=shard)
        return [[image.numpy().tobytes() for image in images] for images, _ in loader.epoch(5)]

    alone = crops(0, 1)
    shared = [crops(rank, world) for rank in range(world)]
    for step, expected in enumerate(alone):
        assert sorted(crop for worker in shared for crop in worker[step]) == sorted(expected)


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 1000))
@settings(deadline=None, derandomize=True)
def test_an_epoch_visits_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(samples, seed=seed, epoch=epoch).tolist()) == list(range(samples))


@given(st.lists(st.integers(), max_size=40), st.integers(0, 8))
@settings(deadline=None, derandomize=True)
def test_working_ahead_keeps_order_and_bound(items: list[int], depth: int) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = []
        for result in map_ahead(pool, lambda item: item * 2, source(), depth=depth):
            results.append(result)
            assert taken <= len(results) + depth
    assert results == [item * 2 for item in items]
