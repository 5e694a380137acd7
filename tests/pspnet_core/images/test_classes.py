"""Class tables: the rules, the JSON form, raw ids, and facts of the built-in tables."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import CITYSCAPES, CLASS_TABLES, VOC2012, ClassTable, Mask, class_table

BLACK_WHITE = ((0, 0, 0), (255, 255, 255))
SIZES = {"camvid": 11, "cityscapes": 19, "voc2012": 21, "ade20k": 150, "coco-stuff-164k": 171}


@pytest.mark.parametrize("name", CLASS_TABLES)
def test_every_built_in_table(name: str) -> None:
    """The contract of a row: its size, one name and colour per class, an ignore id, and lossless copies."""
    table = CLASS_TABLES[name]
    base = name.removesuffix("-raw")
    assert len(table) == len(set(table.names)) == len(table.colors) == SIZES[base]
    assert all(label == label.strip() for label in table.names)
    assert table.ignore == (11 if base == "camvid" else 255)
    palette = [tuple(table.palette()[3 * index : 3 * index + 3]) for index in range(256)]
    assert palette == [*table.colors, *[(0, 0, 0)] * (256 - len(table))]
    assert ClassTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert ClassTable.from_json({"table": name}) == class_table(name) == table
    assert pickle.loads(pickle.dumps(table)) == table
    assert hash(replace(table)) == hash(table)


@pytest.mark.parametrize("name", [name for name in CLASS_TABLES if name.endswith("-raw")])
def test_a_raw_table_is_the_plain_one_with_an_id_for_every_class(name: str) -> None:
    table, plain = CLASS_TABLES[name], CLASS_TABLES[name.removesuffix("-raw")]
    assert replace(table, ids=None) == plain
    assert plain.ids is None
    assert table.ids is not None
    assert sorted(table.ids.values()) == list(range(len(table)))


KNOWN = """
camvid 10 Bicyclist 0080c0, cityscapes 0 road 804080, cityscapes 18 bicycle 770b20, voc2012 0 background 000000,
voc2012 15 person c08080, voc2012 20 tvmonitor 004080, ade20k 0 wall 787878, ade20k 12 person 96053d,
ade20k 44 chest of drawers 0633ff, ade20k 149 flag 5c00ff, coco-stuff-164k 0 person 00c040,
coco-stuff-164k 79 toothbrush c0a000, coco-stuff-164k 80 banner 00c000, coco-stuff-164k 84 building-other 400060,
coco-stuff-164k 170 wood 404000
"""


@pytest.mark.parametrize("row", [row.strip() for row in KNOWN.split(",")])
def test_built_in_tables_hold_known_rows(row: str) -> None:
    key, index, *name, color = row.split()
    table = CLASS_TABLES[key]
    assert (table.names[int(index)], bytes(table.colors[int(index)]).hex()) == (" ".join(name), color)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ADE20K", "ade20k"),
        ("ade", "ade20k"),
        ("ade_raw", "ade20k-raw"),
        ("Pascal VOC", "voc2012"),
        ("voc_2012", "voc2012"),
        ("coco-stuff", "coco-stuff-164k"),
        ("cocostuff164k", "coco-stuff-164k"),
        ("COCO_Stuff raw", "coco-stuff-164k-raw"),
        ("CityscapesRaw", "cityscapes-raw"),
    ],
)
def test_short_names_lead_to_tables(name: str, key: str) -> None:
    assert class_table(name) is CLASS_TABLES[key]


@pytest.mark.parametrize("name", ["", "raw", "kitti", "camvid-raw"])
def test_an_unknown_table_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        class_table(name)
    assert str(caught.value).startswith(f"classes.table={name}: choose one of camvid, cityscapes,")


# labels.py of the cityscapesScripts, as published: name, id, trainId; the license plate has the train id -1 there.
CITYSCAPES_LABELS = """
unlabeled 0 255, ego-vehicle 1 255, rectification-border 2 255, out-of-roi 3 255, static 4 255, dynamic 5 255,
ground 6 255, road 7 0, sidewalk 8 1, parking 9 255, rail-track 10 255, building 11 2, wall 12 3, fence 13 4,
guard-rail 14 255, bridge 15 255, tunnel 16 255, pole 17 5, polegroup 18 255, traffic-light 19 6, traffic-sign 20 7,
vegetation 21 8, terrain 22 9, sky 23 10, person 24 11, rider 25 12, car 26 13, truck 27 14, bus 28 15, caravan 29 255,
trailer 30 255, train 31 16, motorcycle 32 17, bicycle 33 18, license-plate -1 255
"""


def test_cityscapes_ids_become_train_ids() -> None:
    labels = [row.split() for row in CITYSCAPES_LABELS.split(",")]
    assert len(labels) == 35
    # -1 in a file of 8 bits is 255.
    raw = np.array([int(number) for _, number, _ in labels]).astype(np.uint8)
    remapped = CLASS_TABLES["cityscapes-raw"].remap(raw)
    assert remapped.tolist() == [int(train) for _, _, train in labels]
    for (name, _, _), index in zip(labels, remapped.tolist(), strict=True):
        assert index == 255 or CITYSCAPES.names[index] == name.replace("-", " ")


def test_ade20k_files_count_from_one() -> None:
    raw = np.arange(256, dtype=np.uint8)
    assert CLASS_TABLES["ade20k-raw"].remap(raw).tolist() == [255, *range(150), *[255] * 105]


def test_coco_stuff_files_have_gaps() -> None:
    raw = np.arange(256, dtype=np.uint8)
    table = CLASS_TABLES["coco-stuff-164k-raw"]
    named = {index: table.names[label] for index, label in enumerate(table.remap(raw).tolist()) if label != 255}
    # The number in labels.txt, less 1.
    known = {0: "person", 10: "fire hydrant", 12: "stop sign", 27: "umbrella", 66: "dining table", 69: "toilet"}
    known |= {89: "toothbrush", 91: "banner", 109: "desk-stuff", 132: "mirror-stuff", 181: "wood"}
    assert {index: named[index] for index in known} == known
    # street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush
    assert set(range(182)) - named.keys() == {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


ID_MAPS = st.dictionaries(st.integers(0, 65535), st.sampled_from([0, 1, 9]), min_size=1)


@given(ID_MAPS, st.integers(0, 2**32), st.booleans())
def test_remapping_looks_up_pixel_by_pixel(ids: dict[int, int], seed: int, wide: bool) -> None:
    table = ClassTable(names=("a", "b"), colors=BLACK_WHITE, ignore=9, ids=ids)
    random = np.random.default_rng(seed)
    raw = random.choice([*ids, 0, 255, 65535], (5, 8))
    mask: Mask = raw.astype(np.uint16) if wide else raw.astype(np.uint8)
    before = mask.copy()
    expected = [[ids.get(raw, 9) for raw in row] for row in mask.tolist()]
    remapped = table.remap(mask)
    assert remapped.tolist() == expected
    assert remapped.dtype == np.uint8
    np.testing.assert_array_equal(mask, before)
    assert ClassTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_remapping_without_ids_or_to_large_ones() -> None:
    mask = np.array([[0, 1, 255]], np.uint8)
    assert VOC2012.remap(mask) is mask
    names = tuple(f"c{index}" for index in range(300))
    table = replace(ClassTable.from_json({"names": names}), ids={1: 299})
    assert table.remap(mask).tolist() == [[65535, 299, 65535]]
    assert table.remap(mask).dtype == np.uint16
    with pytest.raises(ValueError, match="a mask of int64"):
        table.remap(mask.astype(np.int64))  # type: ignore[arg-type]


def test_palette_of_a_large_table_holds_the_first_256() -> None:
    table = ClassTable.from_json({"names": [f"c{index}" for index in range(300)]})
    assert len(table.palette()) == 768
    assert table.ignore == 65535


@given(st.integers(2, 600))
def test_missing_colours_are_distinct_and_always_the_same(classes: int) -> None:
    value = {"names": [f"c{index}" for index in range(classes)], "ignore": 65535}
    table = ClassTable.from_json(value)
    assert len(set(table.colors)) == classes
    assert table == ClassTable.from_json(value)
    assert (0, 0, 0) not in table.colors


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"names": ("a",), "colors": BLACK_WHITE[:1]}, "classes.names=1 names"),
        ({"names": ("a", "a")}, "classes.names=a: the name is given twice"),
        ({"names": ("a", " ")}, "give class 1 a name"),
        ({"colors": BLACK_WHITE[:1]}, "one colour for each of the 2"),
        ({"colors": ((0, 0, 0), (0, 0, 256))}, "(0, 0, 256)"),
        ({"colors": ((0, 0, 0), (0, -1, 0))}, "(0, -1, 0)"),
        ({"ignore": 1}, "classes.ignore=1"),
        ({"ignore": -1}, "classes.ignore=-1"),
        ({"ignore": 65536}, "classes.ignore=65536"),
        ({"ids": {}}, "classes.ids={}: every pixel would be ignored"),
        ({"ids": {-1: 0}}, "classes.ids=-1: an id in a mask"),
        ({"ids": {65536: 0}}, "classes.ids=65536: an id in a mask"),
        ({"ids": {7: 2}}, "classes.ids.7=2: the classes allow 0..1 or ignore 255"),
        ({"ids": {7: -1}}, "classes.ids.7=-1: the classes allow"),
        ({"ids": {7: True}}, "classes.ids.7=True: the classes allow"),
        ({"ids": {7: "0"}}, "classes.ids.7='0': the classes allow"),
    ],
)
def test_broken_rules_are_told(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClassTable(**{"names": ("a", "b"), "colors": BLACK_WHITE} | changes)
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
        ({"names": ["a", "b"], "ids": [1, 2]}, "classes.ids"),
        ({"names": ["a", "b"], "ids": None}, "classes.ids"),
        ({"names": ["a", "b"], "ids": {"-1": 0}}, "classes.ids"),
        ({"names": ["a", "b"], "ids": {"7": 0.0}}, "classes.ids.7"),
        ({"table": 7}, "classes.table"),
        ({"table": "voc", "ignore": 200}, "classes.ignore"),
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
