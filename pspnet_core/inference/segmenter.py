"""The one way from an image to its mask: labelling, validation and evaluation all go through ``Segmenter``.

The walk of one image: ``prepare`` (resize by rule, one input per scale) -> coarse logits of each input's windows,
mirrored ones included -> ``decide`` (resize to the image's own size, softmax, average, argmax).

Shapes: ``B`` batch, ``N`` bands (3 for RGB), ``C`` classes, ``H W`` pixels of the original image, ``h w`` of the
network's input, ``p q`` coarse cells.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pspnet_core.device import ToHost, best_device, compiled, inference_dtype, to_device, works_alone
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images.decoding import MAX_PIXELS, ImageFile, decode_image, decode_views
from pspnet_core.inference.batching import Limits, Window, by_size, is_shortage, one_ahead, relieve
from pspnet_core.inference.footprint import bytes_per_pixel
from pspnet_core.inference.postprocess import Tile, View, decide
from pspnet_core.inference.windows import windows
from pspnet_core.network.fusion import deploy
from pspnet_core.network.pspnet import PSPNet
from pspnet_core.threads import Room, map_ahead

T = TypeVar("T")

WAITING_BATCHES = 16
"""Batches' worth of images that may be taken in the search for others of a size."""
WAITING_BYTES = 2**28
"""Most bytes of them, with their results."""
CPU_PIXELS = 2**18
"""Pixels of input in one forward pass on a CPU, unless one image has more: what larger batches save they lose in the
caches. On 2 cores PSPNet-50 is 1.2 times as fast with one image of 473 x 473 in a pass as with eight."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How an image becomes network inputs. Stored with the model and part of its fingerprint."""

    resize: Literal["none", "short", "long", "scale", "fixed"] = "none"
    """Network input: the image as it is, its short or long side brought to ``size``, its sides times ``size``, or
    ``shape`` whatever its own."""
    size: float = 0.0
    """Pixels for the short or long side; a factor for ``scale``; unused by the others."""
    shape: tuple[int, int] | None = None
    """Height and width in pixels for ``fixed``; unused by the others."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on that input; the probabilities of all are averaged (paper, section 5.1)."""
    flip: bool = False
    """Whether the mirrored input is averaged in as well."""
    window: int = 0
    """Side of the square sliding window in input pixels, overlapping by a third; 0 for the whole image at once."""
    reduced: bool = False
    """Whether a JPEG that is larger than the network's input is decoded to a half, a quarter or an eighth of its sides,
    as long as that is no smaller than the input: faster, and very nearly the same input."""

    def __post_init__(self) -> None:
        if self.resize not in ("none", "short", "long", "scale", "fixed"):
            raise ConfigError("resize", self.resize, "choose none, short, long, scale or fixed")
        if self.resize in ("short", "long", "scale") and not 0 < self.size < math.inf:
            raise ConfigError("size", self.size, f"resize={self.resize} needs a positive size")
        if self.shape is None:
            if self.resize == "fixed":
                raise ConfigError("shape", self.shape, "resize=fixed needs a height and a width")
        elif len(tuple(self.shape)) != 2 or min(self.shape) < 1:
            raise ConfigError("shape", self.shape, "give a height and a width of at least 1 pixel each")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError("scales", self.scales, "give positive factors, such as 0.75,1.0,1.25")
        if self.window < 0 or 0 < self.window < 32:
            raise ConfigError("window", self.window, "give a window of at least 32 pixels, or 0 for none")

    def input_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width of the network's input for an image of this size, at least 1 pixel each."""
        if self.shape is not None and self.resize == "fixed":
            height, width = self.shape
        factor = {
            "none": scale,
            "short": round(self.size * scale) / min(height, width),
            "long": round(self.size * scale) / max(height, width),
            "scale": self.size * scale,
            "fixed": scale,
        }[self.resize]
        return max(1, round(height * factor)), max(1, round(width * factor))


class Prepared(NamedTuple):
    """An image ready for the network: its own size, and one ``(h, w, N)`` uint8 input per scale."""

    height: int
    width: int
    views: tuple[NDArray[np.uint8], ...]


class Prediction(NamedTuple):
    """A labelled image.

    Attributes:
        mask: ``(H, W)`` winning class ids, uint8 (uint16 above 256 classes).
        confidence: ``(H, W)`` float32, the winner's probability in [1/C, 1].
    """

    mask: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.float32]


Outcome = Prediction | ImageError
"""What becomes of an image: an error of kind ``TooLarge`` where memory does not hold it even alone."""


def prediction_of(outcome: Outcome) -> Prediction:
    """The prediction; raises the error that stands in its place."""
    if isinstance(outcome, ImageError):
        raise outcome
    return outcome


class Segmenter:
    """A model with its settings on a device.

    Batches are as large as ``batch``, ``memory`` and, on CPUs, ``CPU_PIXELS`` allow. When memory runs out with one all
    the same, it is tried again in halves, and batches of that size of image stay so small.

    Args:
        model: a PSPNet; it stays as it is, a copy is deployed on the device in the number format that suits it.
        settings: how images become network inputs.
        device: where to run; by default the best there is.
        batch: most images, or windows of images, in one forward pass; at least 1. The last bits of a network's answer
            depend on how many there are.
        memory: bytes that the forward passes under way may take, by ``footprint.bytes_per_pixel``, which watches one
            pass for it; by default unlimited. An image that takes more is tried alone.
        lanes: forward passes under way at a time, by default one on all of torch's threads. With more, which is for
            CPUs, each has one thread: no core waits for another. All of torch has one thread then.
        compile: whether the network is compiled for each size of input: see ``device.compiled``.

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
        lanes: int = 1,
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
        self.room = Room(pixels)  # for the inputs of all passes under way, whoever began them
        of_one_pass = min(pixels, CPU_PIXELS) if self.device.type == "cpu" else pixels
        self.limits = Limits(batch, functools.partial(_inputs_in, of_one_pass, side=self.settings.window))
        self.lanes = lanes
        self.pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) if lanes > 1 else None
        self.coarse = compiled(self.model.coarse, self.device) if compile else self.model.coarse

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Label images.

        Args:
            images: ``(H, W, N)`` uint8 each (RGB by default), of any sizes.

        Returns:
            One prediction per image, in order, at the image's own size.
        """
        return [prediction_of(outcome) for outcome in self.predict(self.prepare(image) for image in images)]

    def decode(self, file: bytes | ImageFile, *, max_pixels: int = MAX_PIXELS) -> Prepared:
        """Decode an image file and resize it by rule, once per scale. Touches no device: safe in decoding threads.

        Args:
            file, max_pixels: as for ``images.decode_image``.

        Raises:
            ImageError: as ``images.decode_image``.
        """
        if not self.settings.reduced:
            return self.prepare(decode_image(file, max_pixels=max_pixels))
        return Prepared(*decode_views(file, self._input_sizes, max_pixels=max_pixels))

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """As ``decode``, of an ``(H, W, N)`` uint8 image that is decoded already."""
        height, width = _size(image)
        return Prepared(height, width, tuple(_resized(image, size) for size in self._input_sizes(height, width)))

    def _input_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the input for each scale."""
        return [self.settings.input_size(height, width, scale) for scale in self.settings.scales]

    def predict(self, images: Iterable[Prepared]) -> Iterator[Outcome]:
        """Label prepared images, in order. Those of one size share forward passes, neighbours or not: images are taken
        ahead of those that wait for company, ``WAITING_BATCHES`` batches or ``WAITING_BYTES`` at most."""
        ready: dict[int, Outcome] = {}
        following = 0
        batches = by_size(images, size=_sizes, most=self._images_at_once, cost=_most_bytes, window=self.window)
        for position, outcome in self._in_flight(batches):
            ready[position] = _arrived(outcome)
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _in_flight(self, batches: Iterable[list[tuple[int, Prepared]]]) -> Iterator[tuple[int, "_InFlight"]]:
        """Positions and outcomes, batch by batch. A device that works alone has the next batch before they are asked
        for, so that it need not wait while they are fetched and more images are prepared."""
        if self.pool:
            most = self.lanes * WAITING_BYTES
            ahead = map_ahead(self.pool, self._launched, batches, depth=2 * self.lanes, weight=_bytes_of, most=most)
            return itertools.chain.from_iterable(ahead)
        launched = map(self._launched, batches)
        return itertools.chain.from_iterable(one_ahead(launched) if works_alone(self.device) else launched)

    @torch.inference_mode()
    def _launched(self, batch: list[tuple[int, Prepared]]) -> list[tuple[int, "_InFlight"]]:
        positions, images = [position for position, _ in batch], [image for _, image in batch]
        with self.room.taken(self._pixels_of(images)):
            return list(zip(positions, self._outcomes(images), strict=True))

    def _images_at_once(self, size: "Sizes") -> int:
        """Images whose windows all fit into one pass share it; an image with more windows is alone."""
        return max(1, self.limits.of(size) // self._windows(size))

    def _pixels_of(self, images: Sequence[Prepared]) -> float:
        """Of all inputs of a pass over images of one size."""
        size = _sizes(images[0])
        return self._inputs(len(images), size, self.limits.of(size)) * _most_pixels(size, self.settings.window)

    def _inputs(self, images: int, size: "Sizes", limit: int) -> int:
        """Of one pass over so many images: as many windows of each as the limit allows."""
        return images * min(self._windows(size), max(1, limit // images))

    def _windows(self, size: "Sizes") -> int:
        return _most_windows(size, self.settings.window)

    def _outcomes(self, batch: Sequence[Prepared]) -> Iterator["_InFlight"]:
        """Label images of one size, in order; from where memory runs out in smaller batches."""
        size, rest = _sizes(batch[0]), list(batch)
        while rest:
            some, limit = rest[: self._images_at_once(size)], self.limits.of(size)
            done = 0
            try:
                for prediction in self._predict_batch(some, limit):
                    yield prediction
                    done += 1
            except Exception as error:
                if not is_shortage(error):
                    raise
            if done < len(some):
                # Only here, since the error holds on to what the failed pass had allocated.
                relieve(self.device)
                inputs = self._inputs(len(some), size, limit)
                if inputs == 1:
                    yield _too_large(some[0])
                    done = 1
                else:
                    self.limits.lower(size, inputs)
            rest = rest[done:]

    def _predict_batch(self, batch: Sequence[Prepared], limit: int) -> Iterator[ToHost]:
        inputs = zip(*(image.views for image in batch), strict=True)
        tiles = [_dealt(self._tiles(views, limit), len(batch)) for views in inputs]
        for image, *own in zip(batch, *tiles, strict=True):
            views = [View(*_size(view), stream) for view, stream in zip(image.views, own, strict=True)]
            yield ToHost(*decide(views, image.height, image.width, align_corners=self.model.config.align_corners))

    def _tiles(self, inputs: Sequence[NDArray[np.uint8]], limit: int) -> Iterator[list[Tile]]:
        """What the network says of inputs of one size, window by window from top to bottom: one tile per input."""
        pixels = to_device(np.stack(inputs), self.device).permute(0, 3, 1, 2)
        places = windows(*_size(inputs[0]), self.settings.window)
        for some in _chunks(places, max(1, limit // len(inputs))):
            parts = torch.cat([pixels[(..., *window.slices)] for window in some])
            answers = [self._coarse(parts)]
            if self.settings.flip:
                answers.append(self._coarse(parts.flip(-1)).flip(-1))
            for index, window in enumerate(some):
                for answer in answers:
                    yield [Tile(logits, window) for logits in answer[index * len(inputs) :][: len(inputs)]]

    def _coarse(self, pixels: Tensor) -> Tensor:
        """Coarse logits ``(B, C, p, q)`` float32 of ``(B, N, h, w)`` uint8 pixels."""
        logits: Tensor = self.coarse(pixels)
        return logits.float()


_InFlight = ToHost | ImageError
"""What becomes of an image, maybe still on the device: mask and confidence as in ``Prediction``, or an error."""


def _arrived(outcome: _InFlight) -> Outcome:
    return outcome if isinstance(outcome, ImageError) else Prediction(*outcome.arrays())


Sizes = tuple[tuple[int, ...], ...]
"""Shapes of an image's views. All of them count: rounding may give two images one size at one scale and different ones
at another."""


def _sizes(image: Prepared) -> Sizes:
    return tuple(view.shape for view in image.views)


def _most_bytes(image: Prepared) -> int:
    """What is held of an image: its inputs, then a prediction of 5 bytes per pixel."""
    return max(sum(view.nbytes for view in image.views), 5 * image.height * image.width)


@functools.lru_cache(maxsize=1024)
def _most_windows(size: Sizes, side: int) -> int:
    return max(len(windows(height, width, side)) for height, width, _ in size)


def _bytes_of(batch: Sequence[tuple[int, Prepared]]) -> int:
    return sum(_most_bytes(image) for _, image in batch)


def _inputs_in(pixels: float, size: Sizes, *, side: int) -> float:
    return pixels / _most_pixels(size, side)


def _most_pixels(size: Sizes, side: int) -> int:
    """Of the largest input that an image of this size brings."""
    return max(min(height, side or height) * min(width, side or width) for height, width, _ in size)


def _too_large(image: Prepared) -> ImageError:
    return ImageError(
        "TooLarge",
        f"{image.width} x {image.height} pixels, more than memory holds; look at it through a smaller window "
        "(--window), or give it more memory",
    )


def _size(image: NDArray[np.uint8]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if _size(image) == size:
        return image
    # Pillow knows pictures of three bands and of one.
    pictures = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR) for picture in pictures]
    return np.dstack([np.asarray(picture) for picture in resized])


def _dealt(groups: Iterator[list[T]], hands: int) -> list[Iterator[T]]:
    """An iterator for each place of the groups. The first to need a group takes it; the others' items wait for them."""
    waiting: list[deque[T]] = [deque() for _ in range(hands)]

    def hand(own: deque[T]) -> Iterator[T]:
        while True:
            if not own:
                group = next(groups, None)
                if group is None:
                    return
                for queue, item in zip(waiting, group, strict=True):
                    queue.append(item)
            yield own.popleft()

    return [hand(own) for own in waiting]


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
