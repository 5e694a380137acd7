"""Metrics of classes under the classes' names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from pipelines.tracking.metric_names import class_metric_names


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["road", "traffic light"], ["iou/road", "iou/traffic light"]),
        (["earth, ground", "door/gate", "a:b"], ["iou/earth_ ground", "iou/door_gate", "iou/a_b"]),
        (["a/b", "a_b", "A_B"], ["iou/a_b", "iou/a_b_1", "iou/A_B_2"]),
        (["x", "x_2", "x"], ["iou/x", "iou/x_2", "iou/x_3"]),
        (["", "..", "?"], ["iou/class", "iou/class_1", "iou/_"]),
        (["Straße", "STRASSE"], ["iou/Straße", "iou/STRASSE_1"]),
        (["y" * 300], ["iou/" + "y" * 200]),
    ],
)
def test_names(classes: list[str], names: list[str]) -> None:
    assert class_metric_names("iou", classes) == names


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=300), max_size=8))
def test_mlflow_takes_every_name_and_none_comes_twice(classes: list[str]) -> None:
    names = class_metric_names("iou", classes)
    for name in names:
        _validate_metric_name(name)
    assert len({name.casefold() for name in names}) == len(classes)
