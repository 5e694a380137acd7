"""Comparing a model with labelled pairs, by the ``Segmenter`` that labels. Training and evaluation both call it."""

from collections import deque
from collections.abc import Iterable, Iterator

from pipelines.datasets import Dataset, Mask, Pair
from pspnet_core.inference import Prepared, Segmenter
from pspnet_core.metrics import ConfusionMatrix


def score(segmenter: Segmenter, dataset: Dataset, pairs: Iterable[Pair]) -> ConfusionMatrix:
    """Label the images of some pairs and count agreement with their masks, at the images' own size.

    Raises:
        ConfigError: for a pair that cannot be read; names the file.
    """
    confusion = ConfusionMatrix(len(dataset.classes))
    targets: deque[Mask] = deque()

    def prepared() -> Iterator[Prepared]:
        for pair in pairs:
            image, mask = dataset.read(pair)
            targets.append(mask)
            yield segmenter.prepare(image)

    for prediction in segmenter.predict(prepared()):
        confusion.update(prediction.mask, targets.popleft(), ignore=dataset.classes.ignore)
    return confusion
