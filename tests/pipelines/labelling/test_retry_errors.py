"""Error rows that are tried again, and runs that stop because too much fails."""

import http.server
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.scenes import draw_scene
from pipelines.label_table.ledger import Ledger
from pipelines.label_table.schema import Paths
from pipelines.labelling import course
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import LabellingFailed, label
from pipelines.labelling.retry_errors import find_failed
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images import run_lengths
from tests.pipelines.storage.test_storage import serving

pytestmark = pytest.mark.usefixtures("stages_here")

SMALL, LARGE = (64, 48), (96, 64)
ONLY_SMALL = SMALL[0] * SMALL[1]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that lets nobody read anything."""

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        pass


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(draw_scene(seed, width=size[0], height=size[1])[0]).save(buffer, "JPEG")
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Night:
    """A bucket whose large images were too large for the first run; the third of nine is no image at all."""

    config: LabelConfig
    result: dict[str, Any]

    def rows(self) -> dict[str, dict[str, Any]]:
        found = duckdb.sql("FROM read_parquet(?)", params=[self.result["labels"]])
        assert found is not None
        table: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
        assert len(table) == len({row["uri"] for row in table})
        return {row["key"]: row for row in table}

    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            (Path(self.config.output) / "runs" / f"{self.result['run_id']}.json").read_text()
        )
        return content

    def statistics(self) -> list[Any]:
        query = "SELECT class_id, images, pixels, fraction FROM read_parquet(?) ORDER BY 1"
        return duckdb.execute(query, [f"{self.config.output}/class_stats/*/*/*.parquet"]).fetchall()


@pytest.fixture
def make_night(tmp_path: Path, scene_model: Path) -> Callable[..., Night]:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    for index in range(9):
        content = b"no image" if index == 2 else jpeg(index, LARGE if index % 4 == 0 else SMALL)
        (bucket / f"{index}.jpg").write_bytes(content)

    def make(output: str, **changes: Any) -> Night:
        fixed: dict[str, Any] = {
            "input": str(bucket),
            "model": str(scene_model),
            "chunk": 4,
            "date": "2026-01-31",
            "local": True,
        }
        config = LabelConfig(output=str(tmp_path / output), **(fixed | changes))
        return Night(config=config, result=label(config))

    return make


def test_what_failed_is_labelled_and_nothing_else_is_touched(make_night: Callable[..., Night]) -> None:
    night, undisturbed = make_night("labels", max_pixels=ONLY_SMALL), make_night("whole")
    before = night.rows()
    assert night.result["errors"] == 4
    assert {key for key, row in before.items() if (row["error"] or "").startswith("TooLarge")} == {
        "0.jpg",
        "4.jpg",
        "8.jpg",
    }
    again = label(replace(night.config, max_pixels=10**6, retry_errors=("TooLarge",), date="2026-02-01", chunk=2))
    assert (again["images"], again["labelled"], again["skipped"], again["errors"]) == (3, 3, 0, 0)
    after, whole = night.rows(), undisturbed.rows()
    assert after.keys() == whole.keys()
    for key, row in after.items():
        if key in ("0.jpg", "4.jpg", "8.jpg"):
            assert (row["run_id"], row["labelled_at"]) == (before[key]["run_id"], before[key]["labelled_at"])
            assert (row["status"], row["error"], row["dt"]) == ("ok", None, whole[key]["dt"])
            masks = [
                run_lengths.decode(
                    np.array(each["mask_classes"]), np.array(each["mask_lengths"]), each["height"], each["width"]
                )
                for each in (row, whole[key])
            ]
            # Batches of other sizes round differently in the last bit, which may flip a pixel on the edge.
            assert (masks[0] == masks[1]).mean() > 0.999
        else:
            assert row == before[key]
    assert night.record()["errors"] == undisturbed.record()["errors"] == {"Unreadable": 1}
    assert night.record()["labelled"] == 8
    counted = Counter(
        {entry["class_id"]: entry["pixels"] for row in after.values() for entry in row["class_stats"] or ()}
    )
    assert {class_id for class_id, images, *_ in night.statistics() if images} == set(counted)
    assert sum(pixels for _, _, pixels, _ in night.statistics()) == 5 * ONLY_SMALL + 3 * LARGE[0] * LARGE[1]
    assert label(replace(night.config, retry_errors=("TooLarge",)))["images"] == 0
    assert label(night.config)["skipped"] == 9


def test_what_fails_again_tells_how_often(make_night: Callable[..., Night]) -> None:
    night = make_night("labels")
    for attempt in (2, 3):
        again = label(replace(night.config, retry_errors=("all",)))
        assert (again["images"], again["labelled"], again["errors"]) == (1, 0, 1)
        assert night.rows()["2.jpg"]["error"].endswith(f"(attempt {attempt})")
    assert night.record()["errors"] == {"Unreadable": 1}


def test_the_file_keeps_what_explains_it(make_night: Callable[..., Night]) -> None:
    night = make_night("labels", max_pixels=ONLY_SMALL)
    files = sorted(Path(night.config.output).glob("masks/*/*/*.parquet"))
    before = [pq.read_schema(file) for file in files]
    label(replace(night.config, max_pixels=10**6, retry_errors=("all",)))
    for file, schema in zip(files, before, strict=True):
        after = pq.ParquetFile(file)
        assert after.schema_arrow.equals(schema, check_metadata=True)
        assert after.num_row_groups == 1
    assert sorted(Path(night.config.output).glob("masks/*/*/*.parquet")) == files


def test_statistics_that_a_killed_replay_left_behind_are_brought_up(make_night: Callable[..., Night]) -> None:
    night = make_night("labels", max_pixels=ONLY_SMALL)
    record = Path(night.config.output) / "runs" / f"{night.result['run_id']}.json"
    (statistics,) = Path(night.config.output).glob("class_stats/*/*/*.parquet")
    stale = {path: path.read_bytes() for path in (record, statistics)}
    label(replace(night.config, max_pixels=10**6, retry_errors=("TooLarge",)))
    fresh = night.statistics(), night.record()
    for path, content in stale.items():
        assert path.read_bytes() != content
        path.write_bytes(content)
    label(replace(night.config, retry_errors=("TooLarge",)))
    assert (night.statistics(), night.record()) == fresh


def test_only_the_chosen_kinds_are_found(make_night: Callable[..., Night], scene_model: Path) -> None:
    night = make_night("labels", max_pixels=ONLY_SMALL)
    paths = Paths(partition=load_checkpoint(scene_model).partition)
    ledger = Ledger(open_store(night.config.output, field="output"), paths)
    found = {
        kinds: [file.rows for file in find_failed(ledger, kinds)]
        for kinds in [("TooLarge",), ("Unreadable",), ("TooLarge", "Unreadable"), ("all",), ("Missing",)]
    }
    assert found == {
        ("TooLarge",): [1, 1, 1],
        ("Unreadable",): [1],
        ("TooLarge", "Unreadable"): [2, 1, 1],
        ("all",): [2, 1, 1],
        ("Missing",): [],
    }


def test_what_may_not_be_read_is_rows_however_much_it_is(make_night: Callable[..., Night], tmp_path: Path) -> None:
    """All images of a chunk, and again when they are tried again."""
    with serving(Refusing) as root:
        lines = [f"{root}/{index}.jpg,of-old,9" for index in range(3)]
        (tmp_path / "list.csv").write_text("\n".join(["uri,etag,bytes", *lines]))
        night = make_night("labels", input=str(tmp_path / "list.csv"), source="manifest", allow=(root,))
        assert (night.result["images"], night.result["errors"]) == (3, 3)
        again = label(replace(night.config, retry_errors=("Denied",)))
    assert (again["images"], again["labelled"], again["errors"]) == (3, 0, 3)
    for row in night.rows().values():
        assert row["error"].startswith("Denied: may not read http://")
        assert row["error"].endswith("(attempt 2)")


def test_too_many_errors_end_the_run_and_keep_what_is_done(
    make_night: Callable[..., Night], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "ENOUGH_TO_JUDGE", 4)
    images = 150
    (tmp_path / "strange").mkdir()
    for index in range(images):
        (tmp_path / "strange" / f"{index:03d}.jpg").write_bytes(b"no image")
    flags = {"input": str(tmp_path / "strange"), "chunk": 1}
    with pytest.raises(LabellingFailed, match=r"cannot be labelled \(Unreadable \d"):
        make_night("labels", **flags, max_errors=0.9)
    written = list((tmp_path / "labels").glob("masks/*/*/*.parquet"))
    assert 4 <= len(written) < images
    assert not (tmp_path / "labels" / "runs").exists()
    kept = {path: path.read_bytes() for path in written}
    night = make_night("labels", **flags)
    assert len(night.rows()) == night.result["images"] == images
    assert (night.result["errors"], night.result["skipped"]) == (images - len(written), len(written))
    assert {path: path.read_bytes() for path in written} == kept
    assert night.record()["errors"] == {"Unreadable": images}


@pytest.mark.parametrize(
    "change", [{"max_errors": 1.5}, {"max_errors": -0.1}, {"retry_errors": ()}, {"retry_errors": ("Mising",)}], ids=str
)
def test_bad_flags(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(ConfigError, match=f"^{field}="):
        LabelConfig(input="a", output="b", model="c", **change)
