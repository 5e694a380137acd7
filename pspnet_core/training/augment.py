"""Joint augmentation of an image and its mask, as a pure function of the sample and a seed.

Two steps. :func:`plan` draws every number into a :class:`Draw`, those of switched-off changes too, so that no change
depends on whether another is on. :func:`apply` then does what the draw says, on no more pixels than the crop needs:
scale, rotation and place make one affine map from the crop to the sample. The mask is read through it by nearest
neighbour, once, so no class id is ever invented. The image is read through it by bilinear interpolation, from itself
or, where it gets smaller, from its antialiased reduction; then it is blurred and set on padding of the mean colour.

The recipe is that of PSPNet (section 5.1; hszhao/semseg, ``util/transform.py``), with the category limit and the
photometric distortion of mmsegmentation (``RandomCrop``, ``PhotoMetricDistortion``).

Shapes: ``H W`` pixels of the sample, ``h w`` pixels of the crop, as many either way. Points are ``(x, y)``; the pixel
in the corner reaches from 0 to 1, its centre is at 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pspnet_core.errors import check, check_positive

Mask = NDArray[np.uint8] | NDArray[np.uint16]
_Points = NDArray[np.float64]
_Pixels = NDArray[np.uint8]

# Crops are made side by side, each in one thread.
cv2.setNumThreads(1)

# Windows to try for one that keeps ``cat_max_ratio``, as in mmsegmentation.
_TRIES = 10

# Range of the standard deviation of the blur, in pixels, and the side of its window, which then holds all but a
# hundredth of the Gaussian; semseg's side, too.
_BLUR = (0.1, 1.0)
_BLUR_WINDOW = (5, 5)

# Ranges of the photometric distortion, as in SSD and mmsegmentation: levels, factors and degrees (their hue_delta of
# 18 counts the half degrees of 8-bit HSV). Each of the four is left out of half the distorted samples.
_BRIGHTNESS = 32.0
_CONTRAST = (0.5, 1.5)
_SATURATION = (0.5, 1.5)
_HUE = 36.0

# Colour and id of the padding where the caller names no others: ImageNet's mean, and the usual id of no label.
_MEAN = (123.675, 116.28, 103.53)
_IGNORE = 255

# The colours (17, 17, 17, 3) for which the distortion is computed; Pillow interpolates between them. Indexed blue,
# green, red, as Color3DLUT wants its table.
_GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 17)] * 3, indexing="ij")[::-1], axis=-1)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Size of a training crop, and the ranges of its random changes."""

    crop: int = 473
    """Side of the square training crop, in pixels."""
    image_scale: float = 1.0
    """Factor on the images' size, in training and in inference alike: 0.5 works at half resolution."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale in training, drawn log-uniformly."""
    rotate: float = 10.0
    """Largest rotation in training either way, in degrees; half the crops are rotated."""
    blur: float = 0.5
    """Share of blurred crops."""
    hflip: float = 0.5
    """Share of crops that are flipped left to right."""
    cat_max_ratio: float = 0.75
    """Largest share of a crop's labelled pixels that one class may have, if ten tries find such a crop."""
    photometric: float = 0.0
    """Share of crops whose brightness, contrast, saturation and hue are changed."""

    def __post_init__(self) -> None:
        check_positive(crop=self.crop, image_scale=self.image_scale)
        ordered = 0 < self.scale[0] <= self.scale[1] < math.inf
        check(ordered, "scale", self.scale, "give a positive range, smaller number first")
        check(0 <= self.rotate <= 180, "rotate", self.rotate, "choose an angle in 0..180 degrees")
        limit = self.cat_max_ratio
        check(0 < limit <= 1, "cat_max_ratio", limit, "choose a share above 0, at most 1")
        for name in ("blur", "hflip", "photometric"):
            share = getattr(self, name)
            check(0 <= share <= 1, name, share, "choose a share in 0..1")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Every number that one augmentation needs. The defaults change nothing and cut from the middle."""

    scale: float = 1.0
    """Factor on the size, beside ``image_scale``."""
    angle: float = 0.0
    """Rotation about the centre of the sample, in degrees, counter-clockwise; 0 is none."""
    places: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    """Places of the window to try, one or more: (down, across), each in [0, 1) of the room there is."""
    blur: float = 0.0
    """Standard deviation in pixels of the crop; 0 is none."""
    hflip: bool = False
    """Flip left to right."""
    brightness: float = 0.0
    """Levels to add, of 255."""
    contrast: float = 1.0
    """Factor on the levels."""
    contrast_last: bool = False
    """Whether contrast comes after saturation and hue instead of before them."""
    saturation: float = 1.0
    """Factor on the saturation of HSV."""
    hue: float = 0.0
    """Degrees to add to the hue of HSV."""

    @property
    def distorts(self) -> bool:
        """Whether any colour changes."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (0, 1, 1, 0)


def augment(
    image: NDArray[np.uint8],
    mask: Mask,
    config: AugmentConfig,
    seed: int | Sequence[int],
    *,
    mean: Sequence[float] = _MEAN,
    ignore: int = _IGNORE,
) -> tuple[NDArray[np.uint8], Mask]:
    """Make one augmented crop; the same arguments give the same crop.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        mask: ``(H, W)`` uint8 or uint16 class ids.
        seed: a non-negative integer, or several.
        mean: colour of the padding, RGB; of each value that part counts which lies in [0, 255].
        ignore: id of the padding in the mask, and of pixels without a label, 0 to 65535.

    Returns:
        Image ``(h, w, 3)`` uint8 RGB and mask ``(h, w)`` of the type that came in, or of the next wider one that
        holds ``ignore``.

    Raises:
        ValueError: when the sizes of image and mask differ.
    """
    return apply(image, mask, config, plan(config, seed), mean=mean, ignore=ignore)


def plan(config: AugmentConfig, seed: int | Sequence[int]) -> Draw:
    """Draw the numbers of one augmentation: always all of them, in the same order.

    Args:
        seed: a non-negative integer, or several.
    """
    random = np.random.default_rng(seed)

    def happens(share: float) -> bool:
        return bool(random.random() < share)

    def between(low: float, high: float, *, when: bool = True, otherwise: float = 0.0) -> float:
        value = float(random.uniform(low, high))
        return value if when else otherwise

    scale = math.exp(between(math.log(config.scale[0]), math.log(config.scale[1])))
    angle = between(-config.rotate, config.rotate, when=happens(0.5))
    places = tuple((float(down), float(across)) for down, across in random.random((_TRIES, 2)))
    blur = between(*_BLUR, when=happens(config.blur))
    hflip = happens(config.hflip)
    distorted = happens(config.photometric)
    return Draw(
        scale=scale,
        angle=angle,
        places=places,
        blur=blur,
        hflip=hflip,
        brightness=between(-_BRIGHTNESS, _BRIGHTNESS, when=happens(0.5) and distorted),
        contrast=between(*_CONTRAST, when=happens(0.5) and distorted, otherwise=1.0),
        contrast_last=happens(0.5),
        saturation=between(*_SATURATION, when=happens(0.5) and distorted, otherwise=1.0),
        hue=between(-_HUE, _HUE, when=happens(0.5) and distorted),
    )


def apply(
    image: NDArray[np.uint8],
    mask: Mask,
    config: AugmentConfig,
    draw: Draw,
    *,
    mean: Sequence[float] = _MEAN,
    ignore: int = _IGNORE,
) -> tuple[NDArray[np.uint8], Mask]:
    """Make the crop that a draw describes.

    Args:
        image, mask, mean, ignore: as for :func:`augment`.
        config: of it, ``crop``, ``image_scale`` and ``cat_max_ratio`` count.

    Returns:
        As :func:`augment`.

    Raises:
        ValueError: when the sizes of image and mask differ.
    """
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"image of shape {image.shape}, mask of shape {mask.shape}")
    ids = np.result_type(mask.dtype, np.min_scalar_type(ignore))
    # Pillow resamples 8-bit ("L") and 32-bit ("I") single channels; 16-bit ids travel in the latter.
    labels = Image.fromarray(mask if ids == np.uint8 else mask.astype(np.int32))
    view, labels = _choose(labels, config, draw, ignore)
    pixels = _cut_image(image, view, mean, draw)
    cut: Mask = np.asarray(labels).astype(ids, copy=False)
    if draw.hflip:
        return _flip(pixels), _flip(cut)
    return pixels, cut.copy()  # Pillow's memory must not be written to


def _cut_image(image: _Pixels, view: _View, mean: Sequence[float], draw: Draw) -> _Pixels:
    """Cut the window out of the image, on padding."""
    box = view.covered()
    if box.empty:
        return _padding(view, mean)
    crop = _read(image, view, box, draw)
    filled = view.fills(box)
    if filled and box.size == view.crop:
        return crop
    padded = _padding(view, mean)
    if filled:
        padded[box.pixels] = crop
    else:
        height, width, _ = image.shape
        inside = _nearest(Image.new("L", (width, height), 255), view, fill=0)
        cv2.copyTo(crop, np.asarray(inside)[box.pixels], padded[box.pixels])
    return padded


def _read(image: _Pixels, view: _View, box: _Box, draw: Draw) -> _Pixels:
    """Read the image in a box of the window; its edge goes on where the box reaches beyond it."""
    part, matrix = _part(image, view)
    # The centre of the box's first pixel, half a pixel from its start, is (0, 0) there.
    matrix[:, 2] += matrix[:, :2] @ (box.left + 0.5, box.top + 0.5) - 0.5
    pixels: NDArray[Any] = cv2.warpAffine(
        _distort(part, draw),
        matrix,
        box.size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if draw.blur:
        pixels = cv2.GaussianBlur(pixels, _BLUR_WINDOW, draw.blur, borderType=cv2.BORDER_REPLICATE)
    return pixels


def _padding(view: _View, mean: Sequence[float]) -> _Pixels:
    """Make a crop of nothing but the mean colour."""
    width, height = view.crop
    row = np.tile(np.round(np.clip(mean, 0, 255)).astype(np.uint8), (width, 1))
    return np.tile(row, (height, 1, 1))


def _flip(pixels: NDArray[Any]) -> NDArray[Any]:
    flipped: NDArray[Any] = cv2.flip(pixels, 1)
    return flipped


def _distort(part: _Pixels, draw: Draw) -> _Pixels:
    if not draw.distorts:
        return part
    table = ImageFilter.Color3DLUT(len(_GRID), distort_colors(_GRID, draw) / 255)
    return np.asarray(Image.fromarray(part).filter(table))


def distort_colors(colors: NDArray[np.floating[Any]], draw: Draw) -> NDArray[np.float64]:
    """The photometric distortion of SSD (Liu et al., 2016), as mmsegmentation has it, without rounding between.

    Brightness, contrast, saturation and hue, with contrast drawn to come second or last.

    Args:
        colors: ``(..., 3)`` RGB in [0, 255].

    Returns:
        ``(..., 3)`` RGB in [0, 255].
    """
    first, last = (1.0, draw.contrast) if draw.contrast_last else (draw.contrast, 1.0)
    changed = np.clip(colors + draw.brightness, 0, 255)
    changed = _change_hsv(np.clip(changed * first, 0, 255), draw.saturation, draw.hue)
    return np.clip(changed * last, 0, 255)


def _change_hsv(colors: NDArray[np.float64], saturation: float, hue: float) -> NDArray[np.float64]:
    """Multiply the saturation and turn the hue of HSV (Smith, "Color gamut transform pairs", 1978)."""
    red, green, blue = np.moveaxis(colors, -1, 0)
    value = colors.max(-1)
    chroma = value - colors.min(-1)
    # Grey has no hue; any will do, as its chroma is 0.
    divisor = np.where(chroma > 0, chroma, 1.0)
    sextant = np.where(value == blue, 4 + (red - green) / divisor, 0.0)
    sextant = np.where(value == green, 2 + (blue - red) / divisor, sextant)
    sextant = np.where(value == red, (green - blue) / divisor, sextant)
    chroma = np.minimum(chroma * saturation, value)
    # How far red, green and blue fall below the value: not at all for a third of the circle, wholly for another.
    turned = (sextant[..., None] + hue / 60 + np.array([5.0, 3.0, 1.0])) % 6
    changed: NDArray[np.float64] = value[..., None] - chroma[..., None] * np.clip(np.minimum(turned, 4 - turned), 0, 1)
    return changed


class _Box(NamedTuple):
    """Pixels of a crop: the first ones, and those after the last."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return min(self.size) < 1

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Index into an array of the crop."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True, kw_only=True)
class _View:
    """How a crop lies on the scaled sample, which is turned about its centre first. Sizes are (width, height)."""

    crop: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    angle: float

    def affine(self) -> _Points:
        """Matrix ``(2, 3)`` that takes points of the crop to points of the scaled sample."""
        turn = math.radians(self.angle)
        linear = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        centre = np.array(self.scaled) / 2
        return np.column_stack([linear, centre + linear @ (np.array(self.corner) - centre)])

    def onto(self, size: tuple[int, int]) -> _Points:
        """The same matrix to points of the sample itself, which has this size."""
        return self.affine() * (np.array(size) / self.scaled)[:, None]

    def box(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last ``(x, y)``, not included, of the scaled pixels that the crop needs; one pixel or more."""
        affine = self.affine()
        corners = affine[:, :2] @ _corners((0, 0), self.crop) + affine[:, 2:]
        # One pixel more all round, for the neighbours that a bilinear rotation reads.
        low = np.clip(np.floor(corners.min(1)).astype(int) - 1, 0, np.array(self.scaled) - 1)
        high = np.clip(np.ceil(corners.max(1)).astype(int) + 1, low + 1, self.scaled)
        return low, high

    def covered(self) -> _Box:
        """The crop's pixels that may lie on the sample: without rotation all of them do, and none of the others."""
        affine = self.affine()
        corners = _corners((0, 0), self.scaled) - affine[:, 2:]
        corners = affine[:, :2].T @ corners  # a rotation's inverse is its transpose
        # A pixel counts by its centre, half a pixel from its start.
        low = np.clip(np.ceil(corners.min(1) - 0.5), 0, self.crop).astype(int)
        high = np.clip(np.ceil(corners.max(1) - 0.5), 0, self.crop).astype(int)
        return _Box(*low.tolist(), *high.tolist())

    def fills(self, box: _Box) -> bool:
        """Whether the sample lies under the centre of each pixel of a box of the crop."""
        affine = self.affine()
        corners = _corners((box.left + 0.5, box.top + 0.5), (box.right - 0.5, box.bottom - 0.5))
        centres = affine[:, :2] @ corners + affine[:, 2:]
        return bool((centres >= 0).all() and (centres < np.array(self.scaled)[:, None]).all())


def _corners(low: tuple[float, float], high: tuple[float, float]) -> _Points:
    """The corners ``(2, 4)`` of the rectangle between two points."""
    (left, top), (right, bottom) = low, high
    return np.array([[left, right, left, right], [top, top, bottom, bottom]])


def _choose(labels: Image.Image, config: AugmentConfig, draw: Draw, ignore: int) -> tuple[_View, Image.Image]:
    """Choose the first window that keeps ``cat_max_ratio``, else the last; return it with the mask there."""
    side = config.crop
    factor = config.image_scale * draw.scale
    scaled = max(1, round(labels.width * factor)), max(1, round(labels.height * factor))
    places = draw.places if config.cat_max_ratio < 1 else draw.places[:1]
    corners = [(_offset(scaled[0] - side, across), _offset(scaled[1] - side, down)) for down, across in places]
    views = [_View(crop=(side, side), scaled=scaled, corner=corner, angle=draw.angle) for corner in corners]
    # Without room to move all of them are the same, which is looked at once.
    *tries, last = dict.fromkeys(views)
    for view in tries:
        cut = _nearest(labels, view, fill=ignore)
        if _keeps_cat_max_ratio(cut, config.cat_max_ratio, ignore):
            return view, cut
    return last, _nearest(labels, last, fill=ignore)


def _offset(slack: int, place: float) -> int:
    """Start of the window when the sample is ``slack`` pixels longer; negative to centre a shorter one."""
    return int(place * (slack + 1)) if slack >= 0 else slack // 2


def _nearest(labels: Image.Image, view: _View, *, fill: int) -> Image.Image:
    """Read one channel in the window from the sample itself by nearest neighbour."""
    matrix = view.onto(labels.size).ravel().tolist()
    return labels.transform(view.crop, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


def _keeps_cat_max_ratio(labels: Image.Image, limit: float, ignore: int) -> bool:
    """Whether there are labelled pixels, and no class has more than its share of them."""
    if labels.mode == "L":
        counts = np.array(labels.histogram())
    else:
        counts = np.bincount(np.asarray(labels).ravel(), minlength=ignore + 1)
    counts[ignore] = 0
    return bool(0 < counts.max() <= limit * counts.sum())


def _part(image: _Pixels, view: _View) -> tuple[_Pixels, _Points]:
    """Cut the pixels that the crop needs out of the image or its reduction; with the matrix from the crop to them."""
    height, width, _ = image.shape
    if view.scaled[0] >= width and view.scaled[1] >= height:
        part, start = _source_part(image, view)
        matrix = view.onto((width, height))
    else:
        part, start = _reduced_part(image, view)
        matrix = view.affine()
    matrix[:, 2] -= start
    return part, matrix


def _reduced_part(image: _Pixels, view: _View) -> tuple[_Pixels, NDArray[np.int64]]:
    """The pixels of the scaled image that the crop needs, and the first of them, ``(x, y)``.

    They are those of the whole image resized (bilinear, antialiased): Pillow's filter sees the neighbours outside the
    box, so the slice that is handed to it holds them.
    """
    low, high = view.box()
    ratio = np.array(image.shape[1::-1]) / view.scaled
    source, start = _source_part(image, view)
    left, top = low * ratio - start
    right, bottom = np.minimum(high * ratio - start, source.shape[1::-1])
    width, height = (high - low).tolist()
    box = (left, top, right, bottom)
    return np.asarray(Image.fromarray(source).resize((width, height), Image.Resampling.BILINEAR, box=box)), low


def _source_part(image: _Pixels, view: _View) -> tuple[_Pixels, NDArray[np.int64]]:
    """The pixels of the image itself that the crop needs, with their neighbours, and the first of them, ``(x, y)``."""
    low, high = view.box()
    size = np.array(image.shape[1::-1])
    ratio = size / view.scaled
    reach = np.ceil(np.maximum(ratio, 1)).astype(int)
    start = np.maximum(np.floor(low * ratio).astype(int) - reach, 0)
    stop = np.minimum(np.ceil(high * ratio).astype(int) + reach, size)
    return image[start[1] : stop[1], start[0] : stop[0]], start
