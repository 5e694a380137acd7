"""Class tables: the rules, the JSON form, and facts of the built-in tables."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspnet_core.classes import ADE20K, CAMVID, CITYSCAPES, CLASS_TABLES, VOC2012, ClassTable
from pspnet_core.errors import ConfigError

BLACK_WHITE = ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("table", CLASS_TABLES.values(), ids=CLASS_TABLES)
def test_built_in_tables_go_through_json_unchanged(table: ClassTable) -> None:
    assert ClassTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("table", "classes", "ignore"),
    [(CAMVID, 11, 11), (CITYSCAPES, 19, 255), (VOC2012, 21, 255), (ADE20K, 150, 255)],
)
def test_built_in_tables_have_their_size(table: ClassTable, classes: int, ignore: int) -> None:
    assert len(table) == classes
    assert table.ignore == ignore


def test_built_in_tables_hold_known_rows() -> None:
    def row(table: ClassTable, index: int) -> tuple[str, tuple[int, int, int]]:
        return table.names[index], table.colors[index]

    assert row(CAMVID, 10) == ("Bicyclist", (0, 128, 192))
    assert row(CITYSCAPES, 0) == ("road", (128, 64, 128))
    assert row(CITYSCAPES, 18) == ("bicycle", (119, 11, 32))
    assert row(VOC2012, 0) == ("background", (0, 0, 0))
    assert row(VOC2012, 15) == ("person", (192, 128, 128))
    assert row(VOC2012, 20) == ("tvmonitor", (0, 64, 128))
    assert row(ADE20K, 0) == ("wall", (120, 120, 120))
    assert row(ADE20K, 12) == ("person", (150, 5, 61))
    assert row(ADE20K, 44) == ("chest of drawers", (6, 51, 255))
    assert row(ADE20K, 149) == ("flag", (92, 0, 255))


def test_palette_is_padded_to_256_colours() -> None:
    palette = CAMVID.palette()
    assert len(palette) == 768
    assert palette[:6] == bytes((128, 128, 128, 128, 0, 0))
    assert palette[33:] == bytes(768 - 33)


def test_palette_of_a_large_table_holds_the_first_256() -> None:
    table = ClassTable.from_json({"names": [f"c{index}" for index in range(300)]})
    assert len(table.palette()) == 768
    assert table.ignore == 65535


@given(st.integers(2, 600))
@settings(deadline=None, derandomize=True)
def test_missing_colours_are_distinct_and_always_the_same(classes: int) -> None:
    value = {"names": [f"c{index}" for index in range(classes)], "ignore": 65535}
    table = ClassTable.from_json(value)
    assert len(set(table.colors)) == classes
    assert table == ClassTable.from_json(value)
    assert (0, 0, 0) not in table.colors


@pytest.mark.parametrize(
    ("names", "colors", "ignore", "part"),
    [
        (("a",), BLACK_WHITE[:1], 255, "classes.names=1 names"),
        (("a", "a"), BLACK_WHITE, 255, "given twice"),
        (("a", " "), BLACK_WHITE, 255, "give class 1 a name"),
        (("a", "b"), BLACK_WHITE[:1], 255, "one colour for each of the 2"),
        (("a", "b"), ((0, 0, 0), (0, 0, 256)), 255, "(0, 0, 256)"),
        (("a", "b"), ((0, 0, 0), (0, -1, 0)), 255, "(0, -1, 0)"),
        (("a", "b"), BLACK_WHITE, 1, "classes.ignore=1"),
        (("a", "b"), BLACK_WHITE, -1, "classes.ignore=-1"),
        (("a", "b"), BLACK_WHITE, 65536, "classes.ignore=65536"),
    ],
)
def test_broken_rules_are_told(
    names: tuple[str, ...], colors: tuple[tuple[int, int, int], ...], ignore: int, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ClassTable(names=names, colors=colors, ignore=ignore)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "classes.names"),
        ({"names": "ab"}, "classes.names"),
        ({"names": ["a", 2]}, "classes.names"),
        ({"names": ["a", "b"], "colors": 7}, "classes.colors"),
        ({"names": ["a", "b"], "colors": [1, 2]}, "classes.colors"),
        ({"names": ["a", "b"], "colors": [[1, 2], [3, 4]]}, "classes.colors"),
        ({"names": ["a", "b"], "colors": [[1, 2, 3], [3, 4, 5.0]]}, "classes.colors"),
        ({"names": ["a", "b"], "ignore": "x"}, "classes.ignore"),
        ({"names": ["a", "b"], "ignore": True}, "classes.ignore"),
        ({"names": ["a", "b"], "ignore": 11.0}, "classes.ignore"),
    ],
)
def test_bad_json_is_told_with_its_field(value: Mapping[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClassTable.from_json(value)
    assert caught.value.field == field


def test_json_that_is_no_object_is_told() -> None:
    value: object = ["a", "b"]
    with pytest.raises(ConfigError, match="classes=list"):
        ClassTable.from_json(value)  # type: ignore[arg-type]
