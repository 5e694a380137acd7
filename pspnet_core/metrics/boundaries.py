"""The boundary regions of a class map, for boundary IoU.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021. The numbers are those
of the authors' own code (``mask_to_boundary`` of boundary-iou-api): a class's boundary region is its mask minus the
mask eroded ``d`` times by a 3x3 square, where nothing beyond the image belongs to the mask.

Shapes: ``H W`` pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pspnet_core.images.masks import Ids

DILATION = 0.02
"""Width of the boundary region in image diagonals; the paper's choice for images of ordinary size."""


def boundary_width(height: int, width: int) -> int:
    """Return ``d``, the width of the boundary region in pixels: 2 % of the diagonal, at least 1."""
    return max(1, round(DILATION * math.sqrt(height**2 + width**2)))


def boundary_region(labels: Ids, width: int) -> NDArray[np.bool_]:
    """Tell which pixels lie in the boundary region of their own class, for all classes at once.

    ``d`` erosions by a 3x3 square keep the pixels whose square of side 2d + 1 holds only their own class. So a pixel
    is in its boundary region exactly when the largest and the smallest id of that square differ, or the square
    reaches beyond the image. The time does not depend on the number of classes, and on ``width`` by its logarithm.

    Args:
        labels: (H, W) of any integer type.
        width: d, at least 1 pixel.

    Returns:
        (H, W) bool.
    """
    region = np.ones(labels.shape, np.bool_)
    if min(labels.shape) > 2 * width:
        side = 2 * width + 1
        mixed = _over_squares(np.maximum, labels, side) != _over_squares(np.minimum, labels, side)
        region[width:-width, width:-width] = mixed
    return region


def _over_squares(pick: np.ufunc, values: Ids, side: int) -> Ids:
    """Maximum or minimum over each ``side x side`` square inside ``values``: (H - side + 1, W - side + 1)."""
    for _ in range(2):  # down the rows, then, transposed, along them; the second turn turns it back
        reach = 1
        while reach < side:
            step = min(reach, side - reach)
            values = pick(values[:-step], values[step:])
            reach += step
        values = values.T
    return values
