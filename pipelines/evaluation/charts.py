"""Pictures of a score, as the bytes of PNG files: confusion matrix, IoU of each class, and examples to look at.

The same input gives the same bytes. Figures are made without pyplot, which would keep them. Shapes: ``C`` classes,
``N`` of them shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.scoring import Compared
from pspnet_core.images.classes import ClassTable
from pspnet_core.images.overlays import contact_sheet
from pspnet_core.metrics.confusion import ConfusionMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 150
"""Most classes in one picture; of more, those that are confused most."""

NUMBERED = 40
"""Up to this many classes there is room for a number in each cell of the confusion matrix."""

DPI = 100
_LABEL = 7  # points of a class name
_LONGEST = 24  # characters of a class name
_LEAST = 2.8  # inches of the smallest side of a plot
_CAPTION = 60  # characters of a key


def confusion_picture(confusion: ConfusionMatrix, classes: ClassTable) -> bytes:
    """Draw a confusion matrix, each row as shares of its target class; rows of classes without a target pixel are grey.

    Cells hold the share in % where there is room for it. Of more than ``MOST`` classes those are shown that have the
    most wrong pixels; the shares stay those of all classes.

    Returns:
        a PNG file.
    """
    shown = _confused_most(confusion)
    shares = _row_shares(confusion.counts)[np.ix_(shown, shown)]
    names = [_short(classes.names[index]) for index in shown]
    side = max(_LEAST, len(shown) * (0.36 if len(shown) <= NUMBERED else 0.14))
    figure, axes = _plot(side, side)
    axes.set_facecolor("#d9d9d9")  # seen where a share is not a number
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    places = range(len(shown))
    axes.set_xticks(places, names, rotation=90, fontsize=_LABEL, parse_math=False)
    axes.set_yticks(places, names, fontsize=_LABEL, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("target")
    axes.set_title(_title("share of each target class, in %", len(shown), confusion.classes), fontsize=9)
    if len(shown) <= NUMBERED:
        for row, column in np.argwhere(shares >= 0.005).tolist():
            share = shares[row, column]
            ink = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=_LABEL, color=ink)
    scale = axes.inset_axes((1 + 0.15 / side, 0, 0.15 / side, 1))
    figure.colorbar(picture, cax=scale, ticks=[0, 0.5, 1], format=lambda value, _: f"{100 * value:.0f}")
    return _png(figure)


def iou_picture(confusion: ConfusionMatrix, classes: ClassTable) -> bytes:
    """Draw the IoU of each class as a bar in the class's colour, the best at the top.

    Classes that neither targets nor predictions hold come last, without a bar. Of more than ``MOST`` classes those are
    shown that have the most wrong pixels.

    Returns:
        a PNG file.
    """
    iou = confusion.iou()
    shown = sorted(_confused_most(confusion).tolist(), key=lambda index: -np.nan_to_num(iou[index], nan=-1))
    names = [_short(classes.names[index]) for index in shown]
    figure, axes = _plot(4.0, max(_LEAST, 0.18 * len(shown)))
    places = range(len(shown))
    colors = [tuple(channel / 255 for channel in classes.colors[index]) for index in shown]
    axes.barh(places, np.nan_to_num(iou[shown]), color=colors, edgecolor="0.3", linewidth=0.5)
    for place, index in enumerate(shown):
        text = "absent" if np.isnan(iou[index]) else f"{iou[index]:.3f}"
        axes.text(np.nan_to_num(iou[index]) + 0.01, place, text, va="center", fontsize=_LABEL)
    axes.set_yticks(places, names, fontsize=_LABEL, parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("IoU")
    axes.set_title(_title(f"mIoU {confusion.miou:.4f}", len(shown), confusion.classes), fontsize=9)
    return _png(figure)


def validation_sheet(examples: Sequence[Compared], classes: ClassTable, *, tile_width: int = 320) -> bytes:
    """Draw some images, each beside the overlays of its target and of what the model says.

    Args:
        examples: one or more, such as ``scoring.compare`` of ``scoring.spread`` gives.
        tile_width: width of one picture, in pixels.

    Returns:
        a PNG file.

    Raises:
        ValueError: when there are no examples.
    """
    sheet = contact_sheet(
        [(found.image, found.target, found.mask) for found in examples],
        classes,
        columns=1,
        tile_width=tile_width,
        captions=[_caption(found, classes) for found in examples],
    )
    content = BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _caption(found: Compared, classes: ClassTable) -> str:
    counts = ConfusionMatrix(len(classes))
    counts.update(found.mask, found.target, ignore=classes.ignore)
    key = found.pair.key
    return f"{key if len(key) <= _CAPTION else '...' + key[-_CAPTION:]}: image, target, model (mIoU {counts.miou:.3f})"


def _confused_most(confusion: ConfusionMatrix) -> NDArray[np.intp]:
    """The ids of the classes to show, ascending: ``(N,)``."""
    counts = confusion.counts
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    return np.sort(np.argsort(-wrong, kind="stable")[:MOST])


def _row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """``(C, C)`` shares of each row's sum, 0 to 1; NaN in rows of zeros."""
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, sums, out=shares, where=sums > 0)
    return shares


def _title(text: str, shown: int, all_classes: int) -> str:
    return text if shown == all_classes else f"{text} ({shown} of {all_classes} classes)"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _plot(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a plot of so many inches, rounded to whole pixels; what stands around it comes on top."""
    # Here and not above: training's workers import this file, and most of them never draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(round(width * DPI) / DPI, round(height * DPI) / DPI), dpi=DPI)
    return figure, figure.add_axes((0, 0, 1, 1))


def _png(figure: Figure) -> bytes:
    content = BytesIO()
    # Without the version of matplotlib, which it would write into the file.
    figure.savefig(content, format="png", bbox_inches="tight", metadata={"Software": None})
    return content.getvalue()
