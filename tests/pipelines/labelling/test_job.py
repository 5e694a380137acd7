"""Labelling from end to end: real files, a real S3 server, and a real Ray in the job that a user starts."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.label_table.ledger import Ledger, Plan
from pipelines.label_table.schema import MASKS, Paths
from pipelines.labelling import job as labelling
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.labelling.lease import Holder
from pipelines.labelling.stages.chunks import RunContext
from pipelines.process.config_tree import build
from pipelines.storage import open_store
from pipelines.storage.arrow import metadata_of
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images import run_lengths
from pspnet_core.images.decoding import decode_mask
from pspnet_core.inference.segmenter import Segmenter
from tests.support.labelfiles import substance
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("stages_here")

IMAGES, CHUNK = 13, 4


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(draw_scene(seed, width=width, height=height)[0])


def fill(folder: Path) -> Path:
    """A folder of good images in subfolders, with a file that is no image beside them."""
    for index in range(IMAGES):
        place = folder / f"camera-{index % 2}" / f"{index:02d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(scene(index, 64 + 8 * (index % 3)), "JPEG"))
    (folder / "notes.txt").write_text("not an image")
    return folder


def make_config(**changes: Any) -> LabelConfig:
    defaults: dict[str, Any] = {"chunk": CHUNK, "date": "2026-01-31", "mask": "both", "local": True}
    return build(LabelConfig, defaults | changes)


def configs(bucket: Path, output: Path, model: Path) -> Callable[..., LabelConfig]:
    """Makes configs for a bucket, an output and a model; each may be overridden, as all fields may."""
    return partial(make_config, input=str(bucket), output=str(output), model=str(model))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A bucket, the labels of one undisturbed run over it, and that run's result."""

    bucket: Path
    labels: Path
    result: dict[str, Any]
    config: Callable[..., LabelConfig]

    @property
    def record(self) -> Path:
        return self.labels / "runs" / f"{self.result['run_id']}.json"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, scene_model: Path) -> Finished:
    """Made once; tests that change something take a copy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = configs(fill(folder / "bucket"), folder / "labels", scene_model)
    result = label(config())
    return Finished(bucket=folder / "bucket", labels=folder / "labels", result=result, config=config)


@pytest.fixture
def finished(undisturbed: Finished, tmp_path: Path, scene_model: Path) -> Finished:
    """The undisturbed run, its labels in a folder of the test's own (the bucket is shared: it must stay as it is)."""
    shutil.copytree(undisturbed.labels, tmp_path / "labels")
    config = configs(undisturbed.bucket, tmp_path / "labels", scene_model)
    return Finished(bucket=undisturbed.bucket, labels=tmp_path / "labels", result=undisturbed.result, config=config)


def rows(labels: str) -> list[dict[str, Any]]:
    found = duckdb.sql(f"FROM read_parquet('{labels}') ORDER BY key")
    assert found is not None
    table: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
    return table


def files_below(folder: Path) -> dict[str, bytes]:
    visible = (path for path in folder.rglob("*") if path.is_file() and "/." not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in visible}


def test_every_image_gets_the_mask_that_the_segmenter_gives(undisturbed: Finished, scene_model: Path) -> None:
    result, bucket = undisturbed.result, undisturbed.bucket
    assert (result["images"], result["labelled"], result["skipped"], result["errors"]) == (IMAGES, IMAGES, 0, 0)
    segmenter = Segmenter.load(scene_model)
    table = rows(result["labels"])
    assert [row["key"] for row in table] == sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*.jpg"))
    files = [Path(row["uri"]) for row in table]
    # Chunk by chunk: which images share a forward pass decides the last bits.
    predictions = [each for start in range(0, IMAGES, CHUNK) for each in segmenter(files[start : start + CHUNK])]
    for row, (mask, confidence) in zip(table, predictions, strict=True):
        classes, lengths = np.array(row["mask_classes"]), np.array(row["mask_lengths"])
        stored = run_lengths.decode(classes, lengths, row["height"], row["width"])
        np.testing.assert_array_equal(stored, mask)
        np.testing.assert_array_equal(decode_mask(row["mask_png"]), stored)
        assert row["confidence"] == pytest.approx(confidence.mean(), rel=1e-4)
        check_statistics(row["class_stats"], stored)
        assert (row["status"], row["error"]) == ("ok", None)


def check_statistics(statistics: list[dict[str, Any]], mask: Any) -> None:
    ids, pixels = np.unique(mask, return_counts=True)
    assert [entry["class_id"] for entry in statistics] == ids.tolist()
    assert [entry["pixels"] for entry in statistics] == pixels.tolist()
    assert [entry["name"] for entry in statistics] == [SCENE_CLASSES.names[index] for index in ids]
    assert sum(entry["fraction"] for entry in statistics) == pytest.approx(1.0)


def test_a_file_explains_itself(undisturbed: Finished, scene_model: Path) -> None:
    checkpoint = load_checkpoint(scene_model)
    folder = undisturbed.labels / "masks" / f"model={checkpoint.partition}" / "dt=2026-01-31"
    files = sorted(folder.glob("*.parquet"))
    assert [file.name for file in files] == [f"000000-00000{chunk}.parquet" for chunk in range(4)]
    opened = pq.ParquetFile(files[0])
    assert opened.schema_arrow.remove_metadata() == MASKS
    content = metadata_of(opened)
    assert content["fingerprint"] == checkpoint.fingerprint
    assert content["model"] == str(scene_model)
    assert content["run_id"] == undisturbed.result["run_id"]
    assert content["classes"] == SCENE_CLASSES.to_json()


def test_what_belongs_to_the_end_of_a_run(undisturbed: Finished) -> None:
    record = json.loads(undisturbed.record.read_text())
    assert (record["images"], record["labelled"], record["errors"], record["chunks"]) == (IMAGES, IMAGES, {}, 4)
    totals = duckdb.execute(
        "SELECT s.class_id, count(*), sum(s.pixels)::BIGINT FROM (SELECT unnest(class_stats) AS s FROM read_parquet(?))"
        " GROUP BY 1 ORDER BY 1",
        [undisturbed.result["labels"]],
    ).fetchall()
    written = duckdb.execute(
        "SELECT class_id, images, pixels FROM read_parquet(?) WHERE pixels > 0 ORDER BY 1",
        [str(undisturbed.labels / "class_stats/*/*/*.parquet")],
    ).fetchall()
    assert written == totals
    classes = str(undisturbed.labels / "classes/*/*.parquet")
    assert duckdb.execute("SELECT name, r, g, b FROM read_parquet(?)", [classes]).fetchall() == [
        (name, *color) for name, color in zip(SCENE_CLASSES.names, SCENE_CLASSES.colors, strict=True)
    ]


def test_a_second_run_does_nothing(finished: Finished) -> None:
    before = files_below(finished.labels)
    again = label(finished.config(date="2026-02-01"))
    assert (again["images"], again["labelled"], again["skipped"], again["errors"]) == (IMAGES, 0, IMAGES, 0)
    assert files_below(finished.labels) == before


def test_new_changed_and_deleted_images(tmp_path: Path, scene_model: Path) -> None:
    """Two nights on a bucket that changes, the first of which is killed after it made its plan."""
    bucket = fill(tmp_path / "bucket")
    config = configs(bucket, tmp_path / "labels", scene_model)
    first = label(config())
    checkpoint = load_checkpoint(scene_model)
    ledger = Ledger(open_store(str(tmp_path / "labels"), field="output"), Paths(partition=checkpoint.partition))
    plan = ledger.latest_plan()
    assert plan is not None
    next((tmp_path / "labels").glob("masks/*/*/*-000000.parquet")).unlink()
    (tmp_path / "labels" / "runs" / f"{first['run_id']}.json").unlink()
    changed, deleted = ledger.read_chunk(plan, 0)["uri"].to_pylist()[:2]
    Path(changed).write_bytes(encoded(scene(50), "JPEG"))
    Path(deleted).unlink()
    (bucket / "new.png").write_bytes(encoded(scene(100), "PNG"))
    again = label(config(date="2026-02-01"))
    table = rows(again["labels"])
    errors = {row["uri"]: row["error"].split(":")[0] for row in table if row["status"] == "error"}
    assert errors == {changed: "Changed", deleted: "Missing"}
    # One plan was finished with its own date, another made for what is new: the changed image and the added one.
    later = {row["uri"] for row in table if row["dt"] == datetime.date(2026, 2, 1)}
    assert later == {changed, str(bucket / "new.png")}
    assert len(table) == len({(row["uri"], row["etag"]) for row in table}) == IMAGES + 2
    assert again["images"] == again["labelled"] + again["skipped"] + again["errors"]


def bad_files() -> dict[str, tuple[bytes, str | None]]:
    """File name -> content and the error kind expected, or None where a label is."""
    whole = encoded(scene(1), "JPEG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    wide = scene(2, 96, 32)
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64))
    frames = [scene(3), scene(4)]
    return {
        "zero.jpg": (b"", "Empty"),
        "truncated.jpg": (whole[: len(whole) // 2], "Truncated"),
        "text.png": (b"<html>not here</html>", "Unreadable"),
        "bomb.png": (encoded(Image.new("1", (20000, 20000)), "PNG"), "TooLarge"),
        "cmyk.jpg": (encoded(scene(1).convert("CMYK"), "JPEG"), None),
        "grey16.png": (encoded(grey16, "PNG"), None),
        "palette.png": (encoded(scene(1).convert("P"), "PNG"), None),
        "grey.jpg": (encoded(scene(1).convert("L"), "JPEG"), None),
        "alpha.png": (encoded(scene(1).convert("RGBA"), "PNG"), None),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "rotated.jpg": (encoded(wide, "JPEG", exif=rotated), None),
        "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), None),
    }


def test_bad_input_becomes_rows(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name, (content, _) in bad_files().items():
        (tmp_path / "bad" / name).write_bytes(content)
    config = finished.config(input=str(tmp_path / "bad"), output=str(tmp_path / "labels-of-bad"))
    result = label(config)
    expected = {name: kind for name, (_, kind) in bad_files().items()}
    table = {row["key"]: row for row in rows(result["labels"])}
    assert {key: row["error"] and row["error"].split(":")[0] for key, row in table.items()} == expected
    assert result["errors"] == sum(kind is not None for kind in expected.values())
    assert result["labelled"] == len(expected) - result["errors"]
    for row in table.values():
        if row["status"] == "ok":
            assert sum(row["mask_lengths"]) == row["width"] * row["height"]
        else:
            assert row["mask_lengths"] is row["class_stats"] is row["width"] is row["confidence"] is None
    assert (table["rotated.jpg"]["width"], table["rotated.jpg"]["height"]) == (32, 96)
    assert label(config)["skipped"] == len(expected)  # error rows count as done
    record = json.loads((Path(config.output) / "runs" / f"{result['run_id']}.json").read_text())
    assert record["errors"] == {kind: 1 for kind in expected.values() if kind}


@pytest.mark.parametrize("lost", [["record"], ["record", "statistics"], ["record", "statistics", "masks"]])
def test_every_state_a_killed_run_leaves_is_finished_to_the_same_bytes(finished: Finished, lost: list[str]) -> None:
    """A run writes plan, chunks in any order, statistics, record: take away what a kill would have left undone."""
    whole = files_below(finished.labels)
    record = str(finished.record.relative_to(finished.labels))
    chunks = [path for path in whole if path.startswith("masks/")][1::2] if "masks" in lost else []
    statistics = [path for path in whole if path.startswith("class_stats/")] if "statistics" in lost else []
    for path in (*chunks, *statistics, record):
        (finished.labels / path).unlink()
    again = label(finished.config(date="2026-02-01", chunk=3, mask="png"))  # the plan's date, chunks and masks hold
    after = files_below(finished.labels)
    assert again["run_id"] == finished.result["run_id"]
    assert again["images"] == IMAGES
    assert set(after) == set(whole)
    # Times are in the record, and in the footers of label files.
    assert {path: substance(whole[path]) for path in chunks} == {path: substance(after[path]) for path in chunks}
    assert {path for path in whole if after[path] != whole[path]} <= {record, *chunks}


JOB = [sys.executable, "jobs/label.py"]


def test_two_drivers_at_once_and_one_killed_leave_one_row_per_image(finished: Finished, tmp_path: Path) -> None:
    made = finished.config(chunk=1, output=str(tmp_path / "contested"))
    flags = [f"--{key}={getattr(made, key)}" for key in ("input", "output", "model", "date", "chunk")]
    flags += ["--wait=false", "--local"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*JOB, *flags], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    drivers = [start(), start()]
    while not list(Path(made.output).glob("masks/*/*/*.parquet")):
        assert any(driver.poll() is None for driver in drivers), [driver.communicate() for driver in drivers]
        time.sleep(0.05)  # between looks; the test waits for the event itself
    drivers[0].send_signal(signal.SIGKILL)
    outputs = [driver.communicate(timeout=240) for driver in drivers]
    assert drivers[1].returncode == 0, outputs[1][1]
    line = json.loads(outputs[1][0].splitlines()[-1])
    assert line["images"] == line["labelled"] + line["skipped"] + line["errors"] == IMAGES
    table = rows(line["labels"])
    assert len(table) == len({(row["uri"], row["etag"]) for row in table}) == IMAGES
    assert label(made)["skipped"] == IMAGES
    plans = list(Path(made.output).glob("plans/*/*.parquet"))
    assert len(plans) == 1


def test_chunks_under_way_outlast_an_output_that_is_away_for_two_minutes(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[RunContext] = []

    class Stop(Exception):
        pass

    def read(context: RunContext, plan: Plan) -> None:
        found.append(context)
        raise Stop

    monkeypatch.setattr(labelling, "Read", read)
    with pytest.raises(Stop):
        label(finished.config(output=str(tmp_path / "away")))
    output, retries = found[0].output, found[0].output.retries
    assert (output.root, output.field) == (str(tmp_path / "away"), "output")
    assert sum(min(retries.first_wait * 2**done, retries.longest_wait) for done in range(retries.attempts - 1)) >= 120


def test_a_run_takes_over_from_one_that_was_killed_and_waits_for_nobody_if_told(finished: Finished) -> None:
    """Leases are told apart by what they say of their holder."""
    lease = finished.labels / Paths(partition=load_checkpoint(Path(finished.config().model)).partition).lease
    here = Holder.here()
    for holder, left in ((replace(here, started=0.0), False), (replace(here, machine="far-away"), True)):
        lease.parent.mkdir(exist_ok=True)
        lease.write_text(json.dumps(asdict(holder)))
        assert label(finished.config(wait=False))["skipped"] == IMAGES
        assert lease.exists() is left


def test_a_run_that_waited_for_another_one_labels_what_is_new_by_then(
    tmp_path: Path, scene_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configs(fill(tmp_path / "bucket"), tmp_path / "out", scene_model)()
    partition = load_checkpoint(scene_model).partition
    lease = tmp_path / "out" / Paths(partition=partition).lease
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps(asdict(replace(Holder.here(), machine="far-away"))))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(label, config)
        until(lambda: "waiting for another run" in caplog.text)
        assert not list((tmp_path / "out").glob("plans/*/*"))
        (tmp_path / "bucket" / "late.png").write_bytes(encoded(scene(99), "PNG"))
        lease.unlink()
        assert waiting.result(timeout=240)["labelled"] == IMAGES + 1
    assert not lease.exists()


def test_the_job_on_s3_from_flags_to_sql(s3_bucket: str, undisturbed: Finished, scene_model: Path) -> None:
    """The script as a user starts it, with a Ray of its own that inherits the credentials."""
    store = open_store(s3_bucket, field="input")
    for path in undisturbed.bucket.rglob("*.jpg"):
        store.put_if_absent(f"in put/{path.relative_to(undisturbed.bucket)}", path.read_bytes())
    for path in scene_model.iterdir():
        store.put_if_absent(f"model/{path.name}", path.read_bytes())
    flags = [
        f"--input={s3_bucket}/in put",
        f"--output={s3_bucket}/labels",
        f"--model={s3_bucket}/model",
        "--chunk=5",
        "--local=false",
    ]
    job = subprocess.run([*JOB, *flags], env=os.environ | {"RAY_ADDRESS": "local"}, text=True, capture_output=True)
    assert job.returncode == 0, job.stderr
    result = json.loads(job.stdout)
    assert (result["images"], result["labelled"], result["errors"]) == (IMAGES, IMAGES, 0)
    connection = duckdb.connect()
    connection.register_filesystem(store.filesystem)
    found = connection.execute(
        "SELECT count(*), count(DISTINCT (uri, etag)), min(uri), min(dt) FROM read_parquet(?)", [result["labels"]]
    ).fetchone()
    assert found is not None
    assert found[:3] == (IMAGES, IMAGES, f"{s3_bucket}/in put/camera-0/00.jpg")
    assert abs(datetime.datetime.now(datetime.timezone.utc).date() - found[3]) <= datetime.timedelta(days=1)
    again = make_config(input=f"{s3_bucket}/in put", output=f"{s3_bucket}/labels", model=f"{s3_bucket}/model")
    assert label(again)["skipped"] == IMAGES


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": "/nowhere/at/all"}, "input"),
        ({"model": "/nowhere/at/all"}, "model"),
        ({"model": "models:/nobody@newest"}, "model"),
        ({"output": "https://example.invalid/labels"}, "output"),
        ({"output": "memory://labels"}, "output"),
    ],
)
@pytest.mark.usefixtures("tracking_home")
def test_mistakes_are_told_in_one_line_before_anything_is_written(
    undisturbed: Finished, changes: dict[str, str], field: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        label(undisturbed.config(**({"output": str(tmp_path / "labels")} | changes)))
    assert str(caught.value).startswith(f"{field}=")
    assert "\n" not in str(caught.value)
    assert not files_below(tmp_path / "labels")


def test_an_empty_input_is_told(undisturbed: Finished, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        label(undisturbed.config(input=str(tmp_path / "empty"), output=str(tmp_path / "labels")))
    assert not files_below(tmp_path / "labels")


BAD_FLAGS = {"chunk": 0, "mask": "jpeg", "workers": "4:1", "date": "tomorrow", "source": "x", "max_pixels": -1}


@pytest.mark.parametrize("field", BAD_FLAGS)
def test_bad_flags(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}="):
        make_config(**({"input": "a", "output": "b", "model": "c"} | {field: BAD_FLAGS[field]}))


def test_one_process_has_no_workers() -> None:
    with pytest.raises(ConfigError, match=r"^local=True: has one worker, on CPUs; leave out --workers and --gpus$"):
        make_config(input="a", output="b", model="c", workers="2")


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_holds(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^workers=1000: the cluster has"):
        label(finished.config(workers="1000", local=None, output=str(tmp_path / "crowded")))


def test_wrong_credentials_are_told(s3_bucket: str, undisturbed: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigError, match=r"^input=") as caught:
        label(undisturbed.config(input=s3_bucket))
    assert "wrong" not in str(caught.value).replace("wrong credentials", "")


def test_a_missing_bucket_is_told(s3_bucket: str, undisturbed: Finished) -> None:
    with pytest.raises(ConfigError, match=f"^input={s3_bucket}-not-there"):
        label(undisturbed.config(input=f"{s3_bucket}-not-there"))
