"""The demo's data: a labelled set, and a bucket in which some files are broken on purpose."""

from pathlib import Path

import pytest

from pipelines.datasets.layouts import open_dataset
from pipelines.demo.demo import DemoConfig, demo, draw_bucket, draw_dataset
from pipelines.demo.scenes import SCENE_CLASSES
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images.decoding import decode_image


def test_the_drawn_data_set_is_one(tmp_path: Path) -> None:
    draw_dataset(tmp_path, train=3, val=2, seed=5)
    dataset = open_dataset(str(tmp_path), "folder")
    assert dataset.classes == SCENE_CLASSES
    assert {name: len(pairs) for name, pairs in dataset.splits.items()} == {"train": 3, "val": 2}
    keys = [pair.key for pairs in dataset.splits.values() for pair in pairs]
    assert len(set(keys)) == 5  # no scene is in both splits


def test_the_bucket_holds_what_it_says(tmp_path: Path) -> None:
    broken = draw_bucket(tmp_path, images=3, seed=9)
    kinds = []
    for path in sorted(tmp_path.iterdir()):
        try:
            decode_image(path.read_bytes())
        except ImageError as error:
            kinds.append(error.kind)
    assert sorted(kinds) == ["Empty", "TooLarge", "Truncated", "Unreadable"]
    assert len(kinds) == broken
    assert len(list(tmp_path.iterdir())) == 3 + broken


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"^output="):
        demo(DemoConfig(output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
