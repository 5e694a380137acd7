"""Stand-ins for the model that end the process, as a fault in a driver or the end of memory would."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.labelling.stages.coordinator import ATTEMPTS, ChunkStates
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction


class Unborn:
    """Ends the process while it is made."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Never called."""
        raise NotImplementedError

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Never called."""
        raise NotImplementedError


class Deadly:
    """Takes images as they are, and dies of the first."""

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """The image as it is."""
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Never returns."""
        for key, image in images:
            os.kill(os.getpid(), signal.SIGKILL)
            yield key, Prediction(np.zeros((image.height, image.width), np.uint8), np.ones((1, 1), np.float32))


class Choosy(Deadly):
    """Dies of images of ``HEIGHT`` rows only."""

    HEIGHT = 23

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Says of all others that every pixel is of class 0."""
        for key, image in images:
            if image.height == self.HEIGHT:
                os._exit(1)
            size = (image.height, image.width)
            yield key, Prediction(np.zeros(size, np.uint8), np.ones(size, np.float32))


class Childless(Choosy):
    """Also keeps its process from starting any Python."""

    def __init__(self) -> None:
        sys.executable = os.devnull


class Impatient(ChunkStates):
    """Tries a chunk's images once together and once alone, and counts the first two starts of an actor as the last."""

    together = alone = 1

    def start(self, actor: str) -> int:
        """As many more, so that the third start is one too many."""
        return super().start(actor) + ATTEMPTS - 2
