"""Comparing a model with labelled pairs, by the ``Segmenter`` that labels. Training and evaluation both call it."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipelines.datasets import Dataset, Mask, Pair
from pspnet_core.inference import Prepared, Segmenter
from pspnet_core.metrics import ConfusionMatrix, Scores

Tally = TypeVar("Tally", ConfusionMatrix, Scores)


def score(segmenter: Segmenter, dataset: Dataset, pairs: Iterable[Pair]) -> ConfusionMatrix:
    """The confusion matrix of some pairs; as ``tally``, without the boundaries."""
    return tally(segmenter, dataset, pairs, ConfusionMatrix(len(dataset.classes)))


def tally(segmenter: Segmenter, dataset: Dataset, pairs: Iterable[Pair], counts: Tally) -> Tally:
    """Label the images of some pairs and count agreement with their masks, at the images' own size.

    Args:
        counts: what to count in: a confusion matrix, or scores that hold the boundaries as well.

    Returns:
        ``counts``.

    Raises:
        ConfigError: for a pair that cannot be read; names the file.
    """
    targets: deque[Mask] = deque()

    def prepared() -> Iterator[Prepared]:
        for pair in pairs:
            image, mask = dataset.read(pair)
            targets.append(mask)
            yield segmenter.prepare(image)

    for prediction in segmenter.predict(prepared()):
        counts.update(prediction.mask, targets.popleft(), ignore=dataset.classes.ignore)
    return counts
