"""What takes the network's place in benchmarks of everything around it."""

import itertools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.demo.scenes import draw_scene
from pspnet_core.inference.batching import one_ahead
from pspnet_core.inference.segmenter import Prediction, Prepared

WIDTH, HEIGHT = 480, 360

BATCH = 8
"""Images that a stand-in that sleeps takes at a time, as ``--batch`` of the real network."""


class Instant:
    """Answers every image at once with the same ready mask, that of a drawn scene, and a confidence map."""

    def __init__(self) -> None:
        mask = draw_scene(0, width=WIDTH, height=HEIGHT)[1]
        confidence = np.random.default_rng(0).uniform(0.5, 1.0, mask.shape).astype(np.float32)
        self.answer = Prediction(mask, confidence)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """The image as it is."""
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[Prepared]) -> Iterator[Prediction]:
        """The ready answer, once per image."""
        for _ in images:
            yield self.answer


class Sleeping(Instant):
    """Takes some time for each image, in which it needs no CPU and lets other threads run, as a GPU does.

    Like one it works on batches, one after the other, and is given the next before the last is waited for.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.device = ThreadPoolExecutor(1)

    def predict(self, images: Iterable[Prepared]) -> Iterator[Prediction]:
        """The ready answer, once per image, when the device is through with its batch."""
        waiting = iter(images)
        batches = iter(lambda: list(itertools.islice(waiting, BATCH)), [])
        for done in one_ahead(self.device.submit(self._work, len(batch)) for batch in batches):
            yield from done.result()

    def _work(self, count: int) -> list[Prediction]:
        time.sleep(count * self.seconds)
        return [self.answer] * count


@dataclass(frozen=True)
class SleepingFor:
    """Builds a ``Sleeping`` on an actor."""

    seconds: float

    def __call__(self) -> Sleeping:
        """Of this many seconds for each image."""
        return Sleeping(self.seconds)
