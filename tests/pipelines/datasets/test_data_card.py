"""The data card: counts against loops, sums of parts, leaks, and the check before training."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets.data_card import DataCard, Rejected, SplitCard, check
from pipelines.datasets.dataset import Dataset, PairError
from tests.pipelines.datasets.test_dataset import CLASSES, opened, write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    random = np.random.default_rng(3)
    for split, count in (("train", 7), ("val", 4)):
        for number in range(count):
            mask = random.choice(np.array([0, 1, 9], np.uint8), (4 + number % 2, 3 + number))
            write_pair(tmp_path, split, f"{number}", mask, colour=(number, 10 * count, 0))
    return tmp_path


def everything(dataset: Dataset) -> DataCard:
    return check(dataset, (*dataset.split("train"), *dataset.split("val")))


def test_counts(root: Path) -> None:
    dataset = opened(root)
    card = everything(dataset)
    assert {name: split.images for name, split in card.splits.items()} == {"train": 7, "val": 4}
    for name, split in card.splits.items():
        pixels, sizes = Counter[int](), Counter[tuple[int, int]]()
        for pair in dataset.split(name):
            image, mask = dataset.read(pair)
            pixels.update(mask.ravel().tolist())
            sizes[image.shape[1], image.shape[0]] += 1
        assert split.pixels.tolist() == [pixels[0], pixels[1]]
        assert split.ignored == pixels[9]
        assert split.sizes == sizes
    assert (card.splits["train"].largest, card.splits["val"].largest) == ((9, 4), (6, 5))
    assert card.leaks() == ()
    assert card.rejected == ()


def test_parts_add_up_to_the_whole(root: Path) -> None:
    dataset = opened(root)
    whole = everything(dataset)
    pairs = (*dataset.split("val"), *dataset.split("train"))
    for cut in (0, 2, 4, 9, len(pairs)):
        parts = check(dataset, pairs[:cut])
        for name, split in check(dataset, pairs[cut:]).splits.items():
            parts.add(name, split)
        found, expected = parts.to_json(), whole.to_json()
        for content in (found, expected):
            for split in content["splits"].values():
                split["sizes"].sort(key=lambda row: (row["width"], row["height"]))
        assert found == expected
        assert {name: split.keys for name, split in parts.splits.items()} == {
            name: split.keys for name, split in whole.splits.items()
        }


def test_images_in_two_splits_are_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(root / "images/train/3.jpg", root / "images/val/1.jpg")
    shutil.copy(root / "masks/train/3.png", root / "masks/val/1.png")
    dataset = opened(root)
    with caplog.at_level("WARNING", "pipelines.datasets.data_card"):
        card = everything(dataset)
    assert "images in two splits: 1 (train/3 = val/1); scores on them tell nothing" in caplog.text
    assert card.to_json()["leaks"] == [{"splits": ["train", "val"], "keys": ["3", "1"]}]
    caplog.clear()
    check(dataset, dataset.split("train"))
    assert not caplog.records


def test_the_first_bad_pair_in_order_is_told(root: Path) -> None:
    for number, value in ((5, 8), (2, 7)):
        write_pair(root, "train", f"{number}", np.full((4, 5), value, np.uint8))
    dataset = opened(root)
    for _ in range(5):
        with pytest.raises(PairError, match=r"masks/train/2\.png: holds id 7; the classes allow 0\.\.1 and ignore 9"):
            check(dataset, dataset.split("train"), threads=4)


def test_what_is_written_down(root: Path) -> None:
    dataset = opened(root)
    card = check(dataset, dataset.split("train"))
    bad = Rejected(split="val", key="x", file="masks/val/x.png", reason="holds id 7")
    card.add("val", SplitCard(pixels=np.zeros(2, np.int64), rejected=[bad]))
    content = json.loads(json.dumps(card.to_json()))
    assert content["classes"] == ["sky", "road"]
    train = card.splits["train"]
    assert content["splits"]["train"]["pixels"] == dict(zip(["sky", "road"], train.pixels.tolist(), strict=True))
    val = {"images": 0, "rejected": 1, "pixels": {"sky": 0, "road": 0}, "ignored": 0, "sizes": []}
    assert content["splits"]["val"] == val | {"blank": 0, "turned": 0, "unnamed": {}}
    assert content["rejected"] == [{"split": "val", "key": "x", "file": "masks/val/x.png", "reason": "holds id 7"}]
    text = card.to_markdown()
    share = 100 * train.pixels[1] / (train.pixels.sum() + train.ignored)
    assert f"| road | {share:.3f} | 0.000 |" in text
    assert "| val | 0 | 1 |  |" in text
    assert "and 2 more |" in text  # of the seven sizes
    assert "- masks/val/x.png: holds id 7" in text
    assert "In two splits" not in text


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(300)]
    (tmp_path / "classes.json").write_text(json.dumps({"names": names, "ignore": 400}))
    write_pair(tmp_path, "train", "a", np.array([[299, 400, 5]], np.uint16))
    write_pair(tmp_path, "train", "b", np.array([[255, 7, 5]], np.uint8))
    dataset = opened(tmp_path)
    card = check(dataset, dataset.split("train"))
    pixels = card.splits["train"].pixels
    assert {index: count for index, count in enumerate(pixels.tolist()) if count} == {5: 2, 7: 1, 255: 1, 299: 1}
    assert card.splits["train"].ignored == 1
