"""Each poison of ``tests/support/dataset_poisons.py`` among good neighbours, as training and packing begin."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipelines.datasets.data_card import DataCard
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.packing import PrepareConfig, prepare
from pipelines.process.config_tree import build
from pipelines.storage import open_store
from pipelines.training import job
from pipelines.training.config import TrainConfig
from pspnet_core.errors import ConfigError, PspnetError
from tests.support.dataset_poisons import POISONS, Ground, Ids
from tests.support.packing import in_process

FLAGS = {"backbone": "resnet18", "output_stride": 32, "bins": 1, "crop": 16, "batch": 2}
Start = Callable[[dict[str, Any]], "str | dict[str, Ids]"]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Starts ``jobs/train.py``: what it refuses the data with (exit code 2), or else the pairs that it begins with."""
    begun: dict[str, Ids] = {}

    def set_up(config: TrainConfig, dataset: Dataset, card: DataCard) -> None:
        for pair in (*dataset.split(config.train), *dataset.split(config.val)):
            begun[f"{pair.split}/{pair.key}"] = dataset.read(pair)[1].tolist()
        raise PspnetError("begun")

    def run(flags: dict[str, Any]) -> str | dict[str, Ids]:
        begun.clear()
        code = main(TrainConfig, job.train, [f"--{name}={value}" for name, value in flags.items()])
        line = capsys.readouterr().err.splitlines()[-1]
        assert (code, line) == (1, "error: begun") if begun else code == 2, line
        return dict(begun) or line

    monkeypatch.setattr(job, "set_up", set_up)
    return run


@pytest.mark.parametrize("name", POISONS)
def test_a_poison_is_told_or_taken(name: str, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout, plant = POISONS[name]
    ground = Ground(open_store(f"{tmp_path}/data", field="data"), layout)
    ground.neighbours()
    told = plant(ground)
    ground.finish()
    flags: dict[str, Any] = (
        FLAGS | {"data": f"{tmp_path}/data", "layout": layout, "output": f"{tmp_path}/runs"} | told.flags
    )
    flags |= {"absent_classes": True} if layout not in ("folder", "list") else {}  # two classes of those built in
    splits = ("train", flags.get("val", "val"))
    pairs = {key: mask for key, mask in (ground.masks | told.masks).items() if key.startswith(splits)}
    check(start(flags), told.error, pairs)
    assert re.search(told.warning, caplog.text, re.MULTILINE), caplog.text
    # What is packed leads to the same, unless packing is told or leaves the pair out.
    packing = {name: flags[name] for name in ("data", "layout")} | {"output": f"{tmp_path}/packed"}
    error = told.packing or told.error
    try:
        result = prepare(build(PrepareConfig, packing), in_process)
    except ConfigError as refusal:
        check(f"error: {refusal}", error, {})
        return
    shards = flags | {"data": f"{tmp_path}/packed", "layout": "shards"}
    check(start(shards), "" if result["rejected"] else error, ground.masks if result["rejected"] else pairs)
    assert not (told.silence and re.search(told.silence, caplog.text)), caplog.text


def check(found: str | dict[str, Ids], error: str, pairs: dict[str, Ids]) -> None:
    """Compare with the error that is to be told, or where there is none with the pairs."""
    if error:
        assert isinstance(found, str) and re.search(f"^error: .*{error}", found), found
    else:
        assert found == pairs
