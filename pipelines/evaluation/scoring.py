"""Comparing a model with labelled pairs, by the ``Segmenter`` that labels. Training and evaluation both call it.

The counts do not depend on how many workers, threads or processes share the work, though the last bits of a network's
answer depend on what else is in its batch and, on CPUs, on the number of threads:

* On GPUs pairs are dealt out in chunks, and no batch crosses one: each image meets the same neighbours in its forward
  pass on every worker.
* On CPUs each image goes through the network alone on one thread, several at a time.

Shapes: ``H W`` pixels of an image.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.datasets.dataset import Dataset, Mask, Pair
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Segmenter, prediction_of
from pspnet_core.metrics.confusion import ConfusionMatrix
from pspnet_core.threads import map_ahead

BATCH = 8
"""Most images of one forward pass, or on CPUs at a time, in training's validation and by default in evaluation."""

CHUNK = 16
"""Least pairs of a chunk: few, so that small splits spread over many workers."""

THREADS = 4
"""Threads that read and decode ahead of batches, by default."""


class Compared(NamedTuple):
    """A labelled pair and what the model says of it.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        target: ``(H, W)`` class ids, or the class table's ignore id.
        mask: ``(H, W)`` predicted class ids.
    """

    pair: Pair
    image: NDArray[np.uint8]
    target: Mask
    mask: Mask


def chunked(pairs: Sequence[Pair], *, batch: int = BATCH) -> list[tuple[Pair, ...]]:
    """Cut a split into chunks of whole batches, at least ``CHUNK`` pairs each; the last one takes what is left.

    Chunks that are joined again are cut at the same places, provided that the last one stays last.
    """
    size = batch * -(-CHUNK // batch)
    return [tuple(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def score(
    segmenter: Segmenter,
    dataset: Dataset,
    pairs: Sequence[Pair],
    *,
    threads: int | None = None,
    batched: bool | None = None,
) -> ConfusionMatrix:
    """The confusion matrix of one or more chunks, as ``chunked`` cuts them; arguments and errors as ``compare``."""
    counts = ConfusionMatrix(len(dataset.classes))
    for found in compare(segmenter, dataset, pairs, threads=threads, batched=batched):
        counts.update(found.mask, found.target, ignore=dataset.classes.ignore)
    return counts


def compare(
    segmenter: Segmenter,
    dataset: Dataset,
    pairs: Sequence[Pair],
    *,
    threads: int | None = None,
    batched: bool | None = None,
) -> Iterator[Compared]:
    """Label the images of some pairs at their own size, in order.

    Pairs are read ahead of the network, across chunks, too; no more than about a chunk, a batch and ``threads`` of them
    are held at a time, however many there are, and two batches where all are of one size.

    Args:
        pairs: one or more chunks, as ``chunked`` cuts them, one after the other.
        threads: with batches, how many pairs are read and decoded at a time, by default ``THREADS``; without, how many
            images go through the network at a time (but no more than the segmenter's batch), by default as many as
            torch has threads.
        batched: whether images share forward passes; by default on all devices but CPUs.

    Raises:
        ConfigError: for a pair that cannot be read; names the file.
        ImageError: for an image that memory does not hold even alone.
    """
    if batched if batched is not None else segmenter.device.type != "cpu":
        return _in_batches(segmenter, dataset, pairs, threads or THREADS)
    return _one_by_one(segmenter, dataset, pairs, min(threads or torch.get_num_threads(), segmenter.batch))


def _in_batches(segmenter: Segmenter, dataset: Dataset, pairs: Sequence[Pair], threads: int) -> Iterator[Compared]:
    """``compare`` by batches that do not cross a chunk."""
    with ThreadPoolExecutor(threads) as pool:
        read = functools.partial(_read, segmenter, dataset)
        ahead = map_ahead(pool, read, pairs, depth=segmenter.batch + threads)
        for chunk in chunked(pairs, batch=segmenter.batch):
            yield from _label_chunk(segmenter, itertools.islice(ahead, len(chunk)))


def _label_chunk(segmenter: Segmenter, pairs: Iterable[_Read]) -> Iterator[Compared]:
    """Label the pairs of a chunk together; yields them in order."""
    waiting: dict[int, _Read] = {}

    def prepared() -> Iterator[tuple[int, Prepared]]:
        for index, found in enumerate(pairs):
            waiting[index] = found
            yield index, found.prepared

    compared = {index: waiting.pop(index).compared(outcome) for index, outcome in segmenter.predict(prepared())}
    return (compared[index] for index in sorted(compared))


def _one_by_one(segmenter: Segmenter, dataset: Dataset, pairs: Sequence[Pair], lanes: int) -> Iterator[Compared]:
    """``compare`` by forward passes of one image on one thread each, ``lanes`` at a time."""

    def answer(pair: Pair) -> Compared:
        found = _read(segmenter, dataset, pair)
        ((_, outcome),) = segmenter.predict([(pair.key, found.prepared)])
        return found.compared(outcome)

    with _single_threaded(), ThreadPoolExecutor(lanes) as pool:
        yield from map_ahead(pool, answer, pairs, depth=lanes)


class _Read(NamedTuple):
    """A pair, decoded, and its image ready for the network."""

    pair: Pair
    image: NDArray[np.uint8]
    target: Mask
    prepared: Prepared

    def compared(self, outcome: Outcome) -> Compared:
        return Compared(self.pair, self.image, self.target, prediction_of(outcome).mask)


def _read(segmenter: Segmenter, dataset: Dataset, pair: Pair) -> _Read:
    if segmenter.settings.reduced:  # what labelling decodes to fewer pixels is scored by these
        sample = dataset.fetch(pair)
        decoded = dataset.decode(pair, sample)
        return _Read(pair, decoded.image, decoded.mask, segmenter.decode(sample.image))
    image, target = dataset.read(pair)
    return _Read(pair, image, target, segmenter.prepare(image))


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Limit torch to one thread per operation, also in threads that start inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(pairs: Sequence[Pair], count: int) -> tuple[Pair, ...]:
    """Up to ``count`` pairs, evenly over a split: the same ones every time, for pictures that can be compared."""
    taken = min(count, len(pairs))
    return tuple(pairs[index * len(pairs) // taken] for index in range(taken))
