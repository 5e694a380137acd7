"""Every layout: a tiny data set is laid out as published, found and read; what is wrong with it is an error.

Each row of ``BUILDERS`` writes two pairs for ``train`` and one for ``val`` into a store and says what must be found.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.datasets.dataset import Dataset, LayoutOptions, PairError
from pipelines.datasets.labels import RECENT_FILES
from pipelines.datasets.layouts import LAYOUTS, open_dataset
from pipelines.datasets.packing import Pack, Part, card_of_parts, finish, plan_shards
from pipelines.label_table.schema import MASKS
from pipelines.storage import Store, open_store
from pipelines.storage.arrow import to_parquet
from pspnet_core.errors import ConfigError
from pspnet_core.images import run_lengths
from pspnet_core.images.classes import class_table
from pspnet_core.images.masks import to_png
from tests.support.packing import in_process

CLASSES = {"names": ["sky", "road", "car"], "colors": [[0, 0, 255], [90, 90, 90], [255, 0, 0]], "ignore": 9}
SHAPE = (4, 6)
Ids = list[list[int]]


@dataclass(frozen=True)
class Expected:
    """Split and key to the class ids of the mask; names of the first and last class, and the ignore id."""

    masks: dict[tuple[str, str], Ids]
    first: str
    last: str
    ignore: int


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One colour, which JPEG keeps but for rounding."""
    colour = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
    return np.broadcast_to(colour, (*SHAPE, 3)).copy()


def put(store: Store, path: str, data: bytes | str) -> None:
    assert store.put_if_absent(path, data.encode() if isinstance(data, str) else data)


def put_image(store: Store, path: str, seed: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG" if path.endswith("png") else "JPEG")
    put(store, path, buffer.getvalue())


def ids(*values: int) -> Ids:
    """A mask of ``SHAPE`` that goes through some ids, row by row."""
    return np.resize(values, SHAPE).tolist()


def put_mask(store: Store, path: str, mask: Ids) -> None:
    put(store, path, to_png(np.array(mask)))


def put_pairs(store: Store, masks: dict[tuple[str, str], Ids], image: str, mask: str) -> None:
    """Write the pairs of ``(split, key)`` to paths that hold ``{split}`` and ``{key}``."""
    for seed, ((split, key), content) in enumerate(masks.items()):
        put_image(store, image.format(split=split, key=key), seed)
        put_mask(store, mask.format(split=split, key=key), content)


def build_folder(store: Store) -> Expected:
    put(store, "classes.json", json.dumps(CLASSES))
    masks = {("train", "a"): ids(0, 1, 9), ("train", "deep/b"): ids(2), ("val", "c"): ids(1, 2)}
    put_pairs(store, masks, "images/{split}/{key}.jpg", "masks/{split}/{key}.png")
    put_mask(store, "masks/train/no image.png", ids(0))
    return Expected(masks, "sky", "car", 9)


def build_ade20k(store: Store) -> Expected:
    found = {}
    for seed, (folder, split) in enumerate([("training", "train"), ("training", "train"), ("validation", "val")]):
        key = f"ADE_{folder[:5]}_{seed:08d}"
        put_image(store, f"images/{folder}/{key}.jpg", seed)
        put_mask(store, f"annotations/{folder}/{key}.png", ids(0, 1, 150, seed + 1))
        found[split, key] = ids(255, 0, 149, seed)
    put(store, "objectInfo150.txt", "Idx Ratio Train Val Stuff Name")
    return Expected(found, "wall", "flag", 255)


def build_cityscapes(store: Store, kind: str = "labelIds") -> Expected:
    found = {}
    for seed, (split, city) in enumerate([("train", "aachen"), ("train", "bochum"), ("val", "lindau")]):
        key = f"{city}/{city}_000000_{seed:06d}"
        put_image(store, f"leftImg8bit/{split}/{key}_leftImg8bit.png", seed)
        put_mask(store, f"gtFine/{split}/{key}_gtFine_color.png", ids(0))
        if kind == "labelIds":
            # void, road, licence plate (-1 in eight bits), bicycle, and the first class after unlabelled ones
            put_mask(store, f"gtFine/{split}/{key}_gtFine_labelIds.png", ids(0, 7, 255, 33, 11))
            found[split, key] = ids(255, 0, 255, 18, 2)
        else:
            put_mask(store, f"gtFine/{split}/{key}_gtFine_labelTrainIds.png", ids(255, 0, 18))
            found[split, key] = ids(255, 0, 18)
    put_image(store, "leftImg8bit/test/berlin/berlin_000000_000000_leftImg8bit.png", 7)  # its masks are not given out
    return Expected(found, "road", "bicycle", 255)


def build_voc2012(store: Store) -> Expected:
    masks = {("train", "2007_000032"): ids(0, 1, 255), ("train", "2008_1"): ids(20), ("val", "2007_000033"): ids(5)}
    put_pairs(store, masks, "JPEGImages/{key}.jpg", "SegmentationClass/{key}.png")
    put_mask(store, "SegmentationObject/2008_1.png", ids(1))
    put_image(store, "JPEGImages/no_mask.jpg", 9)
    put(store, "ImageSets/Segmentation/train.txt", "2007_000032\n2008_1\n")
    put(store, "ImageSets/Segmentation/val.txt", "2007_000033\n")
    put(store, "ImageSets/Segmentation/trainval.txt", "2007_000032\n2007_000033\n2008_1\n")
    return Expected(masks, "background", "tvmonitor", 255)


def build_camvid(store: Store) -> Expected:
    masks = {("train", "0001TP_006690"): ids(0, 11), ("train", "0016E5_1"): ids(10), ("val", "0016E5_2"): ids(3, 4)}
    put_pairs(store, masks, "{split}/{key}.png", "{split}annot/{key}.png")
    put(store, "train.txt", "/SegNet/CamVid/train/0001TP_006690.png /SegNet/CamVid/trainannot/0001TP_006690.png\n")
    return Expected(masks, "Sky", "Bicyclist", 11)


def build_list(store: Store) -> Expected:
    put(store, "classes.json", json.dumps(CLASSES))
    masks = {("train", "in/a"): ids(0, 9), ("train", "other/b"): ids(1), ("val", "in/c"): ids(2)}
    put_pairs(store, masks, "{key}.jpg", "out/{key}.png")
    put(store, "train.txt", "in/a.jpg out/in/a.png\n\n/other/b.jpg\tout/other/b.png\n")
    put(store, "val.txt", "in/c.jpg out/in/c.png")
    return Expected(masks, "sky", "car", 9)


MADE = datetime(2026, 1, 31, tzinfo=timezone.utc)
METADATA = {"schema": 1, "model": "m", "fingerprint": "0123456789ab", "classes": CLASSES}


def label_row(store: Store, path: str, mask: Ids, *, sure: dict[int, float], png: bool = False) -> dict[str, Any]:
    """A row of the label table; ``sure`` has the confidence of each class."""
    item = store.stat(path)
    assert item is not None
    classes, lengths = run_lengths.encode(np.array(mask))
    stats = [{"class_id": each, "name": "n", "pixels": 1, "fraction": 0.5, "confidence": sure[each]} for each in sure]
    return {
        "uri": item.uri,
        "key": path.removeprefix("pictures/"),
        "etag": item.etag,
        "bytes": item.bytes,
        "width": SHAPE[1],
        "height": SHAPE[0],
        "status": "ok",
        "error": None,
        "mask_classes": None if png else classes.tolist(),
        "mask_lengths": None if png else lengths.tolist(),
        "mask_png": to_png(np.array(mask)) if png else None,
        "confidence": 0.5,
        "class_stats": stats,
        "run_id": "r",
        "labelled_at": MADE,
    }


def put_labels(store: Store, path: str, rows: list[dict[str, Any]], **metadata: Any) -> None:
    put(store, path, to_parquet(pa.Table.from_pylist(rows, schema=MASKS), metadata=METADATA | metadata))


def build_labels(store: Store) -> Expected:
    """Class 1 is never sure enough; a.jpg was labelled twice. The keys are chosen so that h.jpg is held out."""
    for seed, name in enumerate(["a", "h", "c", "broken"]):
        put_image(store, f"pictures/{name}.jpg", seed)
    old, new, png = ids(0), ids(0, 1, 2), ids(2, 1)
    rows = [
        label_row(store, "pictures/a.jpg", old, sure={0: 1.0}),
        label_row(store, "pictures/h.jpg", new, sure={0: 0.95, 1: 0.89, 2: 0.91}),
        label_row(store, "pictures/broken.jpg", old, sure={}) | {"status": "error", "error": "Empty: no bytes"},
    ]
    later = [
        label_row(store, "pictures/a.jpg", new, sure={0: 0.95, 1: 0.1, 2: 0.9}) | {"labelled_at": MADE + timedelta(1)},
        label_row(store, "pictures/c.jpg", png, sure={1: 0.2, 2: 1.0}, png=True),
    ]
    put_labels(store, "masks/model=m-0123456789ab/dt=2026-01-31/000000-000000.parquet", rows)
    put_labels(store, "masks/model=m-0123456789ab/dt=2026-02-01/000001-000000.parquet", later)
    put(store, "plans/model=m-0123456789ab/000000.parquet", b"not a label file")
    found = {("train", "a.jpg"): ids(0, 9, 2), ("val", "h.jpg"): ids(0, 9, 2), ("train", "c.jpg"): ids(2, 9)}
    return Expected(found, "sky", "car", 9)


def pack(dataset: Dataset, output: Store, limit: int = 1000) -> list[Part]:
    """What ``prepare`` does, in this process."""
    work = Pack(dataset, output, plan_shards(dataset, limit))
    parts = in_process(work)
    finish(output, dataset, card_of_parts(dataset, parts), parts)
    return parts


def build_shards(store: Store) -> Expected:
    """A packed data set whose masks had raw ids."""
    source = open_store(store.uri_of("source"), field="data")
    expected = build_ade20k(source)
    pack(open_dataset(source.root, "ade20k"), store)
    return expected


BUILDERS: dict[str, Callable[[Store], Expected]] = {
    "folder": build_folder,
    "ade20k": build_ade20k,
    "cityscapes": build_cityscapes,
    "voc2012": build_voc2012,
    "camvid": build_camvid,
    "list": build_list,
    "labels": build_labels,
    "shards": build_shards,
}
OPTIONS = LayoutOptions(confidence=0.9, holdout=0.3)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = f"{tmp_path}/data" if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/data"
    return open_store(uri, field="data")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(f"{tmp_path}/data", field="data")


def contents(dataset: Dataset) -> dict[tuple[str, str], Ids]:
    return {
        (split, pair.key): dataset.read(pair)[1].tolist() for split, pairs in dataset.splits.items() for pair in pairs
    }


# The contract


def test_every_layout_is_built_here() -> None:
    assert BUILDERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_ids_splits_also_after_pickling(layout: str, root: Store) -> None:
    expected = BUILDERS[layout](root)
    dataset = open_dataset(root.root, layout, OPTIONS)
    assert contents(dataset) == expected.masks
    names = dataset.classes.names
    assert (names[0], names[-1], dataset.classes.ignore) == (expected.first, expected.last, expected.ignore)
    seeds = {key: seed for seed, (_, key) in enumerate(expected.masks)}
    for split, pairs in dataset.splits.items():
        assert {pair.split for pair in pairs} == {split}
        assert sum(dataset.blocks(split)) == len(pairs)
        for pair in pairs:
            image, _ = dataset.read(pair)
            assert image.shape == (*SHAPE, 3)
            assert image.dtype == np.uint8
            np.testing.assert_allclose(image, picture(seeds[pair.key]), atol=6)
            assert dataset.uri_of(pair.image).startswith(root.root)
    data = pickle.dumps(dataset)
    assert len(data) < 20_000, "what it remembers by now must not travel"
    again = pickle.loads(data)
    assert contents(again) == expected.masks
    for split in dataset.splits:
        assert again.fingerprint(split) == dataset.fingerprint(split) == dataset.fingerprint(split)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"labels"}))
def test_fingerprints_tell_splits_and_contents_apart(layout: str, tmp_path: Path) -> None:
    stores = [open_store(f"{tmp_path}/{name}", field="data") for name in ("one", "two")]
    for store in stores:
        BUILDERS[layout](store)
    one, two = (open_dataset(store.root, layout) for store in stores)
    assert len({one.fingerprint("train"), one.fingerprint("val")}) == 2
    # Packed content is known by its hashes; loose files only by what the listing tells, their times included.
    assert (one.fingerprint("val") == two.fingerprint("val")) == (layout == "shards")
    renamed = replace(two, splits={"val": (replace(two.split("val")[0], key="other"),)})
    assert renamed.fingerprint("val") != two.fingerprint("val")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_refused_in_one_line(layout: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^data=") as caught:
        open_dataset(str(tmp_path / "empty"), layout)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "empty") in str(caught.value)


MISSING_MASKS = {
    "folder": "masks/train/a.png",
    "ade20k": "annotations/training/ADE_train_00000000.png",
    "cityscapes": "gtFine/train/aachen/aachen_000000_000000_gtFine_labelIds.png",
    "voc2012": "SegmentationClass/2007_000032.png",
    "camvid": "trainannot/0001TP_006690.png",
    "list": "out/in/a.png",
}


@pytest.mark.parametrize("layout", MISSING_MASKS)
def test_a_missing_mask_is_named(layout: str, local: Store) -> None:
    BUILDERS[layout](local)
    local.delete(MISSING_MASKS[layout])
    path = re.escape(MISSING_MASKS[layout])
    with pytest.raises(
        ConfigError, match=rf"has no mask; expected {path}$|line 1: names {path}, but there is no such mask"
    ):
        open_dataset(local.root, layout).split("train")
    assert len(open_dataset(local.root, layout).split("val")) == 1, "nobody asked for the other split"


STRAY_MASKS = {
    "folder": "masks/train/{}.png",
    "ade20k": "annotations/training/{}.png",
    "cityscapes": "gtFine/val/lindau/{}_gtFine_labelIds.png",
    "voc2012": "SegmentationClass/{}.png",
    "camvid": "valannot/{}.png",
}


@pytest.mark.parametrize("layout", STRAY_MASKS)
def test_masks_without_an_image_are_passed_over_and_counted(
    layout: str, local: Store, caplog: pytest.LogCaptureFixture
) -> None:
    expected = BUILDERS[layout](local)
    before = [STRAY_MASKS[layout].format("no image")] if layout == "folder" else []
    added = [STRAY_MASKS[layout].format(f"gone {number}") for number in range(7)]
    named = ", ".join([*added, *before][:5])
    with caplog.at_level("WARNING", "pipelines.datasets.pairing"):
        open_dataset(local.root, layout)
        assert len(caplog.messages) == len(before)
        for path in added:
            put_mask(local, path, ids(0))
        dataset = open_dataset(local.root, layout)
    assert contents(dataset) == expected.masks
    assert caplog.messages[-1] == f"masks without an image: {7 + len(before)} passed over ({named}, ...)"


# Each layout's own


@pytest.mark.parametrize("raw", [151, 254])
def test_ids_that_ade20k_does_not_have_are_refused(raw: int, local: Store) -> None:
    put_image(local, "images/training/a.jpg", 0)
    put_mask(local, "annotations/training/a.png", ids(0, 255, raw))
    dataset = open_dataset(local.root, "ade20k")
    with pytest.raises(PairError, match=rf"a\.png: holds id {raw}; the classes allow 0\.\.150 and ignore 255"):
        dataset.read(dataset.split("train")[0])


def test_a_class_table_of_ones_own(local: Store) -> None:
    build_ade20k(local)
    put(local, "classes.json", json.dumps({"names": ["rest", "wall"], "ids": {"0": 0, "1": 1}}))
    dataset = open_dataset(local.root, "ade20k")
    assert dataset.classes.names == ("rest", "wall")
    assert dataset.read(dataset.split("train")[0])[1].tolist() == ids(0, 1, 255, 1)


def test_cityscapes_train_ids_where_there_are_no_others(local: Store) -> None:
    expected = build_cityscapes(local, "labelTrainIds")
    dataset = open_dataset(local.root, "cityscapes")
    assert dataset.classes == class_table("cityscapes")
    assert contents(dataset) == expected.masks


@pytest.mark.parametrize("listed", [True, False], ids=["with trainaug.txt", "without"])
def test_voc2012_with_the_sbd_annotations(listed: bool, local: Store) -> None:
    build_voc2012(local)
    put_image(local, "JPEGImages/2010_9.jpg", 5)
    for key, mask in (("2007_000032", ids(7)), ("2007_000033", ids(8)), ("2010_9", ids(9))):
        put_mask(local, f"SegmentationClassAug/{key}.png", mask)
    if listed:
        lines = (f"/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png\n" for key in ("2010_9", "2007_000033"))
        put(local, "ImageSets/Segmentation/trainaug.txt", "".join(lines))
    found = contents(open_dataset(local.root, "voc2012"))
    # The image of val is left out of train. SBD's masks count where VOC has none of its own, which are finer.
    expected = {("train", "2010_9"): ids(9), ("val", "2007_000033"): ids(5)}
    if not listed:
        expected |= {("train", "2007_000032"): ids(0, 1, 255), ("train", "2008_1"): ids(20)}
    assert found == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"in/a.jpg", r"train\.txt line 3: expected the path of an image, a blank and the path of its mask"),
        (b"in/a.jpg out/x.png 1", r"train\.txt line 3: expected"),
        (b"in/x.jpg out/in/a.png", r"train\.txt line 3: names in/x\.jpg, but there is no such image below"),
        (b"in/a.jpg out/x.png", r"train\.txt line 3: names out/x\.png, but there is no such mask below"),
        (b"../a.jpg out/in/a.png", r"train\.txt line 3: names \.\./a\.jpg"),
        (b"\xff", r"train\.txt: is no UTF-8 text"),
    ],
)
def test_bad_lines_of_a_list(line: bytes, message: str, local: Store) -> None:
    build_list(local)
    local.delete("train.txt")
    put(local, "train.txt", b"in/a.jpg out/in/a.png\n\n" + line)
    with pytest.raises(ConfigError, match=message):
        open_dataset(local.root, "list").split("train")


# Labels


def test_the_threshold_and_the_share_held_out(local: Store) -> None:
    build_labels(local)
    keys = [("train", "a.jpg"), ("train", "h.jpg"), ("train", "c.jpg")]
    everything = open_dataset(local.root, "labels", LayoutOptions(confidence=0.0, holdout=0.0))
    assert contents(everything) == dict(zip(keys, (ids(0, 1, 2), ids(0, 1, 2), ids(2, 1)), strict=True))
    nothing = open_dataset(local.root, "labels", LayoutOptions(confidence=1.0, holdout=0.0))
    assert contents(nothing) == dict(zip(keys, (ids(9), ids(9), ids(2, 9)), strict=True))
    assert everything.fingerprint("train") != nothing.fingerprint("train")


@pytest.mark.parametrize("below", ["masks", "masks/model=m-0123456789ab", "masks/model=m-0123456789ab/dt=2026-02-01"])
def test_a_part_of_a_label_table(below: str, local: Store) -> None:
    build_labels(local)
    dataset = open_dataset(local.uri_of(below), "labels", LayoutOptions(holdout=0.0))
    keys = {pair.key for pair in dataset.split("train")}
    assert keys == ({"a.jpg", "c.jpg"} if "dt=" in below else {"a.jpg", "h.jpg", "c.jpg"})


def test_a_newer_row_counts_also_where_it_is_an_error(local: Store) -> None:
    build_labels(local)
    row = label_row(local, "pictures/a.jpg", ids(0), sure={})
    newest = row | {"status": "error", "error": "Truncated: x", "labelled_at": MADE + timedelta(2)}
    oldest = label_row(local, "pictures/c.jpg", ids(0), sure={}) | {"status": "error", "labelled_at": MADE}
    put_labels(local, "masks/model=m-0123456789ab/dt=2026-02-02/000002-000000.parquet", [newest, oldest])
    dataset = open_dataset(local.root, "labels", LayoutOptions(holdout=0.0))
    assert [pair.key for pair in dataset.split("train")] == ["h.jpg", "c.jpg"]


@pytest.mark.parametrize("changes", [{"mask_lengths": [1]}, {"mask_classes": None}, {"width": 7}])
def test_a_damaged_row_of_labels_is_named(changes: dict[str, Any], local: Store) -> None:
    put_image(local, "pictures/a.jpg", 0)
    row = label_row(local, "pictures/a.jpg", ids(0), sure={0: 1.0}) | changes
    put_labels(local, "masks/model=m-0/dt=2026-01-31/0.parquet", [row])
    dataset = open_dataset(local.root, "labels", LayoutOptions(holdout=0.0))
    with pytest.raises(PairError, match=r"0\.parquet: holds no mask in row 0 \(.*\); label the image again$"):
        dataset.read(dataset.split("train")[0])


def test_the_held_out_share_is_a_function_of_the_key(local: Store) -> None:
    put_image(local, "pictures/a.jpg", 0)
    row = label_row(local, "pictures/a.jpg", ids(0), sure={0: 1.0})
    rows = [row | {"uri": f"/nowhere/{number}.jpg", "key": f"{number}.jpg"} for number in range(400)]
    put_labels(local, "masks/model=m-0/dt=2026-01-31/000000-000000.parquet", rows)
    splits = {}
    for share in (0.1, 0.3):
        dataset = open_dataset(local.root, "labels", LayoutOptions(holdout=share))
        assert dataset.blocks("val") == (len(dataset.split("val")),)
        splits[share] = {pair.key for pair in dataset.split("val")}
        assert abs(len(splits[share]) - 400 * share) < 4 * np.sqrt(400 * share * (1 - share))
    assert splits[0.1] < splits[0.3]


def test_labels_of_two_models_are_not_mixed(local: Store) -> None:
    build_labels(local)
    row = label_row(local, "pictures/c.jpg", ids(0), sure={0: 1.0})
    put_labels(local, "masks/model=n-ba9876543210/dt=2026-01-31/0.parquet", [row], fingerprint="ba9876543210")
    with pytest.raises(ConfigError, match=r"holds labels of 2 models; give one of .*/model=m-0.*, .*/model=n-b[^/]*$"):
        open_dataset(local.root, "labels")
    assert open_dataset(local.uri_of("masks/model=n-ba9876543210"), "labels").classes.names == ("sky", "road", "car")


def test_an_image_that_changed_after_it_was_labelled(local: Store) -> None:
    build_labels(local)
    local.delete("pictures/c.jpg")
    put_image(local, "pictures/c.jpg", 77)
    dataset = open_dataset(local.root, "labels", OPTIONS)
    pair = next(pair for pair in dataset.split("train") if pair.key == "c.jpg")
    with pytest.raises(PairError, match=r"c\.jpg: has changed since it was labelled; label it again"):
        dataset.read(pair)


def test_a_file_that_is_no_label_file(local: Store) -> None:
    build_labels(local)
    put(local, "masks/model=m-0123456789ab/x.parquet", b"PAR1 not at all")
    with pytest.raises(ConfigError, match=r"x\.parquet: is no file of a label table"):
        open_dataset(local.root, "labels")


def test_a_window_of_the_shuffle_is_remembered() -> None:
    from pipelines.labelling.config import LabelConfig
    from pipelines.training.loading import WINDOW

    assert WINDOW / LabelConfig.chunk < RECENT_FILES
