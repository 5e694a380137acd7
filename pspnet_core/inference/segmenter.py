"""The one way from images to masks: labelling, validation and evaluation all go through ``Segmenter``.

The walk of one image: ``prepare`` (one network input per scale) -> coarse logits of a batch, of its mirror images too
-> ``postprocess`` (resize to the image's own size, softmax, average, argmax). With a sliding window the second and the
third step take turns: see ``sliding``.

Shapes: ``B`` batch, ``N`` bands (3 for RGB), ``C`` classes, ``H W`` pixels of the original image, ``h w`` of a network
input, ``p q`` coarse cells.
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.device import ToHost, best_device, compile_network, inference_dtype, is_async, to_device
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images.decoding import MAX_PIXELS, ImageFile
from pspnet_core.inference.batching import Window, by_size, one_ahead
from pspnet_core.inference.footprint import bytes_per_pixel
from pspnet_core.inference.inputs import ImageLike, Prepared, Sizes, decode, prepare, prepare_any
from pspnet_core.inference.memory import BatchLimits, MemoryBudget, is_shortage, release_cache
from pspnet_core.inference.postprocess import View, WholeView, postprocess
from pspnet_core.inference.sliding import sliding_views
from pspnet_core.inference.windows import most_pixels, most_windows
from pspnet_core.network.deploy import deploy
from pspnet_core.network.pspnet import PSPNet
from pspnet_core.threads import map_ahead

K = TypeVar("K", bound=Hashable)

WAITING_BATCHES = 16
"""Batches' worth of images that may be taken in the search for others of a size."""
WAITING_BYTES = 2**28
"""Most bytes of them, with their results."""
CPU_PIXELS = 2**18
"""Pixels of input in one forward pass on a CPU, unless one image has more: what larger batches save they lose in the
caches. On 2 cores PSPNet-50 is 1.2 times as fast with one image of 473 x 473 in a pass as with eight."""


class Prediction(NamedTuple):
    """Class and confidence of each pixel of an image.

    Attributes:
        mask: ``(H, W)`` winning class ids, uint8 (uint16 above 256 classes).
        confidence: ``(H, W)`` float32, the winner's probability in [1/C, 1].
    """

    mask: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.float32]


Outcome = Prediction | ImageError
"""What ``predict`` gives for an image: an error of kind ``TooLarge`` where memory does not hold it even alone."""

_InFlight = ToHost | ImageError
"""An outcome whose mask and confidence may still be on the device."""


def prediction_of(outcome: Outcome) -> Prediction:
    """Return the prediction, or raise the error that stands in its place."""
    if isinstance(outcome, ImageError):
        raise outcome
    return outcome


class Segmenter:
    """A model with its inference settings on a device.

    Batches are as large as ``batch``, ``memory`` and, on CPUs, ``CPU_PIXELS`` allow. When memory runs out with one all
    the same, it is tried again in halves, and batches of that size of image stay so small.

    Args:
        model: a PSPNet; it stays as it is, a copy is deployed on the device in the number format that suits it.
        settings: how images become network inputs.
        device: where to run; by default the best there is.
        batch: most images, or windows of images, in one forward pass; at least 1. The last bits of a network's answer
            depend on how many there are.
        memory: bytes that the forward passes under way may take, by ``footprint.bytes_per_pixel``, which runs one pass
            for it; by default unlimited. An image that takes more is tried alone.
        lanes: on CPUs, forward passes side by side with one thread each, so that no core waits for another; all new
            threads of torch have one then. By default one pass at a time on all of torch's threads.
        compile: whether the network is compiled for each size of input: see ``device.compile_network``.

    Attributes:
        on_pass: called as each forward pass begins, with the pixels of its input, and as its answers are made masks,
            with the pixels of these times the scales; in its thread. Set it to watch.

    Raises:
        ConfigError: for a batch below 1.
    """

    def __init__(
        self,
        model: PSPNet,
        settings: InferenceSettings | None = None,
        *,
        device: torch.device | None = None,
        batch: int = 8,
        memory: float = math.inf,
        lanes: int | None = None,
        compile: bool = False,
    ) -> None:
        if batch < 1:
            raise ConfigError("batch", batch, "give at least 1 image per forward pass")
        self.settings = settings or InferenceSettings()
        self.device = device or best_device()
        self.batch = batch
        self.window = Window(items=WAITING_BATCHES * batch, bytes=WAITING_BYTES)
        self.model = deploy(model, inference_dtype(self.device), device=self.device)
        pixels = math.inf
        if memory < math.inf:
            pixels = memory / bytes_per_pixel(self.model.coarse, bands=model.config.bands, device=self.device)
        self.budget = MemoryBudget(pixels)  # for the inputs of all passes under way, whichever thread began them
        of_one_pass = min(pixels, CPU_PIXELS) if self.device.type == "cpu" else pixels
        self.limits = BatchLimits(batch, functools.partial(_inputs_in, of_one_pass, side=self.settings.window))
        self.lanes = lanes or 0
        self.pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) if lanes else None
        self.coarse = compile_network(self.model.coarse, self.device) if compile else self.model.coarse
        self.on_pass: Callable[[int], None] = _unwatched

    @classmethod
    def load(
        cls, folder: Path | str, *, device: torch.device | str | None = None, batch: int = 8, threads: int | None = None
    ) -> "Segmenter":
        """Load a checkpoint folder; answers as ``jobs/label.py`` does by default.

        Args:
            folder: what ``save_checkpoint``, training or conversion wrote.
            device: such as ``"cpu"`` or ``"cuda:1"``; by default CUDA when there is one, else the CPU.
            batch: most images in one forward pass, at least 1.
            threads: CPU threads, each of which runs a forward pass of its own; by default as many as torch uses. From
                then on torch uses one thread in every thread that is started later. A GPU needs none.

        Raises:
            ConfigError: the folder is no checkpoint, or a number is below 1.
        """
        if threads is not None and threads < 1:
            raise ConfigError("threads", threads, "give at least 1 thread")
        checkpoint = load_checkpoint(folder)
        where = best_device() if device is None else torch.device(device)
        lanes = None if is_async(where) else threads or torch.get_num_threads()
        return cls(checkpoint.model, checkpoint.settings, device=where, batch=batch, lanes=lanes)

    def __call__(self, images: Iterable[ImageLike]) -> list[Prediction]:
        """Label images.

        Args:
            images: of any sizes: ``(H, W, N)`` uint8 arrays (RGB by default), encoded files, paths or PIL pictures.

        Returns:
            One prediction per image, in order, at the image's own size (after EXIF orientation).

        Raises:
            ConfigError: for an array of another shape or type.
            ImageError: for a file that cannot be decoded, or an image that memory does not hold.
            OSError: for a path that cannot be read.
        """
        bands = self.model.config.bands
        prepared = (prepare_any(image, self.settings, bands=bands) for image in images)
        outcomes = dict(self.predict(enumerate(prepared)))
        return [prediction_of(outcomes[index]) for index in range(len(outcomes))]

    def decode(self, file: bytes | ImageFile, *, max_pixels: int = MAX_PIXELS) -> Prepared:
        """Decode an image file and resize it by rule, once per scale. Touches no device: safe in decoding threads.

        Args:
            file, max_pixels: as for ``decode_image``.

        Raises:
            ImageError: as ``decode_image``.
        """
        return decode(file, self.settings, max_pixels=max_pixels)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Resize an ``(H, W, N)`` uint8 image by rule, once per scale; safe in decoding threads, too."""
        return prepare(image, self.settings)

    def predict(self, images: Iterable[tuple[K, Prepared]]) -> Iterator[tuple[K, Outcome]]:
        """Label keyed images; outcomes come with their keys, batch by batch, in any order.

        Images of one size share forward passes, neighbours or not: images are taken ahead of those that wait for
        others, ``WAITING_BATCHES`` batches or ``WAITING_BYTES`` at most.
        """
        batches = by_size(
            images,
            size=lambda image: image.sizes,
            most=lambda sizes: self._images_per_pass(sizes, self.limits.of(sizes)),
            cost=lambda image: image.nbytes,
            window=self.window,
        )
        for key, outcome in itertools.chain.from_iterable(self._launch_ahead(batches)):
            yield key, outcome if isinstance(outcome, ImageError) else Prediction(*outcome.arrays())

    def _launch_ahead(self, batches: Iterable[list[tuple[K, Prepared]]]) -> Iterator[list[tuple[K, _InFlight]]]:
        """Launch batches ahead of those whose outcomes are fetched: in each lane, or one on an asynchronous device."""
        if self.pool:
            most = self.lanes * WAITING_BYTES
            return map_ahead(self.pool, self._launch, batches, depth=2 * self.lanes, weight=_bytes_of, most=most)
        launched = map(self._launch, batches)
        return one_ahead(launched) if is_async(self.device) else launched

    @torch.inference_mode()
    def _launch(self, batch: list[tuple[K, Prepared]]) -> list[tuple[K, _InFlight]]:
        """Label a batch of one size, once the memory for it is free."""
        images = [image for _, image in batch]
        sizes = images[0].sizes
        inputs = self._inputs_per_pass(len(images), sizes, self.limits.of(sizes))
        with self.budget.reserve(inputs * most_pixels(sizes, self.settings.window)):
            return [(key, outcome) for (key, _), outcome in zip(batch, self._label(images), strict=True)]

    def _label(self, images: Sequence[Prepared]) -> Iterator[_InFlight]:
        """Label images of one size, in order; from where memory runs out in smaller passes."""
        sizes, rest = images[0].sizes, list(images)
        while rest:
            limit = self.limits.of(sizes)
            some = rest[: self._images_per_pass(sizes, limit)]
            done = 0
            try:
                for prediction in self._forward(some, limit):
                    yield prediction
                    done += 1
            except Exception as error:
                if not is_shortage(error):
                    raise
            if done < len(some):
                # Only here, since the error holds on to what the failed pass had allocated.
                release_cache(self.device)
                inputs = self._inputs_per_pass(len(some), sizes, limit)
                if inputs == 1:
                    yield _too_large(some[0])
                    done = 1
                else:
                    self.limits.halve(sizes, inputs)
            rest = rest[done:]

    def _forward(self, images: Sequence[Prepared], limit: int) -> Iterator[ToHost]:
        """Batch -> coarse logits -> classes, for images of one size; at most ``limit`` windows in a pass."""
        views = [self._views(inputs, limit) for inputs in zip(*(image.views for image in images), strict=True)]
        align_corners = self.model.config.align_corners
        for image, own in zip(images, zip(*views, strict=True), strict=True):
            self.on_pass(image.height * image.width * len(own))
            yield ToHost(*postprocess(own, image.height, image.width, align_corners=align_corners))

    def _views(self, inputs: Sequence[NDArray[np.uint8]], limit: int) -> Iterable[View]:
        """What the network says of each input, for inputs ``(h, w, N)`` of one scale."""
        pixels = to_device(np.stack(inputs), self.device).permute(0, 3, 1, 2)
        height, width = pixels.shape[-2:]
        if self.settings.window:
            side, classes = self.settings.window, self.model.config.classes
            return sliding_views(pixels, self._logits, side=side, limit=limit, classes=classes)
        answers = self._logits(pixels)
        return (WholeView(height, width, own) for own in zip(*answers, strict=True))

    def _logits(self, pixels: Tensor) -> list[Tensor]:
        """Coarse logits ``(B, C, p, q)`` float32 of ``(B, N, h, w)`` uint8; with ``flip`` of the mirror images, too."""
        self.on_pass(pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1])
        logits = [self.coarse(pixels).float()]
        if self.settings.flip:
            logits.append(self.coarse(pixels.flip(-1)).float().flip(-1))
        return logits

    def _images_per_pass(self, sizes: Sizes, limit: int) -> int:
        """Images whose windows all fit into one pass share it; an image with more windows is alone."""
        return max(1, limit // most_windows(sizes, self.settings.window))

    def _inputs_per_pass(self, images: int, sizes: Sizes, limit: int) -> int:
        """Inputs of a pass over so many images: as many windows of each as the limit allows."""
        return images * min(most_windows(sizes, self.settings.window), max(1, limit // images))


def _unwatched(pixels: int) -> None:
    """Nobody wants to know of forward passes."""


def _bytes_of(batch: Sequence[tuple[K, Prepared]]) -> int:
    return sum(image.nbytes for _, image in batch)


def _inputs_in(pixels: float, sizes: Sizes, *, side: int) -> float:
    return pixels / most_pixels(sizes, side)


def _too_large(image: Prepared) -> ImageError:
    return ImageError(
        "TooLarge",
        f"{image.width} x {image.height} pixels, more than memory holds; look at it through a smaller window "
        "(--window), or give it more memory",
    )
