"""Class statistics against the obvious way: a boolean mask per class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pspnet_core.images import run_lengths
from pspnet_core.images.statistics import STATISTICS, Runs, class_statistics, image_confidence


def _random(seed: int, height: int, width: int, classes: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return random.integers(0, classes, (height, width)), random.random((height, width), np.float32)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3, 40, 60000]))
def test_statistics_agree_with_a_mask_per_class(seed: int, height: int, width: int, classes: int) -> None:
    mask, confidence = _random(seed, height, width, classes)
    found = class_statistics(*run_lengths.encode(mask), confidence)
    present = np.unique(mask)
    np.testing.assert_array_equal(found.class_id, present)
    assert found.class_id.dtype == np.int32
    assert list(found.columns) == list(STATISTICS)
    np.testing.assert_array_equal(found.columns["pixels"], [(mask == index).sum() for index in present])
    np.testing.assert_allclose(
        found.columns["fraction"].astype(float), [(mask == index).mean() for index in present], rtol=1e-12
    )
    expected = [confidence[mask == index].mean(dtype=np.float64) for index in present]
    np.testing.assert_allclose(found.columns["confidence"].astype(float), expected, rtol=1e-6)


def test_a_statistic_is_one_function_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_of_class(runs: Runs) -> NDArray[np.int64]:
        return np.bincount(runs.slot)

    monkeypatch.setitem(STATISTICS, "runs", runs_of_class)
    found = class_statistics(np.array([4, 1, 4]), np.array([1, 2, 1]), np.ones((2, 2), np.float32))
    assert found.columns["runs"].tolist() == [1, 2]


def test_means_keep_their_digits_over_many_pixels() -> None:
    confidence = np.full((2000, 2000), 0.1, np.float32)
    found = class_statistics(np.array([3]), np.array([confidence.size]), confidence)
    assert found.columns["confidence"][0] == pytest.approx(0.1, rel=1e-6)
    assert image_confidence(confidence) == pytest.approx(0.1, rel=1e-6)


def test_a_confidence_map_that_is_no_block_of_memory() -> None:
    confidence = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4).T
    found = class_statistics(np.array([0, 1]), np.array([3, 9]), confidence)
    assert found.columns["confidence"][0] == pytest.approx(confidence[0].mean())


@pytest.mark.parametrize(
    ("classes", "lengths", "part"),
    [
        ([0], [3], "hold 3 pixels"),
        ([0], [5], "hold 5 pixels"),
        ([0, 1], [4], "as many of each"),
        ([], [], "one run"),
        ([0, 1], [4, 0], "one run"),
    ],
)
def test_runs_that_do_not_cover_the_map_are_refused(classes: list[int], lengths: list[int], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        class_statistics(np.array(classes, int), np.array(lengths, int), np.ones((2, 2), np.float32))
