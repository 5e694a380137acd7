"""Pictures decode, grow with the classes as they should, show the numbers' colours, and repeat byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets.dataset import Pair
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.evaluation.charts import DPI, MOST, confusion_picture, iou_picture, validation_sheet
from pipelines.evaluation.scoring import Compared
from pspnet_core.images.classes import ClassTable
from pspnet_core.metrics.confusion import ConfusionMatrix

Picture = Callable[[ConfusionMatrix, ClassTable], bytes]


def table(classes: int) -> ClassTable:
    """Classes with names of 7 letters, whatever their number."""
    return ClassTable.from_json({"names": [f"cls{index:04d}" for index in range(classes)]})


def random_counts(classes: int) -> ConfusionMatrix:
    counts = np.random.default_rng(classes).integers(0, 50, (classes, classes))
    return ConfusionMatrix(classes, counts + 900 * np.eye(classes, dtype=np.int64))


def decoded(content: bytes) -> NDArray[np.uint8]:
    assert content.startswith(b"\x89PNG")
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("picture", [confusion_picture, iou_picture])
@pytest.mark.parametrize("classes", [2, 41])
def test_the_same_input_gives_the_same_picture(picture: Picture, classes: int) -> None:
    first, second = (picture(random_counts(classes), table(classes)) for _ in range(2))
    assert first == second
    assert decoded(first).std() > 0


@pytest.mark.parametrize(("classes", "side"), [(2, 2.8), (7, 2.8), (11, 11 * 0.36), (41, 41 * 0.14)])
def test_each_class_of_a_confusion_matrix_has_room(classes: int, side: float) -> None:
    left, top, width, height = frame(decoded(confusion_picture(random_counts(classes), table(classes))), side)
    assert abs(width - DPI * side) <= 2 and abs(height - DPI * side) <= 2
    assert left > 50 and top > 20, "room for names and the title"


def frame(pixels: NDArray[np.uint8], side: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of the plot, by the black lines around it."""
    black = pixels.max(axis=2) < 100
    columns = np.flatnonzero(black.sum(axis=0) > 0.95 * side * DPI)
    rows = np.flatnonzero(black.sum(axis=1) > 0.95 * side * DPI)
    right = columns[columns > columns[0] + 5][0]
    return int(columns[0]), int(rows[0]), int(right - columns[0]), int(rows[-1] - rows[0])


def cells(content: bytes, classes: int, cell: float = 0.36) -> NDArray[np.uint8]:
    """The colour of each cell, where no number stands: (C, C, 3)."""
    pixels = decoded(content)
    left, top, width, height = frame(pixels, max(cell * classes, 2.8))
    inside = np.arange(classes) + (0.15 if cell > 0.14 else 0.5)
    rows, columns = top + inside * height / classes, left + inside * width / classes
    found: NDArray[np.uint8] = pixels[np.ix_(rows.astype(int), columns.astype(int))]
    return found


def test_cells_are_darker_where_more_of_the_target_went() -> None:
    counts = np.array([[10, 90, 0, 0], [0, 50, 50, 0], [0, 0, 0, 0], [0, 0, 0, 10**9]])
    colours = cells(confusion_picture(ConfusionMatrix(4, counts), table(4)), 4).astype(int).sum(axis=2)
    row, half = colours[0], colours[1]
    assert row[1] < row[0] < row[2] == row[3] > 740, "0.9 is darker than 0.1, and 0 is white"
    assert half[1] == half[2]
    assert colours[3, 3] < row[1], "rows are shares: their own sum does not matter"
    grey = cells(confusion_picture(ConfusionMatrix(4, counts), table(4)), 4)[2]
    assert {tuple(color) for color in grey.tolist()} == {(217, 217, 217)}, "no target pixel"


def test_of_too_many_classes_the_confused_ones_are_shown() -> None:
    classes = MOST + 50
    counts = np.diag(np.full(classes, 1000))
    counts[np.arange(51, classes), np.arange(50, classes - 1)] = 1000  # half of 51 goes to 50, and so on to the last
    colours = cells(confusion_picture(ConfusionMatrix(classes, counts), table(classes)), MOST, 0.14)
    steps = np.arange(MOST - 1)
    assert {tuple(color) for color in colours[steps + 1, steps].tolist()} == {tuple(colours[1, 1].tolist())}
    assert (colours[steps, steps + 1] > 240).all()


def test_bars_are_as_long_as_the_iou() -> None:
    counts = np.array([[80, 20, 0], [0, 50, 0], [0, 0, 0]])
    confusion = ConfusionMatrix(3, counts)
    colors = ((200, 0, 0), (0, 150, 0), (0, 0, 250))
    classes = ClassTable(names=("one", "two", "three"), colors=colors)
    pixels = decoded(iou_picture(confusion, classes))
    widths = [int((pixels == color).all(axis=2).sum(axis=1).max()) for color in colors]
    full = 4.0 * DPI / 1.08
    np.testing.assert_allclose(widths, [full * 0.8, full * 50 / 70, 0], atol=4)
    tops = [np.flatnonzero((pixels == color).all(axis=2).any(axis=1)).min() for color in colors[:2]]
    assert tops[0] < tops[1], "the best at the top"


@pytest.mark.parametrize("picture", [confusion_picture, iou_picture])
def test_nothing_counted_and_odd_names_are_drawn(picture: Picture) -> None:
    names = ("a $x_{$ b", "<&>", "a name that is much longer than there is room for", "d")
    classes = ClassTable.from_json({"names": list(names)})
    assert decoded(picture(ConfusionMatrix(4), classes)).std() > 0


def test_no_figure_is_kept() -> None:
    import matplotlib.pyplot

    confusion_picture(random_counts(3), table(3))
    assert matplotlib.pyplot.get_fignums() == []


def example(seed: int, *, key: str) -> Compared:
    image, target = draw_scene(seed)
    return Compared(Pair(key=key, image="", mask=""), image, target, np.roll(target, 5, axis=1))


def test_a_validation_sheet_shows_image_target_and_prediction() -> None:
    examples = [example(seed, key=f"{'folder/' * 20}{seed}") for seed in range(2)]
    content = validation_sheet(examples, SCENE_CLASSES, tile_width=160)
    assert content == validation_sheet(examples, SCENE_CLASSES, tile_width=160)
    pixels = decoded(content)
    assert pixels.shape[1] == 3 * 160 + 2 * 8
    assert pixels.shape[0] > 2 * 120
    caption = 18  # above each row; the pictures have their own size here, so that nothing is resized
    image, target, prediction = np.split(pixels[8 + caption : 128 + caption, 8:488], 3, axis=1)
    np.testing.assert_array_equal(image, examples[0].image)
    assert not np.array_equal(target, image)
    assert not np.array_equal(target, prediction)
