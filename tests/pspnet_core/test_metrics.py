"""The confusion matrix against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pspnet_core.metrics import ConfusionMatrix

IGNORE = 255


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
@settings(deadline=None, derandomize=True)
def test_counts_are_those_of_counting_one_by_one(seed: int, classes: int, dtype: type) -> None:
    prediction, target = _pair(seed, classes, dtype)
    expected = np.zeros((classes, classes), np.int64)
    for guess, truth in zip(prediction.ravel(), target.ravel(), strict=True):
        if truth != IGNORE:
            expected[truth, guess] += 1
    matrix = _matrix((prediction, target), classes=classes)
    assert matrix.counts.dtype == np.int64
    np.testing.assert_array_equal(matrix.counts, expected)


@given(st.integers(0, 2**32), st.integers(2, 9))
@settings(deadline=None, derandomize=True)
def test_parts_add_up_to_the_whole(seed: int, classes: int) -> None:
    one, other = _pair(seed, classes), _pair(seed + 1, classes)
    parts = _matrix(one, classes=classes) + _matrix(other, classes=classes)
    np.testing.assert_array_equal(parts.counts, _matrix(one, other, classes=classes).counts)


def test_adding_leaves_the_parts_alone() -> None:
    one, other = _matrix(_pair(0, 3), classes=3), _matrix(_pair(1, 3), classes=3)
    before = one.counts.copy()
    total = one + other
    total.counts += 1
    np.testing.assert_array_equal(one.counts, before)


def test_metrics_of_a_known_matrix() -> None:
    matrix = ConfusionMatrix(3, np.array([[3, 1, 0], [1, 2, 0], [0, 1, 0]]))
    np.testing.assert_allclose(matrix.iou(), [3 / 5, 2 / 5, 0])
    np.testing.assert_allclose(matrix.accuracy(), [3 / 4, 2 / 3, 0])
    assert matrix.miou == pytest.approx(1 / 3)
    assert matrix.macc == pytest.approx((3 / 4 + 2 / 3) / 3)
    assert matrix.aacc == pytest.approx(5 / 8)


def test_absent_classes_do_not_count() -> None:
    matrix = ConfusionMatrix(4, np.array([[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert np.isnan(matrix.iou()[2:]).all()
    assert matrix.miou == matrix.macc == matrix.aacc == 1


def test_a_class_only_predicted_counts_for_iou_and_not_for_accuracy() -> None:
    matrix = ConfusionMatrix(2, np.array([[1, 1], [0, 0]]))
    np.testing.assert_allclose(matrix.iou(), [0.5, 0])
    assert math.isnan(matrix.accuracy()[1])
    assert matrix.macc == 0.5


def test_nothing_counted_is_nan_without_a_warning() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8), IGNORE)
    assert math.isnan(matrix.miou)
    assert math.isnan(matrix.macc)
    assert math.isnan(matrix.aacc)
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
def test_ids_out_of_range_are_refused(prediction: list[int], target: list[int], part: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=part):
        matrix.update(np.array(prediction), np.array(target), IGNORE)
    assert matrix.counts.sum() == 0


def test_a_prediction_under_an_ignored_pixel_does_not_matter() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([200, 1]), np.array([IGNORE, 1]), IGNORE)
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


def test_matrices_of_different_sizes_do_not_add() -> None:
    with pytest.raises(ValueError, match="3 and 4 classes"):
        ConfusionMatrix(3) + ConfusionMatrix(4)
    with pytest.raises(TypeError):
        ConfusionMatrix(3) + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="counts of shape"):
        ConfusionMatrix(3, np.zeros((2, 2), np.int64))


def test_counts_come_back_from_other_workers() -> None:
    matrix = _matrix(_pair(5, 4), classes=4)
    copy = ConfusionMatrix(4, matrix.counts)
    copy.update(*_pair(6, 4), IGNORE)
    assert copy.counts.sum() > matrix.counts.sum()
