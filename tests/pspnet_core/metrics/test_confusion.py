"""Confusion matrix and boundary counts against counting by hand, scikit-learn and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pspnet_core.metrics.confusion import BoundaryCounts, ConfusionMatrix, Scores

IGNORE = 255
Masks = tuple[NDArray[np.int64], NDArray[np.int64]]


def _pair(seed: int, classes: int, dtype: type = np.int64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    prediction, target = random.integers(0, classes, (2, 7, 11))
    target[random.random(target.shape) < 0.2] = IGNORE
    return prediction.astype(dtype), target.astype(dtype)


def _matrix(*pairs: tuple[NDArray[np.int64], NDArray[np.int64]], classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for prediction, target in pairs:
        matrix.update(prediction, target, IGNORE)
    return matrix


@given(st.integers(0, 2**32), st.integers(2, 9), st.sampled_from([np.uint8, np.int16, np.int32, np.int64]))
def test_counts_are_those_of_counting_one_by_one(seed: int, classes: int, dtype: type) -> None:
    prediction, target = _pair(seed, classes, dtype)
    prediction[target == IGNORE] = 200  # does not matter
    expected = np.zeros((classes, classes), np.int64)
    for guess, truth in zip(prediction.ravel(), target.ravel(), strict=True):
        if truth != IGNORE:
            expected[truth, guess] += 1
    matrix = _matrix((prediction, target), classes=classes)
    assert matrix.counts.dtype == np.int64
    np.testing.assert_array_equal(matrix.counts, expected)


def test_adding_leaves_the_parts_alone() -> None:
    one, other = _matrix(_pair(0, 3), classes=3), _matrix(_pair(1, 3), classes=3)
    before = one.counts.copy()
    total = one + other
    total.counts += 1
    np.testing.assert_array_equal(one.counts, before)


def test_absent_classes_do_not_count() -> None:
    matrix = ConfusionMatrix(4, np.array([[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert np.isnan([matrix.iou()[2:], matrix.dice()[2:], matrix.accuracy()[2:]]).all()
    assert matrix.miou == matrix.mdice == matrix.macc == matrix.aacc == 1


def test_a_class_only_predicted_counts_for_iou_and_not_for_accuracy() -> None:
    matrix = ConfusionMatrix(2, np.array([[1, 1], [0, 0]]))
    np.testing.assert_allclose(matrix.iou(), [0.5, 0])
    assert math.isnan(matrix.accuracy()[1])
    assert matrix.macc == 0.5


def test_nothing_counted_is_nan_without_a_warning() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8), IGNORE)
    assert np.isnan([matrix.miou, matrix.mdice, matrix.macc, matrix.aacc]).all()
    assert matrix.counts.sum() == 0


@pytest.mark.parametrize(
    ("prediction", "target", "part"),
    [
        ([3], [0], "prediction holds class id 3"),
        ([-1], [0], "prediction holds class id -1"),
        ([0], [3], "target holds class id 3"),
        ([0], [-1], "target holds class id -1"),
        ([0, 0], [0], "prediction of shape"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_leaves_the_counts_alone(
    prediction: list[int], target: list[int], part: str
) -> None:
    scores = Scores.empty(3)
    for counts in (scores, scores.confusion, scores.boundary):
        with pytest.raises(ValueError, match=part):
            counts.update(np.array([prediction]), np.array([target]), IGNORE)
    with pytest.raises(ValueError, match="one image"):
        scores.update(np.zeros(4, np.uint8), np.zeros(4, np.uint8), IGNORE)
    assert scores.confusion.counts.sum() == scores.boundary.counts.sum() == 0


def test_counts_of_any_memory_order_can_be_counted_on() -> None:
    counts = np.arange(9).reshape(3, 3)
    matrix = ConfusionMatrix(3, np.asfortranarray(counts))
    matrix.update(np.array([2]), np.array([0]), IGNORE)
    counts[0, 2] += 1
    np.testing.assert_array_equal(matrix.counts, counts)


def _large_pair(seed: int, classes: int) -> Masks:
    """Prediction and target (60, 90), right at about half of the pixels, with every class in both."""
    random = np.random.default_rng(seed)
    target = random.integers(0, classes, (60, 90))
    prediction = np.where(random.random(target.shape) < 0.5, target, random.integers(0, classes, target.shape))
    target[random.random(target.shape) < 0.2] = IGNORE
    return prediction, target


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (5, 1), (19, 2), (150, 3)])
def test_metrics_are_those_of_scikit_learn(classes: int, seed: int) -> None:
    prediction, target = _large_pair(seed, classes)
    matrix = _matrix((prediction, target), classes=classes)
    counted = target != IGNORE
    truth, guess, labels = target[counted], prediction[counted], range(classes)
    expected = sklearn.metrics.confusion_matrix(truth, guess, labels=labels)
    np.testing.assert_array_equal(matrix.counts, expected)
    for ours, mean, theirs in (
        (matrix.iou(), matrix.miou, sklearn.metrics.jaccard_score),
        (matrix.accuracy(), matrix.macc, sklearn.metrics.recall_score),
        (matrix.dice(), matrix.mdice, sklearn.metrics.f1_score),
    ):
        np.testing.assert_allclose(ours, theirs(truth, guess, labels=labels, average=None), rtol=1e-12)
        assert mean == pytest.approx(theirs(truth, guess, labels=labels, average="macro"), rel=1e-12)
    assert matrix.aacc == pytest.approx(sklearn.metrics.accuracy_score(truth, guess), rel=1e-12)


def _blocks(seed: int, classes: int, height: int, width: int) -> Masks:
    """Prediction and target of rectangles, alike in part, with an ignored area."""
    random = np.random.default_rng(seed)
    target = np.zeros((height, width), np.int64)
    for label in random.integers(0, classes, 8):
        top, left = random.integers(0, height), random.integers(0, width)
        target[top : top + random.integers(1, height + 1), left : left + random.integers(1, width + 1)] = label
    prediction = np.roll(target, random.integers(-3, 4, 2), (0, 1))
    prediction[: random.integers(0, height), : random.integers(0, width)] = random.integers(0, classes)
    target[random.integers(0, height) :, : random.integers(0, width)] = IGNORE
    return prediction, target


def _reference_boundary_counts(
    prediction: NDArray[np.int64], target: NDArray[np.int64], classes: int
) -> list[list[int]]:
    """Class by class, as the paper's code does it: pad by a zero, erode by 3x3 ``d`` times, cut, subtract."""
    height, width = target.shape
    dilation = max(1, round(0.02 * float(np.sqrt(height**2 + width**2))))

    def boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        eroded = ndimage.binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=dilation, border_value=1)
        kept: NDArray[np.bool_] = mask & ~eroded[1:-1, 1:-1]
        return kept

    counts: list[list[int]] = [[], []]
    for label in range(classes):
        one = boundary((prediction == label) & (target != IGNORE))
        other = boundary(target == label)
        counts[0].append(int((one & other).sum()))
        counts[1].append(int((one | other).sum()))
    return counts


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 140), st.integers(1, 140))
def test_boundary_counts_are_those_of_eroding_class_by_class(seed: int, classes: int, height: int, width: int) -> None:
    prediction, target = _blocks(seed, classes, height, width)
    expected = _reference_boundary_counts(prediction, target, classes)
    for under_ignored in (prediction, 200):
        counts = BoundaryCounts(classes)
        guess = np.where(target == IGNORE, under_ignored, prediction)
        counts.update(guess.astype(np.uint8), target.astype(np.uint8), IGNORE)
        assert counts.counts.tolist() == expected


def test_boundary_iou_of_a_known_image() -> None:
    # d = 1 for 10 x 10 pixels: a region is the outermost pixels of a mask.
    target = np.zeros((10, 10), np.uint8)
    target[:, 5:] = 1
    prediction = np.zeros((10, 10), np.uint8)
    prediction[:, 6:] = 1
    counts = BoundaryCounts(3)
    counts.update(prediction, target, IGNORE)
    # Class 0 has 26 of 10 x 5 and 28 of 10 x 6 pixels; both hold the left column, 10, and 2 x 4 above and below.
    # Class 1 has 26 of 10 x 5 and 24 of 10 x 4; both hold the right column, 10, and 2 x 3 above and below.
    assert counts.counts.tolist() == [[18, 16, 0], [36, 34, 0]]
    np.testing.assert_allclose(counts.iou(), [18 / 36, 16 / 34, math.nan])
    assert counts.miou == pytest.approx((18 / 36 + 16 / 34) / 2)


def test_nothing_counted_has_no_boundary_iou() -> None:
    counts = BoundaryCounts(300)
    counts.update(np.zeros((4, 4), np.uint16), np.full((4, 4), 65535, np.uint16), 65535)
    assert counts.counts.sum() == 0
    assert math.isnan(counts.miou)


@given(st.integers(0, 2**32), st.integers(2, 6))
def test_scores_of_parts_add_up_to_those_of_the_whole(seed: int, classes: int) -> None:
    images = [_blocks(seed + index, classes, 30 + index, 40) for index in range(3)]
    whole, total = Scores.empty(classes), Scores.empty(classes)
    for prediction, target in images:
        part = Scores.empty(classes)
        for scores in (whole, part):
            scores.update(prediction, target, IGNORE)
        total = total + part
    np.testing.assert_array_equal(total.confusion.counts, whole.confusion.counts)
    np.testing.assert_array_equal(total.boundary.counts, whole.boundary.counts)
    np.testing.assert_array_equal(whole.confusion.counts, _matrix(*images, classes=classes).counts)
    copy = BoundaryCounts(classes, whole.boundary.counts)
    np.testing.assert_array_equal(copy.iou(), whole.boundary.iou())


@pytest.mark.parametrize(("kind", "rows"), [(ConfusionMatrix, 3), (BoundaryCounts, 2)])
def test_counts_of_other_shapes_do_not_add(kind: type[ConfusionMatrix | BoundaryCounts], rows: int) -> None:
    with pytest.raises(ValueError, match="3 and 4 classes"):
        kind(3) + kind(4)  # type: ignore[operator]
    with pytest.raises(TypeError):
        ConfusionMatrix(2) + BoundaryCounts(2)  # type: ignore[operator]
    for shape in ((rows, 4), (rows + 1, 3)):
        with pytest.raises(ValueError, match=r"counts of shape .* for 3 classes"):
            kind(3, np.zeros(shape, np.int64))
