"""What a run record says that a plan took, whoever carried it out."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.storage.arrow import metadata_of, to_parquet
from tests.support.labeljob import make_config, put_scene, record_of

pytestmark = pytest.mark.usefixtures("stages_here")

IMAGES, CHUNKS = 5, 3
STAGES = ("read", "segment", "decode", "predict", "encode")


@pytest.fixture
def config(tmp_path: Path, scene_model: Path) -> LabelConfig:
    """Five images, the last of which is none, in three chunks."""
    for index in range(IMAGES - 1):
        put_scene(tmp_path / "bucket" / f"{index}.jpg", index)
    (tmp_path / "bucket" / "4.jpg").write_bytes(b"no image")
    return make_config(tmp_path, scene_model, chunk=2, price_cpu=3.6)


def label_files(config: LabelConfig) -> list[Path]:
    return sorted(Path(config.output).glob("masks/*/*/*.parquet"))


def taken(file: Path) -> Any:
    return metadata_of(pq.ParquetFile(file))["totals"]


def finished(config: LabelConfig) -> dict[str, Any]:
    """The record of the run that is finished now."""
    return record_of(config, label(config))


def test_the_record_is_that_of_the_whole_plan_whoever_did_what(config: LabelConfig) -> None:
    first = finished(config)
    before = [taken(file) for file in label_files(config)]
    # As if the command had been killed before it wrote one of its label files.
    label_files(config)[1].unlink()
    next(Path(config.output).glob("runs/*.json")).unlink()
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


@pytest.mark.parametrize("totals", [None, {"images": "many"}, {"grapes": 3}, {"labelled": {"x": 1}}])
def test_a_label_file_of_somebody_else_costs_no_more_than_its_totals(
    config: LabelConfig, caplog: pytest.LogCaptureFixture, totals: dict[str, Any] | None
) -> None:
    finished(config)
    first = label_files(config)[0]
    rows = pq.read_table(first).replace_schema_metadata(None)
    first.write_bytes(to_parquet(rows, metadata=totals and {"totals": totals}))
    next(Path(config.output).glob("runs/*.json")).unlink()
    record = finished(config)
    assert (record["labelled"], record["errors"]) == (IMAGES - 1, {"Unreadable": 1})
    assert any(line.startswith("what a chunk took is not known") for line in caplog.messages)
