"""What a run record says that a plan took, whoever carried it out."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.scenes import draw_scene
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.storage.arrow import metadata_of

pytestmark = pytest.mark.usefixtures("stages_here")

IMAGES, CHUNKS = 5, 3
STAGES = ("read", "segment", "decode", "predict", "encode")


@pytest.fixture
def config(tmp_path: Path, scene_model: Path) -> LabelConfig:
    """Five images, the last of which is none, in three chunks."""
    (tmp_path / "bucket").mkdir()
    for index in range(IMAGES):
        buffer = BytesIO(b"no image")
        if index < IMAGES - 1:
            Image.fromarray(draw_scene(index, width=64, height=48)[0]).save(buffer, "JPEG")
        (tmp_path / "bucket" / f"{index}.jpg").write_bytes(buffer.getvalue())
    return LabelConfig(
        input=str(tmp_path / "bucket"),
        output=str(tmp_path / "labels"),
        model=str(scene_model),
        chunk=2,
        price_cpu=3.6,
        local=True,
    )


def label_files(config: LabelConfig) -> list[Path]:
    return sorted(Path(config.output).glob("masks/*/*/*.parquet"))


def taken(file: Path) -> Any:
    return metadata_of(pq.ParquetFile(file))["totals"]


def finished(config: LabelConfig) -> dict[str, Any]:
    """The record of the run that is finished now."""
    run_id = label(config)["run_id"]
    record: dict[str, Any] = json.loads((Path(config.output) / "runs" / f"{run_id}.json").read_text())
    return record


def opened_again(config: LabelConfig, lost: Path) -> None:
    """As if the command had been killed before it wrote one of its label files."""
    lost.unlink()
    (record,) = Path(config.output).glob("runs/*.json")
    record.unlink()


def test_the_record_is_that_of_the_whole_plan_whoever_did_what(config: LabelConfig) -> None:
    first = finished(config)
    before = [taken(file) for file in label_files(config)]
    opened_again(config, label_files(config)[1])
    second = finished(config)
    after = [taken(file) for file in label_files(config)]
    assert len(after) == CHUNKS
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1] != before[1]
    for record, chunks in ((first, before), (second, after)):
        assert (record["images"], record["labelled"], record["errors"]) == (IMAGES, IMAGES - 1, {"Unreadable": 1})
        for clock in ("cpu", "wall"):
            seconds = record[f"{clock}_seconds"]
            assert seconds.keys() == {*STAGES, "write"}
            for stage in STAGES:
                assert seconds[stage] == round(sum(chunk[clock][stage] for chunk in chunks), 3) > 0
        spent = record["spent"]
        assert spent["images"] == IMAGES
        assert spent["bytes_read"] == sum(path.stat().st_size for path in Path(config.input).iterdir())
        held = sum(chunk["held"]["cpu"] for chunk in chunks)
        assert spent["cpu_seconds"] == round(held, 3)
        assert spent["cost"] == pytest.approx(held / 1000)
