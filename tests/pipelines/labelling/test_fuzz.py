"""Some rounds of damaged files beside good ones; ``make fuzz`` plays many, in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.process.config_tree import build
from tests.support.fuzzing import CONTAINERS, Found, Round, play

pytestmark = [pytest.mark.usefixtures("stages_here"), pytest.mark.filterwarnings("ignore")]


def _label_here(flags: Mapping[str, object]) -> tuple[dict[str, Any], int]:
    named = {name.replace("-", "_"): str(each) if isinstance(each, Path) else each for name, each in flags.items()}
    return label(build(LabelConfig, {**named, "local": True})), 0


@pytest.mark.parametrize(("source", "count"), [("images", 150), *((source, 14) for source in CONTAINERS)])
def test_damaged_files(source: str, count: int, tmp_path: Path, scene_model: Path) -> None:
    played, found = Round(number=0, seed=0, source=source, count=count), Found()
    play(played, tmp_path, scene_model, _label_here, found)
    assert found.kinds["ok"] >= 5
    assert found.kinds.total() - found.kinds["ok"] + found.damaged > 0  # what is damaged is noticed
