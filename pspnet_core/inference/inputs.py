"""Network inputs of an image: resized by the rule of the settings, once per scale.

Shapes: ``H W`` pixels of the image, ``h w`` of an input, ``N`` bands (3 for RGB).
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images.decoding import MAX_PIXELS, ImageFile, decode_image, decode_views, picture_to_array

ImageLike = NDArray[np.uint8] | bytes | str | os.PathLike[str] | Image.Image
"""An image as users have it: ``(H, W, N)`` uint8, an encoded file, its path, or a PIL picture."""

Sizes = tuple[tuple[int, ...], ...]
"""Shapes of an image's inputs. All of them count: rounding may give two images one size at one scale and different ones
at another."""


SMALL_INPUT = 2**24
"""Pixels of an input that any image may have, however small it is."""
MOST_ENLARGED = 16
"""Times the pixels of a larger image that its input may have; a side of few pixels could ask for any number."""


class Prepared(NamedTuple):
    """An image ready for the network: its own size, and one ``(h, w, N)`` uint8 input per scale."""

    height: int
    width: int
    views: tuple[NDArray[np.uint8], ...]

    @property
    def sizes(self) -> Sizes:
        """Shape of each input; images of the same ones can share a forward pass."""
        return tuple(view.shape for view in self.views)

    @property
    def nbytes(self) -> int:
        """Most bytes held for the image: its inputs, then a prediction of 5 bytes per pixel."""
        return max(sum(view.nbytes for view in self.views), 5 * self.height * self.width)


def prepare(image: NDArray[np.uint8], settings: InferenceSettings) -> Prepared:
    """Resize an ``(H, W, N)`` uint8 image to each input, bilinearly and antialiased.

    Raises:
        ImageError: ``TooLarge``, for an image whose shape asks for an input of many more pixels than it has.
    """
    height, width, _ = image.shape
    return Prepared(height, width, tuple(_resize(image, size) for size in _input_sizes(height, width, settings)))


def decode(file: bytes | ImageFile, settings: InferenceSettings, *, max_pixels: int = MAX_PIXELS) -> Prepared:
    """Decode an image file to its inputs.

    Args:
        file, max_pixels: as for ``decode_image``.

    Raises:
        ImageError: as ``decode_image`` and ``prepare``.
    """
    if not settings.reduced:
        return prepare(decode_image(file, max_pixels=max_pixels), settings)
    sizes = functools.partial(_input_sizes, settings=settings)
    return Prepared(*decode_views(file, sizes, max_pixels=max_pixels))


def prepare_any(image: ImageLike, settings: InferenceSettings, *, bands: int) -> Prepared:
    """Make the inputs of an image, whatever it comes as.

    Raises:
        ConfigError: for an array or picture that is not ``(H, W, bands)`` uint8.
        ImageError: as ``decode_image``.
        OSError: for a path that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        prepared = decode(image, settings)
        _check(prepared.views[0], bands)
        return prepared
    pixels = picture_to_array(image) if isinstance(image, Image.Image) else image
    _check(pixels, bands)
    return prepare(pixels, settings)


def _input_sizes(height: int, width: int, settings: InferenceSettings) -> Sequence[tuple[int, int]]:
    sizes = settings.input_sizes(height, width)
    most = max(SMALL_INPUT, MOST_ENLARGED * height * width)
    for high, wide in sizes:
        if high * wide > most:
            raise ImageError("TooLarge", f"{width} x {height} pixels would be an input of {wide} x {high}")
    return sizes


def _check(pixels: NDArray[np.uint8], bands: int) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != bands or pixels.dtype != np.uint8 or not pixels.size:
        raise ConfigError("image", f"{pixels.shape} of {pixels.dtype}", f"give (H, W, {bands}) of uint8 each")


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    # Pillow knows pictures of three bands and of one.
    pictures: Sequence[NDArray[np.uint8]] = [image] if image.shape[2] == 3 else list(np.moveaxis(image, 2, 0))
    resized = [Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR) for picture in pictures]
    return np.dstack([np.asarray(picture) for picture in resized])
