"""Scoring: the network sees the same batches with any number of workers, and reading runs ahead within a bound."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.datasets.dataset import Dataset, Mask, Pair
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.evaluation.scoring import BATCH, CHUNK, Compared, chunked, compare, score, spread
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.images.masks import to_png
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import ConfusionMatrix

COUNT = 41


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Small scenes, some in a row upright and some flat: neighbours that share a batch, and ones that cannot."""
    folder = tmp_path_factory.mktemp("scoring")
    for kind in ("images", "masks"):
        (folder / kind / "val").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps(SCENE_CLASSES.to_json()))
    for number in range(COUNT):
        width, height = (64, 48) if number % 12 < 10 else (48, 64)
        image, mask = draw_scene(number, width=width, height=height)
        Image.fromarray(image).save(folder / f"images/val/{number:03d}.jpg")
        (folder / f"masks/val/{number:03d}.png").write_bytes(to_png(mask))
    return open_dataset(str(folder), "folder")


@pytest.fixture(scope="module")
def make_segmenter(scene_model: Path) -> Callable[[int], Segmenter]:
    checkpoint = load_checkpoint(scene_model)
    return functools.cache(lambda batch: Segmenter(checkpoint.model, checkpoint.settings, batch=batch))


class Seen:
    """Stands before the network and remembers each batch as the hashes of its images."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self.batches: list[tuple[str, ...]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in pixels))
        return self.network(pixels)


@pytest.mark.parametrize(("batch", "size"), [(1, 16), (3, 18), (8, 16), (16, 16), (20, 20)])
def test_chunks_are_whole_batches_and_cover_the_split(dataset: Dataset, batch: int, size: int) -> None:
    pairs = dataset.split("val")
    chunks = chunked(pairs, batch=batch)
    assert tuple(itertools.chain.from_iterable(chunks)) == pairs
    assert {len(chunk) for chunk in chunks[:-1]} == {size}
    assert 0 < len(chunks[-1]) <= size
    assert size % batch == 0 and size >= CHUNK


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", [3, BATCH])
def test_batches_and_counts_do_not_depend_on_the_workers(
    dataset: Dataset,
    make_segmenter: Callable[[int], Segmenter],
    batch: int,
    world: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs, segmenter = dataset.split("val"), make_segmenter(batch)
    alone, dealt = Seen(segmenter.coarse), Seen(segmenter.coarse)
    monkeypatch.setattr(segmenter, "coarse", alone)
    one = score(segmenter, dataset, pairs, batched=True)
    monkeypatch.setattr(segmenter, "coarse", dealt)
    total = ConfusionMatrix(len(SCENE_CLASSES))
    for rank in range(world):
        mine = chunked(pairs, batch=batch)[rank::world]
        if rank % 2:  # chunk by chunk or all at once
            for chunk in mine:
                total += score(segmenter, dataset, chunk, batched=True)
        else:
            total += score(segmenter, dataset, list(itertools.chain.from_iterable(mine)), batched=True)
    assert sorted(dealt.batches) == sorted(alone.batches)
    assert max(map(len, alone.batches)) == batch, "or this would show nothing"
    np.testing.assert_array_equal(total.counts, one.counts)


@pytest.mark.parametrize("threads", [1, 3])
def test_on_cpus_each_image_is_alone_on_one_thread_whatever_torch_has(
    dataset: Dataset, make_segmenter: Callable[[int], Segmenter], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more of them are there at a time than the batch."""
    # oneDNN sums in another order on another number of threads: these are the answers of one.
    pairs, segmenter = dataset.split("val"), make_segmenter(2)
    network, seen = segmenter.coarse, {}
    running, most, lock = 0, 0, threading.Lock()

    def remember(pixels: Tensor) -> Tensor:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        answer = network(pixels)
        with lock:
            running -= 1
        seen[pixels.numpy().tobytes()] = (len(pixels), torch.get_num_threads(), answer.clone())
        return answer

    monkeypatch.setattr(segmenter, "coarse", remember)
    torch.set_num_threads(threads)
    score(segmenter, dataset, pairs)
    assert torch.get_num_threads() == threads, "as it was before"
    torch.set_num_threads(1)
    assert len(seen) == COUNT
    assert most <= 2
    with torch.inference_mode():
        for pair in pairs:
            pixels = torch.from_numpy(dataset.read(pair)[0][None]).permute(0, 3, 1, 2)
            images, used, answer = seen[pixels.numpy().tobytes()]
            assert (images, used) == (1, 1)
            assert torch.equal(network(pixels), answer)


@pytest.mark.parametrize("batched", [False, True])
def test_every_pair_comes_back_with_its_own_pixels_and_mask(
    dataset: Dataset, make_segmenter: Callable[[int], Segmenter], batched: bool
) -> None:
    pairs = dataset.split("val")
    expected = np.zeros((len(SCENE_CLASSES),) * 2, np.int64)
    labels = range(len(SCENE_CLASSES))
    found: list[Compared] = list(compare(make_segmenter(8), dataset, pairs, threads=3, batched=batched))
    assert [one.pair for one in found] == list(pairs)
    for one in found:
        image, target = dataset.read(one.pair)
        (prediction,) = make_segmenter(1)([image])
        np.testing.assert_array_equal(one.image, image)
        np.testing.assert_array_equal(one.target, target)
        assert (one.mask == prediction.mask).mean() > 0.999  # batches add up in another order
        expected += sklearn.metrics.confusion_matrix(target.ravel(), prediction.mask.ravel(), labels=labels)
    counts = score(make_segmenter(1), dataset, pairs, threads=1, batched=batched).counts
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("settings", [{"window": 32}, {"scales": (0.5, 1.0), "flip": True}])
@pytest.mark.parametrize("batched", [False, True])
def test_windows_scales_and_mirror_images_are_those_of_labelling(
    dataset: Dataset, scene_model: Path, settings: dict[str, Any], batched: bool
) -> None:
    checkpoint = load_checkpoint(scene_model).with_settings(**settings)
    segmenter = Segmenter(checkpoint.model, checkpoint.settings, batch=1)
    pairs = dataset.split("val")[:12]
    found = list(compare(segmenter, dataset, pairs, threads=1, batched=batched))
    for one in found:
        np.testing.assert_array_equal(one.mask, segmenter([one.image])[0].mask)
    plain = Segmenter(checkpoint.model, batch=1)
    others = list(compare(plain, dataset, pairs, threads=1))
    assert any((one.mask != other.mask).any() for one, other in zip(found, others, strict=True))


@pytest.mark.parametrize("batched", [False, True])
def test_the_network_sees_reduced_images_as_in_labelling(
    dataset: Dataset, scene_model: Path, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, pairs = load_checkpoint(scene_model).with_settings(resize="scale", size=0.2), dataset.split("val")[:4]
    assert checkpoint.with_settings(reduced=True).fingerprint != checkpoint.fingerprint
    inputs = []
    for reduced in (True, False):
        segmenter = Segmenter(checkpoint.model, checkpoint.with_settings(reduced=reduced).settings, batch=1)
        network = Seen(segmenter.coarse)
        monkeypatch.setattr(segmenter, "coarse", network)
        list(compare(segmenter, dataset, pairs, threads=1, batched=batched))
        inputs.append(network.batches.copy())
        segmenter(dataset.fetch(pair).image for pair in pairs)
        assert network.batches == 2 * inputs[-1]
    assert set(inputs[0]).isdisjoint(inputs[1])


class Watched(Dataset):
    """Counts the pairs that were asked for, and tells when one of them is read."""

    started: list[str]
    awaited: str
    read_it: threading.Event

    @classmethod
    def of(cls, dataset: Dataset, awaited: str = "") -> Watched:
        watched = cls(**{field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)})
        watched.__dict__.update(started=[], awaited=awaited, read_it=threading.Event())
        return watched

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], Mask]:
        self.started.append(pair.key)
        if pair.key == self.awaited:
            self.read_it.set()
        return super().read(pair)


@pytest.mark.parametrize("batched", [False, True])
def test_no_more_is_held_than_the_bound(
    dataset: Dataset, make_segmenter: Callable[[int], Segmenter], batched: bool
) -> None:
    batch, threads = 4, 2
    watched = Watched.of(dataset)
    held = [
        len(watched.started) - done
        for done, _ in enumerate(
            compare(make_segmenter(batch), watched, dataset.split("val"), threads=threads, batched=batched)
        )
    ]
    assert len(held) == COUNT
    # Of several sizes: an image may wait for others of its own as long as the chunk lasts.
    chunk = len(chunked(dataset.split("val"), batch=batch)[0])
    assert max(held) <= (chunk + batch + threads + 2 if batched else threads + 2)
    assert max(held) > (batch if batched else 1), "or nothing would be read ahead"


def test_the_next_pairs_are_read_while_the_network_runs(
    dataset: Dataset, make_segmenter: Callable[[int], Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, threads = 4, 2
    pairs = dataset.split("val")
    watched = Watched.of(dataset, awaited=pairs[batch + threads].key)
    segmenter = make_segmenter(batch)
    network = segmenter.coarse

    def waits(pixels: Tensor) -> Tensor:
        assert watched.read_it.wait(timeout=60), "the network waits for a pair that only reading ahead can bring"
        answer: Tensor = network(pixels)
        return answer

    monkeypatch.setattr(segmenter, "coarse", waits)
    found: Iterator[Compared] = compare(segmenter, watched, pairs, threads=threads, batched=True)
    assert next(found).pair == pairs[0]


@pytest.mark.parametrize("count", [1, 4, 8, COUNT, 99])
def test_examples_are_spread_over_the_split(dataset: Dataset, count: int) -> None:
    pairs = dataset.split("val")
    taken = spread(pairs, count)
    places = [pairs.index(pair) for pair in taken]
    assert places == sorted(set(places))
    assert len(places) == min(count, COUNT)
    assert places[0] == 0
    assert max(np.diff([*places, COUNT])) - min(np.diff([*places, COUNT])) <= 1
    assert spread((), count) == ()
