"""Pictures for people: masks laid over images, and contact sheets with a legend.

Shapes: ``H W`` pixels. Images are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pspnet_core.images.classes import ClassTable, Color
from pspnet_core.images.masks import Ids

_GAP = 8
_SWATCH = 14
_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)

Row = tuple[NDArray[np.uint8], Ids] | tuple[NDArray[np.uint8], Ids, Ids]
"""An (H, W, 3) uint8 RGB image and one or two (H, W) masks of it, such as target and prediction."""


def overlay(image: NDArray[np.uint8], mask: Ids, colors: Sequence[Color], alpha: float = 0.5) -> NDArray[np.uint8]:
    """Blend the colour of each pixel's class into the image.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) class ids of any integer type; pixels of an id without a colour, such as the
            ignore id, stay as they are in the image.
        colors: RGB of each class.
        alpha: the share of the class colour, 0 to 1.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: when the sizes differ or alpha is out of range.
    """
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"image of shape {image.shape}, mask of shape {mask.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: it must be from 0 to 1")
    known = (mask >= 0) & (mask < len(colors))
    table = np.asarray(colors, np.float32).reshape(-1, 3)
    paint = table[np.where(known, mask, 0)]
    share = np.where(known, np.float32(alpha), np.float32(0))[:, :, None]
    # Half is added to round, as the cast cuts off.
    blend: NDArray[np.float32] = image + share * (paint - image) + np.float32(0.5)
    return blend.astype(np.uint8)


def contact_sheet(
    rows: Sequence[Row],
    classes: ClassTable,
    *,
    columns: int = 2,
    tile_width: int = 320,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Lay out images beside the overlays of their masks, with a legend of the classes that occur.

    Args:
        rows: images with their masks, of any sizes; one or more, each with as many masks as the others.
        classes: names and colours.
        columns: rows side by side.
        tile_width: width of one picture, in pixels; its height follows.
        captions: a line above each row, or none at all.

    Returns:
        an RGB picture.

    Raises:
        ValueError: when there are no rows, no room for a tile, rows of unlike lengths, or not as many captions as rows.
    """
    if not rows or columns < 1 or tile_width < 1:
        raise ValueError(f"{len(rows)} rows in {columns} columns of {tile_width} pixels: nothing to show")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows of {sorted({len(row) for row in rows})} pictures: give each as many masks")
    above: Sequence[str | None] = captions or [None] * len(rows)
    strips = [
        _strip(image, masks, classes, tile_width, caption) for (image, *masks), caption in zip(rows, above, strict=True)
    ]
    lines = [strips[start : start + columns] for start in range(0, len(strips), columns)]
    heights = [max(strip.height for strip in line) for line in lines]
    width = columns * (strips[0].width + _GAP) + _GAP
    ids = {int(value) for _, *masks in rows for mask in masks for value in np.unique(mask)}
    legend = _legend(classes, sorted(ids & set(range(len(classes)))), width)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(lines) + 1) + legend.height), _BACKGROUND)
    top = _GAP
    for line, height in zip(lines, heights, strict=True):
        for column, strip in enumerate(line):
            sheet.paste(strip, (_GAP + column * (strip.width + _GAP), top))
        top += height + _GAP
    sheet.paste(legend, (0, top))
    return sheet


def _strip(
    image: NDArray[np.uint8], masks: Sequence[Ids], classes: ClassTable, width: int, caption: str | None
) -> Image.Image:
    """Return an image and its overlays side by side, each ``width`` wide, below a line of text if there is one."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    pictures = [image, *(overlay(image, mask, classes.colors) for mask in masks)]
    top = 0 if caption is None else _SWATCH + _GAP // 2
    strip = Image.new("RGB", (len(pictures) * width, top + height), _BACKGROUND)
    if caption is not None:
        ImageDraw.Draw(strip).text((0, -1), caption, fill=_INK, font=ImageFont.load_default(_SWATCH))
    for place, pixels in enumerate(pictures):
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        strip.paste(tile, (place * width, top))
    return strip


def _legend(classes: ClassTable, present: Sequence[int], width: int) -> Image.Image:
    """Return a strip of swatches and names, in as many lines as they need."""
    font = ImageFont.load_default(_SWATCH)
    places: list[tuple[int, int]] = []
    x, line = _GAP, 0
    for index in present:
        needed = _SWATCH + _GAP // 2 + int(font.getlength(classes.names[index])) + 2 * _GAP
        if x > _GAP and x + needed > width:
            x, line = _GAP, line + 1
        places.append((x, line))
        x += needed
    step = _SWATCH + _GAP
    strip = Image.new("RGB", (width, (line + 1) * step + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for index, (left, row) in zip(present, places, strict=True):
        top = row * step
        box = (left, top, left + _SWATCH, top + _SWATCH)
        draw.rectangle(box, fill=classes.colors[index], outline=_INK)
        draw.text((left + _SWATCH + _GAP // 2, top - 1), classes.names[index], fill=_INK, font=font)
    return strip
