"""What turns decoded images into masks on an actor, and what builds it there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.stages.coordinator import ATTEMPTS, LoadingFailed
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.device import best_device, is_async
from pspnet_core.images.decoding import ImageFile
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Segmenter

CALLS = 2
"""Chunks that an actor has under way, so that its network need not wait between them."""


class Predictor(Protocol):
    """What turns decoded images into masks; ``pspnet_core.Segmenter`` is the real one."""

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Make one ``(H, W, 3)`` uint8 RGB image ready; called in threads."""

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Label prepared images, each with its key, in any order. Called by a thread for each chunk; one chunk's images
        can be drawn when the last one's are, though these may not all be labelled."""


@runtime_checkable
class FileDecoder(Protocol):
    """A predictor that decodes files itself, since it knows how many of their pixels it needs."""

    def decode(self, file: ImageFile, /) -> Prepared:
        """Make one image file ready; called in threads. Raises ImageError."""


class Unloadable:
    """Stands for a model whose loading has ended the process too often.

    It raises with the first image, because Ray hides the error of an actor's constructor.
    """

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Raises LoadingFailed."""
        raise LoadingFailed(
            f"loading the model ended its process {ATTEMPTS} times: look for the reason in the workers' logs (too "
            "little memory? fewer --workers leave more for each)"
        )

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Nothing, of no images."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class MakeSegmenter:
    """Builds a model's segmenter on an actor.

    Attributes:
        load: gives the checkpoint there.
        batch, compile: as for ``Segmenter``.
        resources: what the actor may use there; the batches are bounded by its memory, too.
    """

    load: Callable[[], Checkpoint]
    batch: int
    compile: bool
    resources: Callable[[], LocalResources]

    def __call__(self) -> Segmenter:
        """Build it on the best device there is."""
        checkpoint, resources = self.load(), self.resources()
        # What is compiled is for one thread at a time.
        lanes = None if self.compile or is_async(best_device()) else resources.threads
        return Segmenter(
            checkpoint.model,
            checkpoint.settings,
            batch=self.batch,
            memory=resources.pass_memory,
            lanes=lanes,
            compile=self.compile,
        )


@dataclass(frozen=True, kw_only=True)
class ModelToLoad:
    """The model of a run, as each executor brings it to where it is needed.

    Attributes:
        batch, compile: as for ``Segmenter``.
        stand_in: builds a predictor in place of the model's segmenter, in benchmarks and tests.
    """

    checkpoint: Checkpoint
    batch: int
    compile: bool
    stand_in: Callable[[], Predictor] | None = None

    @property
    def calls(self) -> int:
        """Chunks that an actor has under way; CUDA graphs stay in one thread."""
        return 1 if self.compile else CALLS

    def maker(self, load: Callable[[], Checkpoint], resources: Callable[[], LocalResources]) -> Callable[[], Predictor]:
        """What builds the predictor where it is called; arguments as for ``MakeSegmenter``."""
        if self.stand_in:
            return self.stand_in
        return MakeSegmenter(load=load, batch=self.batch, compile=self.compile, resources=resources)
