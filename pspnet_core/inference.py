"""The one way from an image to its mask: labelling, validation and evaluation all go through ``Segmenter``.

The walk of one image: ``prepare`` (resize by rule, one view per scale) -> ``coarse logits`` of each view, mirrored ones
included -> ``decide`` (resize to the image's own size, softmax, average over views, argmax), in bands of rows so that
no ``(C, H, W)`` array of the whole image ever exists.

Shapes: ``C`` classes, ``H W`` pixels of the original image, ``h w`` of the network's input, ``p q`` coarse cells.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pspnet_core.device import autocast, best_device, place
from pspnet_core.errors import ConfigError
from pspnet_core.pspnet import PSPNet

BAND_VALUES = 2**20  # logits held at once while deciding; small enough to stay in a CPU's cache


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How an image becomes network inputs. Stored with the model and part of its fingerprint."""

    resize: Literal["none", "short", "long", "scale"] = "none"
    """Network input: the image as it is, its short or long side brought to ``size``, or its sides times ``size``."""
    size: float = 0.0
    """Pixels for the short or long side; a factor for ``scale``; unused for ``none``."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on that input; the probabilities of all are averaged (paper, section 5.1)."""
    flip: bool = False
    """Whether the mirrored input is averaged in as well."""
    window: int = 0
    """Side of the square sliding window in input pixels, overlapping by a third; 0 for the whole image at once."""

    def __post_init__(self) -> None:
        if self.resize not in ("none", "short", "long", "scale"):
            raise ConfigError("resize", self.resize, "choose none, short, long or scale")
        if self.resize != "none" and not 0 < self.size < math.inf:
            raise ConfigError("size", self.size, f"resize={self.resize} needs a positive size")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError("scales", self.scales, "give positive factors, such as 0.75,1.0,1.25")
        if self.window < 0 or 0 < self.window < 32:
            raise ConfigError("window", self.window, "give a window of at least 32 pixels, or 0 for none")

    def input_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width of the network's input for an image of this size, at least 1 pixel each."""
        factor = {
            "none": 1.0,
            "short": self.size / min(height, width),
            "long": self.size / max(height, width),
            "scale": self.size,
        }[self.resize]
        return max(1, round(height * factor * scale)), max(1, round(width * factor * scale))


class Prepared(NamedTuple):
    """An image ready for the network: its own size, and one ``(h, w, 3)`` uint8 input per scale."""

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


class View(NamedTuple):
    """Coarse logits ``(C, p, q)`` of one network input; ``mirrored`` when that input was."""

    logits: Tensor
    mirrored: bool


class Segmenter:
    """A model with its settings on a device.

    Args:
        model: a PSPNet; it is put into evaluation mode and moved to the device.
        settings: how images become network inputs.
        device: where to run; by default the best there is.
        batch: most images in one forward pass, at least 1.

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
    ) -> None:
        if batch < 1:
            raise ConfigError("batch", batch, "give at least 1 image per forward pass")
        self.settings = settings or InferenceSettings()
        self.device = device or best_device()
        self.batch = batch
        self.model = model.eval()
        place(self.model, self.device)

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Label images.

        Args:
            images: ``(H, W, 3)`` uint8 RGB each, of any sizes.

        Returns:
            One prediction per image, in order, at the image's own size.
        """
        return list(self.predict(self.prepare(image) for image in images))

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Resize one ``(H, W, 3)`` uint8 image by rule, once per scale. Touches no device: safe in decoding threads."""
        height, width = image.shape[:2]
        sizes = [self.settings.input_size(height, width, scale) for scale in self.settings.scales]
        return Prepared(height, width, tuple(_resized(image, size) for size in sizes))

    @torch.inference_mode()
    def predict(self, images: Iterable[Prepared]) -> Iterator[Prediction]:
        """Label prepared images, one after the other; neighbours of one size share a forward pass."""
        # All views count: rounding may give two images one size at one scale and different ones at another.
        for _, neighbours in itertools.groupby(images, key=lambda image: [view.shape for view in image.views]):
            for batch in _batches(neighbours, self.batch):
                yield from self._predict_batch(batch)

    def _predict_batch(self, batch: Sequence[Prepared]) -> Iterator[Prediction]:
        views = [view for inputs in zip(*(image.views for image in batch), strict=True) for view in self._views(inputs)]
        for index, image in enumerate(batch):
            own = [View(logits[index], mirrored) for logits, mirrored in views]
            mask, confidence = decide(own, image.height, image.width, align_corners=self.model.config.align_corners)
            yield Prediction(mask.cpu().numpy(), confidence.cpu().numpy())

    def _views(self, inputs: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[Tensor, bool]]:
        """Coarse logits ``(B, C, p, q)`` of inputs of one size, then those of their mirror images if asked."""
        pixels = torch.from_numpy(np.stack(inputs)).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        yield self._logits(pixels), False
        if self.settings.flip:
            yield self._logits(pixels.flip(-1)), True

    def _logits(self, pixels: Tensor) -> Tensor:
        window = self.settings.window
        if window and max(pixels.shape[-2:]) > window:
            return self._sliding_logits(pixels, window)
        with autocast(self.device):
            logits: Tensor = self.model.coarse(pixels).main
        return logits.float()

    def _sliding_logits(self, pixels: Tensor, window: int) -> Tensor:
        """Mean of the logits of overlapping windows, ``(B, C, h, w)`` at the input's own size."""
        height, width = pixels.shape[-2:]
        total = pixels.new_zeros((len(pixels), self.model.config.classes, height, width), dtype=torch.float32)
        count = pixels.new_zeros((height, width), dtype=torch.float32)
        for top, left in itertools.product(_starts(height, window), _starts(width, window)):
            rows, columns = slice(top, top + window), slice(left, left + window)
            with autocast(self.device):
                total[..., rows, columns] += self.model(pixels[..., rows, columns]).main
            count[rows, columns] += 1
        return total / count


def decide(views: Sequence[View], height: int, width: int, *, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The winning class of each pixel and its probability, averaged over the views.

    Each view is resized to ``(height, width)`` bilinearly (by two matrix products, a band of rows at a time).

    Returns:
        Mask ``(H, W)`` uint8 (uint16 above 256 classes) and confidence ``(H, W)`` float32.
    """
    classes, device = views[0].logits.shape[0], views[0].logits.device
    dtype = torch.uint8 if classes <= 256 else torch.uint16
    mask = torch.empty((height, width), dtype=dtype, device=device)
    confidence = torch.empty((height, width), dtype=torch.float32, device=device)
    resizers = [_Resizer(view, height, width, align_corners=align_corners) for view in views]
    step = max(1, BAND_VALUES // (classes * width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        if len(resizers) == 1:
            # The largest softmax value is 1 / sum(exp(x - max x)): no need to divide all of them.
            band = resizers[0].band(rows)
            best, winner = band.max(dim=0)
            confidence[rows] = band.sub_(best).exp_().sum(dim=0).reciprocal_()
        else:
            mean = torch.stack([resizer.band(rows).softmax(dim=0) for resizer in resizers]).mean(dim=0)
            confidence[rows], winner = mean.max(dim=0)
        mask[rows] = winner.to(dtype)
    return mask, confidence


class _Resizer:
    """Bilinear resizing of one view to the image's size, a band of rows at a time."""

    def __init__(self, view: View, height: int, width: int, *, align_corners: bool) -> None:
        classes, rows, columns = view.logits.shape
        device = view.logits.device
        self.rows = interpolation_matrix(height, rows, align_corners=align_corners).to(device)
        across = interpolation_matrix(width, columns, align_corners=align_corners).to(device)
        self.across = (across.flip(0) if view.mirrored else across).t().contiguous()
        self.logits = view.logits.permute(1, 0, 2).reshape(rows, classes * columns)
        self.shape = (classes, columns)

    def band(self, rows: slice) -> Tensor:
        """Logits ``(C, rows, W)`` of some rows of the image."""
        classes, columns = self.shape
        tall = (self.rows[rows] @ self.logits).view(-1, classes, columns).transpose(0, 1)
        return tall @ self.across


def interpolation_matrix(outputs: int, inputs: int, *, align_corners: bool) -> Tensor:
    """The linear map of 1-d linear interpolation, as ``torch.nn.functional.interpolate`` defines it.

    Returns:
        ``(outputs, inputs)`` float32 whose rows sum to 1, at most two entries of a row being non-zero.
    """
    position = torch.arange(outputs, dtype=torch.float64)
    if align_corners:
        position = position * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        position = ((position + 0.5) * (inputs / outputs) - 0.5).clamp_min(0)
    low = position.floor().long().clamp_max(inputs - 1)
    high = (low + 1).clamp_max(inputs - 1)
    share = (position - low).unsqueeze(1)
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    matrix.scatter_add_(1, low.unsqueeze(1), 1 - share)
    matrix.scatter_add_(1, high.unsqueeze(1), share)
    return matrix.float()


def _starts(length: int, window: int) -> list[int]:
    """Where windows start so that neighbours overlap by at least a third and the last one ends at the end."""
    if length <= window:
        return [0]
    count = -(-(length - window) // (window * 2 // 3)) + 1
    return [round(index * (length - window) / (count - 1)) for index in range(count)]


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _batches(images: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
