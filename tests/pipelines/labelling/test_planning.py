"""More images than one plan may hold: several plans in one run, and a run that breaks off between two of them."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pipelines.label_table import ledger
from pipelines.label_table.schema import Paths
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from tests.pipelines.labelling.test_job import encoded, scene

pytestmark = pytest.mark.usefixtures("stages_here")

IMAGES = 7


def rows(labels: str) -> list[tuple[Any, ...]]:
    query = "SELECT parse_filename(filename), key, run_id FROM read_parquet(?, filename = true) ORDER BY key"
    return duckdb.execute(query, [labels]).fetchall()


def test_a_run_carries_out_plans_until_nothing_is_pending(
    tmp_path: Path, scene_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PLAN_IMAGES", 5)
    monkeypatch.setattr(ledger, "PLAN_CHUNKS", 2)
    for number in range(IMAGES):
        path = tmp_path / "bucket" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(scene(number), "JPEG"))
    bucket, output = str(tmp_path / "bucket"), str(tmp_path / "labels")
    config = LabelConfig(input=bucket, output=output, model=str(scene_model), chunk=2, date="2026-01-31", local=True)
    result = label(config)
    assert (result["images"], result["labelled"], result["skipped"], result["errors"]) == (IMAGES, IMAGES, 0, 0)
    found = rows(result["labels"])
    names = ["000000-000000", "000000-000001", "000001-000000", "000001-000001"]
    assert [name.removesuffix(".parquet") for name, _, _ in found] == [names[number // 2] for number in range(IMAGES)]
    assert [key for _, key, _ in found] == [f"{number}.jpg" for number in range(IMAGES)]
    # A plan is a run of its own to readers: one record each, the last one's id in the result.
    records = [json.loads(path.read_text()) for path in (tmp_path / "labels/runs").iterdir()]
    assert sorted((record["plan"], record["images"]) for record in records) == [(0, 4), (1, 3)]
    assert {record["run_id"] for record in records} == {run_id for _, _, run_id in found}
    assert result["run_id"] == found[-1][2]

    # As if the run had been killed in the first plan: the next one finishes that, then makes the second.
    paths = Paths(partition=load_checkpoint(scene_model).partition)
    (first,) = (record["run_id"] for record in records if record["plan"] == 0)
    lost = [paths.run(first), paths.run(result["run_id"]), paths.plan(1), paths.chunk("2026-01-31", 0, 1)]
    for name in (*lost, *(paths.chunk("2026-01-31", 1, chunk) for chunk in range(2))):
        (tmp_path / "labels" / name).unlink()
    again = label(config)
    assert (again["images"], again["labelled"], again["skipped"]) == (IMAGES, 5, 2)
    assert [row[:2] for row in rows(again["labels"])] == [row[:2] for row in found]
    assert label(config)["skipped"] == IMAGES
