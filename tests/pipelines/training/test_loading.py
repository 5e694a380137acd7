"""Training batches are pure functions of seed and step, however many workers share them."""

import functools
import itertools
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipelines.datasets.dataset import Dataset
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.demo import draw_dataset
from pipelines.training.loading import TASK_STEPS, Batch, Crops, Rank, epoch_order, load_by_ray, load_by_threads
from pspnet_core.network.pspnet import IMAGENET_MEAN
from pspnet_core.training.augment import AugmentConfig

BATCH = 4


@pytest.fixture(scope="module")
def dataset(data: Path) -> Dataset:
    return open_dataset(str(data), "folder")


def make_crops(dataset: Dataset, *, seed: int = 0, crop: int = 32) -> Crops:
    return Crops(
        dataset=dataset,
        pairs=dataset.split("train"),
        blocks=dataset.blocks("train"),
        augment=AugmentConfig(crop=crop),
        mean=IMAGENET_MEAN,
        batch=BATCH,
        seed=seed,
    )


def by_threads(crops: Crops, start: int, stop: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
    with load_by_threads(crops, Rank(index=rank, world=world), start, stop, threads=2) as batches:
        return list(batches)


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) for a, b in pairs)


def test_shapes_and_the_last_partial_batch(dataset: Dataset) -> None:
    crops = make_crops(dataset)
    assert crops.steps == 2  # 11 images make two batches of 4
    images, masks = by_threads(crops, 0, 1)[0]
    assert (images.shape, images.dtype) == ((BATCH, 3, 32, 32), torch.uint8)
    assert (masks.shape, masks.dtype) == ((BATCH, 32, 32), torch.uint8)


def test_a_step_is_the_same_again_and_another_is_not(dataset: Dataset) -> None:
    crops = make_crops(dataset)
    run = by_threads(crops, 0, 6)  # three epochs
    assert same(by_threads(crops, 3, 6), run[3:])
    assert same(by_threads(pickle.loads(pickle.dumps(crops)), 0, 6), run)
    firsts = [run[0].images, run[2].images, by_threads(make_crops(dataset, seed=1), 0, 1)[0].images]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))
    assert by_threads(crops, 6, 6) == []


def test_the_keys_of_a_step_are_those_of_its_images(dataset: Dataset) -> None:
    crops = make_crops(dataset)
    seen = [crops.keys(step) for step in range(crops.steps)]
    assert len({key for keys in seen for key in keys}) == crops.steps * BATCH
    assert seen[1] == [crops.pairs[sample].key for _, sample in crops.mine(1, Rank())]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_workers_share_the_same_steps(dataset: Dataset, world: int) -> None:
    """Also where the batch does not divide evenly."""
    crops = make_crops(dataset, seed=3, crop=16)
    alone = by_threads(crops, 10, 12)
    shared = [by_threads(crops, 10, 12, rank=rank, world=world) for rank in range(world)]
    for step, expected in enumerate(alone):
        found = [image.numpy().tobytes() for worker in shared for image in worker[step].images]
        assert sorted(found) == sorted(image.numpy().tobytes() for image in expected.images)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_ray_data_makes_the_same_batches_in_the_same_order(dataset: Dataset, rank: int, world: int) -> None:
    crops = make_crops(dataset)
    start, stop = 1, 2 * TASK_STEPS + 4  # tasks that are cut off at both ends
    with load_by_ray(crops, Rank(index=rank, world=world), start, stop, cpus=0.5) as batches:
        found = list(batches)
    assert same(found, by_threads(crops, start, stop, rank=rank, world=world))


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_stops_when_its_feed_is_left(dataset: Dataset) -> None:
    crops, before = make_crops(dataset), set(threading.enumerate())
    with load_by_ray(crops, Rank(), 0, 40 * TASK_STEPS, cpus=0.5) as batches:
        assert same([next(batches)], by_threads(crops, 0, 1))
        assert any(isinstance(thread, StreamingExecutor) for thread in threading.enumerate())
    # One that is still there when the process disconnects from Ray makes Ray end the process.
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "feed", [functools.partial(load_by_threads, threads=2), functools.partial(load_by_ray, cpus=0.5)]
)
def test_an_image_that_vanishes_is_named(tmp_path: Path, feed: Any) -> None:
    draw_dataset(tmp_path, train=4, val=1, seed=0)
    crops = make_crops(open_dataset(str(tmp_path), "folder"))
    (tmp_path / crops.pairs[2].image).unlink()
    with pytest.raises(Exception, match=rf"{crops.pairs[2].image}.*is gone"), feed(crops, Rank(), 0, 4) as batches:
        list(batches)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(0, 2**31), st.integers(0, 1000), st.data())
@settings(deadline=None, derandomize=True)
def test_an_epoch_visits_every_sample_once(blocks: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 2 * max(1, sum(blocks))))
    order = epoch_order(blocks, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(sum(blocks)))
    assert order.tolist() == epoch_order(blocks, seed=seed, epoch=epoch, window=window).tolist()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=60), st.integers(0, 2**31), st.integers(1, 40))
@settings(deadline=None, derandomize=True)
def test_few_blocks_are_open_at_a_time(blocks: list[int], seed: int, window: int) -> None:
    """A block's samples lie within a window: a reader in this order needs no block again once it has passed."""
    owner = np.repeat(np.arange(len(blocks)), blocks)
    order = owner[epoch_order(blocks, seed=seed, epoch=0, window=window)]
    for block, size in enumerate(blocks):
        places = np.flatnonzero(order == block)
        assert places.max() - places.min() < window + 2 * max(blocks)
        assert len(places) == size


def test_single_samples_are_shuffled_throughout() -> None:
    """However small the window: the mean distance from the old place is a third of the whole, as for any shuffle."""
    order = epoch_order((1,) * 9000, seed=0, epoch=0, window=10)
    assert np.abs(order - np.arange(9000)).mean() == pytest.approx(3000, rel=0.03)
