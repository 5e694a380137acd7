"""Data sets in the default layout: what is found, and what is refused with the file named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets.data_card import check
from pipelines.datasets.dataset import Dataset, LayoutOptions, PairError
from pipelines.datasets.layouts import open_dataset
from pspnet_core.errors import ConfigError

CLASSES = {"names": ["sky", "road"], "colors": [[0, 0, 255], [90, 90, 90]], "ignore": 9}


def write_pair(
    root: Path,
    split: str,
    key: str,
    mask: np.ndarray,
    size: tuple[int, int] | None = None,
    colour: tuple[int, int, int] = (0, 0, 0),
) -> None:
    for kind in ("images", "masks"):
        (root / kind / split / key).parent.mkdir(parents=True, exist_ok=True)
    height, width = size or mask.shape
    Image.new("RGB", (width, height), colour).save(root / "images" / split / f"{key}.jpg")
    Image.fromarray(mask).save(root / "masks" / split / f"{key}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    write_pair(tmp_path, "train", "a", np.array([[0, 1, 9]], np.uint8))
    write_pair(tmp_path, "train", "deep/b", np.array([[1, 1], [0, 1]], np.uint8))
    write_pair(tmp_path, "val", "c", np.zeros((2, 3), np.uint8))
    return tmp_path


def opened(root: Path) -> Dataset:
    return open_dataset(str(root), "folder")


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        ([[0, 1], [7, 9]], None, r"holds id 7; the classes allow 0\.\.1 and ignore 9"),
        ([[0, 2, 3], [4, 5, 6], [7, 8, 9]], None, r"holds ids 2, 3, 4, 5, 6, \.\.\.; the classes allow"),
        ([[0, 1]], (4, 5), r"the mask is 2x1, its image 5x4; make them the same size"),
        (b"no picture", None, "cannot be read"),
    ],
)
def test_a_bad_mask_is_named(
    root: Path, mask: list[list[int]] | bytes, size: tuple[int, int] | None, message: str
) -> None:
    content = mask if isinstance(mask, list) else [[0]]
    write_pair(root, "train", "bad", np.array(content, np.uint8), size=size)
    if isinstance(mask, bytes):
        (root / "masks/train/bad.png").write_bytes(mask)
    dataset = opened(root)
    with pytest.raises(PairError, match=rf"masks/train/bad\.png: {message}"):
        check(dataset, dataset.split("train"))


def test_raw_ids_become_class_ids(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps(CLASSES | {"ids": {"7": 0, "300": 1, "8": 9}}))
    write_pair(root, "train", "a", np.array([[7, 8, 0]], np.uint8))
    write_pair(root, "train", "deep/b", np.array([[7, 300, 300], [65535, 300, 1]], np.uint16))
    dataset = opened(root)
    assert dataset.blocks("train") == (1, 1)
    masks = {pair.key: dataset.read(pair)[1].tolist() for pair in dataset.split("train")}
    assert masks == {"a": [[0, 9, 9]], "deep/b": [[0, 1, 1], [9, 1, 9]]}
    assert check(dataset, dataset.split("train")).splits["train"].pixels.tolist() == [2, 3]


def test_what_is_missing_is_told(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"layout=tiles: choose one of folder, ade20k"):
        open_dataset(str(root), "tiles")
    with pytest.raises(ConfigError, match=r"split=test: no labelled images there; splits found: train, val"):
        opened(root).split("test")
    with pytest.raises(ConfigError, match=r"^data="):
        open_dataset(str(root / "nowhere"), "folder")
    (root / "classes.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        opened(root)
    (root / "classes.json").unlink()
    with pytest.raises(ConfigError, match="this layout needs it"):
        opened(root)


def test_a_file_that_went_after_the_listing(root: Path) -> None:
    dataset = opened(root)
    (root / "images/val/c.jpg").unlink()
    with pytest.raises(PairError, match=r"images/val/c\.jpg: is gone; list the data set again"):
        dataset.read(dataset.split("val")[0])


def test_a_changed_file_is_another_fingerprint(root: Path) -> None:
    before = opened(root)
    write_pair(root, "train", "a", np.array([[1, 1, 1, 1]], np.uint8))
    after = opened(root)
    assert before.fingerprint("val") == after.fingerprint("val")
    assert before.fingerprint("train") != after.fingerprint("train")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"confidence": 1.1}, "confidence=1.1: give a probability, 0 to 1"),
        ({"confidence": float("nan")}, "confidence=nan"),
        ({"holdout": 1.0}, "holdout=1.0: give a share, 0 to below 1"),
        ({"holdout": -0.1}, "holdout=-0.1"),
    ],
)
def test_bad_options(changes: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayoutOptions(**changes)
    assert str(caught.value).startswith(line)
