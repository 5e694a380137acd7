"""Packing end to end: what is written, what a second run makes of an interruption, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.datasets.data_card import check
from pipelines.datasets.dataset import Dataset, Pair, by_split
from pipelines.datasets.layouts import open_dataset
from pipelines.datasets.packing import PackingFailed, PrepareConfig, plan_shards, prepare
from pipelines.process.config_tree import build
from pipelines.storage import open_store
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import CAMVID
from pspnet_core.images.decoding import decode_mask
from tests.pipelines.datasets.test_dataset import CLASSES, write_pair
from tests.pipelines.datasets.test_layouts import build_ade20k
from tests.support.packing import in_process
from tests.support.paths import ROOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures of one colour are small; these are noise, so that they fill several shards of 1 MB."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "classes.json").write_text(json.dumps(CLASSES))
    for number in range(12):
        split = "train" if number < 9 else "val"
        write_pair(root, split, f"{number:02d}", np.full((5, 7), number % 2, np.uint8), colour=(20 * number, 0, 0))
        with (root / f"images/{split}/{number:02d}.jpg").open("ab") as file:
            file.write(bytes(300_000))  # what follows a JPEG's end is not looked at
    return root


def config(data: Path, output: Path, **changes: Any) -> PrepareConfig:
    return build(PrepareConfig, {"data": str(data), "output": str(output), "shard": 1} | changes)


def files(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and ".tmp" not in path.parts
    }


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_packed_is_what_was_there(data: Path, tmp_path: Path) -> None:
    result, card = prepare(config(data, tmp_path / "out")), str(tmp_path / "out/card.json")
    assert result == {"splits": {"train": 9, "val": 3}, "shards": 4, "rejected": 0, "leaks": 0, "card": card}
    source, packed = open_dataset(str(data), "folder"), open_dataset(str(tmp_path / "out"), "shards")
    assert packed.classes == source.classes
    assert (packed.blocks("train"), packed.blocks("val")) == ((3, 3, 3), (3,))
    for split in ("train", "val"):
        for before, after in zip(source.split(split), packed.split(split), strict=True):
            assert before.key == after.key
            assert source.fetch(before) == packed.fetch(after)
    written = json.loads(Path(card).read_bytes())
    assert written == check(source, (*source.split("train"), *source.split("val"))).to_json()
    assert "| road |" in (tmp_path / "out/card.md").read_text()


def test_a_run_that_broke_off_is_finished_by_the_same_command(data: Path, tmp_path: Path) -> None:
    write_pair(data, "train", "03", np.full((5, 7), 77, np.uint8))
    first = prepare(config(data, tmp_path / "out"), in_process)
    whole = files(tmp_path / "out")
    for name in ("card.json", "card.md", "classes.json", "index.parquet", "shards/000001.parquet"):
        (tmp_path / "out" / name).unlink()
    kept = (tmp_path / "out/shards/000000.parquet").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"card\.json: not there, .* run jobs/prepare\.py again with the same flags"):
        open_dataset(str(tmp_path / "out"), "shards")
    assert prepare(config(data, tmp_path / "out"), in_process) == first
    assert files(tmp_path / "out") == whole
    assert (tmp_path / "out/shards/000000.parquet").stat().st_mtime_ns == kept
    assert prepare(config(data, tmp_path / "out"), in_process) == first  # there is nothing left to do


def test_bad_pairs_are_rows_of_the_card(data: Path, tmp_path: Path) -> None:
    write_pair(data, "train", "01", np.full((5, 7), 77, np.uint8))
    write_pair(data, "train", "02", np.zeros((5, 7), np.uint8), size=(70, 50))
    (data / "images/val/10.jpg").write_bytes(b"no picture")
    (data / "images/val/11.jpg").write_bytes((data / "images/train/00.jpg").read_bytes())
    result = prepare(config(data, tmp_path / "out"), in_process)
    assert (result["splits"], result["rejected"], result["leaks"]) == ({"train": 7, "val": 2}, 3, 1)
    card = json.loads((tmp_path / "out/card.json").read_bytes())
    found = {row["file"]: (row["split"], row["key"], row["reason"]) for row in card["rejected"]}
    unreadable = found.pop(f"{data}/images/val/10.jpg")
    assert unreadable[:2] == ("val", "10")
    assert unreadable[2].startswith("cannot be read (Unreadable: ")
    assert found == {
        f"{data}/masks/train/01.png": ("train", "01", "holds id 77; the classes allow 0..1 and ignore 9"),
        f"{data}/masks/train/02.png": ("train", "02", "the mask is 7x5, its image 50x70; make them the same size"),
    }
    assert card["leaks"] == [{"splits": ["train", "val"], "keys": ["00", "11"]}]
    packed = open_dataset(str(tmp_path / "out"), "shards")
    assert [pair.key for pair in packed.split("val")] == ["09", "11"]
    assert check(packed, packed.split("train")).rejected == ()


def test_a_split_without_a_good_pair_is_refused(data: Path, tmp_path: Path) -> None:
    for key in ("09", "10", "11"):
        write_pair(data, "val", key, np.full((5, 7), 77, np.uint8))
    with pytest.raises(ConfigError, match=r"none of the 3 pairs of split val can be used; .*09\.png holds id 77"):
        prepare(config(data, tmp_path / "out"), in_process)
    assert not (tmp_path / "out/card.json").exists()


def test_a_split_without_labels_is_left_out(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(9, 12):
        write_pair(data, "val", f"{number:02d}", np.full((5, 7), 9, np.uint8))
    assert prepare(config(data, tmp_path / "out"), in_process)["splits"] == {"train": 9}
    told = "none of the 3 masks of split val holds a labelled pixel; remove it or label it"
    assert f"split val is left out: data={data}: {told}" in caplog.messages
    # The only labels are those of a pair that cannot be used, which packing finds.
    write_pair(data, "val", "10", np.zeros((5, 7), np.uint8), size=(70, 50))
    with pytest.raises(ConfigError, match=r"none of the 2 masks .* that can be used .*, and give an empty --output$"):
        prepare(config(data, tmp_path / "other"), in_process)


def test_another_input_or_size_into_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    prepare(config(data, tmp_path / "out"), in_process)
    before = files(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^output=.*: holds shards of 1 MB, not 2; give an empty folder"):
        prepare(config(data, tmp_path / "out", shard=2), in_process)
    write_pair(data, "train", "new", np.zeros((5, 7), np.uint8))
    with pytest.raises(ConfigError, match=rf"holds shards of {data} \(layout folder\) as it was listed then; give an"):
        prepare(config(data, tmp_path / "out"), in_process)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"out: holds shards that another version wrote \(format 1, now 2\); give an empty folder$"),
        ({"shard": "many"}, r"plan\.json: is no plan \(shard: .*integer.*\); give an empty folder$"),
    ],
)
def test_a_plan_of_another_sort_is_refused(change: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    prepare(config(data, tmp_path / "out"), in_process)
    plan = tmp_path / "out/plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_bytes()) | change))
    with pytest.raises(ConfigError, match=message):
        prepare(config(data, tmp_path / "out"), in_process)


def test_an_input_that_changes_meanwhile_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_dataset(str(data), "folder")
    later = replace(opened, splits={"train": opened.split("train")[:-1], "val": opened.split("val")})
    answers = iter([opened, later])
    monkeypatch.setattr("pipelines.datasets.layouts.open_dataset", lambda *_: next(answers))
    with pytest.raises(PackingFailed, match=r"changed while it was packed; empty .* and start again"):
        prepare(config(data, tmp_path / "out"), in_process)
    assert not (tmp_path / "out/card.json").exists()


def test_the_job_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    """In a process and a Ray of its own, whose tasks know the bucket's keys from the environment.

    Raw ids are class ids in the shards.
    """
    expected = build_ade20k(open_store(f"{s3_bucket}/data", field="data"))
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), f"--data={s3_bucket}/data", "--layout=ade20k"]
    done = subprocess.run(
        [*command, f"--output={s3_bucket}/out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result, card = json.loads(done.stdout.splitlines()[-1]), f"{s3_bucket}/out/card.json"
    assert result == {"splits": {"train": 2, "val": 1}, "shards": 2, "rejected": 0, "leaks": 0, "card": card}
    packed = open_dataset(f"{s3_bucket}/out", "shards")
    assert packed.classes.ids is None
    pairs = [pair for split in packed.splits.values() for pair in split]
    masks = {(pair.split, pair.key): decode_mask(bytes(packed.fetch(pair).mask)).tolist() for pair in pairs}
    assert masks == expected.masks


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/classes.json").write_text(json.dumps(CLASSES))
    with pytest.raises(ConfigError, match=r"^data=.*: no labelled images; expected images/train/\*\.jpg, masks/train"):
        prepare(config(tmp_path / "data", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"^shard=0: give a size in MB, 1 to 1024$"):
        config(tmp_path, tmp_path, shard=0)


SPLITS = st.dictionaries(st.sampled_from(["train", "val", "x"]), st.lists(st.integers(0, 50), min_size=1), min_size=1)


@given(SPLITS, st.integers(1, 100))
def test_shards_are_dealt_by_size(sizes: dict[str, list[int]], limit: int) -> None:
    pairs = [
        Pair(key=f"{number}", image="", mask="", split=split, bytes=size)
        for split, listed in sizes.items()
        for number, size in enumerate(listed)
    ]
    dataset = Dataset(store=open_store("/nowhere", field="data"), classes=CAMVID, splits=by_split(pairs))
    shards = plan_shards(dataset, limit)
    assert all(len({pair.split for pair in shard}) == 1 for shard in shards)
    for split in sizes:
        own = [shard for shard in shards if shard[0].split == split]
        assert tuple(pair for shard in own for pair in shard) == dataset.split(split)
        for shard, following in zip(own, [*own[1:], None], strict=True):
            total = sum(pair.bytes for pair in shard)
            assert total <= limit or len(shard) == 1
            assert following is None or total + following[0].bytes > limit  # full
