"""Labelling from end to end: real files, a real S3 server, and a real Ray in the job that a user starts."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.label_table.ledger import Plan
from pipelines.label_table.schema import MASKS
from pipelines.labelling import job as labelling
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.labelling.lease import Holder
from pipelines.labelling.stages.chunks import RunContext
from pipelines.storage import open_store
from pipelines.storage.arrow import metadata_of
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images import run_lengths
from pspnet_core.images.decoding import decode_mask
from pspnet_core.inference.segmenter import Segmenter
from tests.support.labelfiles import substance
from tests.support.labeljob import encoded, ledger_of, make_config, put_scene, record_of, record_path, rows, scene, sql
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("stages_here")

IMAGES, CHUNK = 13, 4


def fill(folder: Path) -> Path:
    """A folder of good images in subfolders, with a file that is no image beside them."""
    for index in range(IMAGES):
        put_scene(folder / f"camera-{index % 2}" / f"{index:02d}.jpg", index, 64 + 8 * (index % 3))
    (folder / "notes.txt").write_text("not an image")
    return folder


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One undisturbed run: its bucket, its labels, its result, and what gives its config, with changes if need be."""

    bucket: Path
    labels: Path
    result: dict[str, Any]
    config: Callable[..., LabelConfig]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, scene_model: Path) -> Finished:
    """Made once; tests that change something take a copy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = partial(make_config, folder, scene_model, chunk=CHUNK, mask="both")
    bucket = fill(folder / "bucket")
    return Finished(bucket=bucket, labels=folder / "labels", result=label(config()), config=config)


@pytest.fixture
def finished(undisturbed: Finished, tmp_path: Path) -> Finished:
    """The undisturbed run, its labels in a folder of the test's own (the bucket is shared: it must stay as it is)."""
    labels = shutil.copytree(undisturbed.labels, tmp_path / "labels")
    return replace(undisturbed, labels=labels, config=partial(undisturbed.config, output=str(labels)))


def files_below(folder: Path) -> dict[str, bytes]:
    visible = (path for path in folder.rglob("*") if path.is_file() and "/." not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in visible}


def test_every_image_gets_the_mask_that_the_segmenter_gives(undisturbed: Finished, scene_model: Path) -> None:
    result, bucket = undisturbed.result, undisturbed.bucket
    assert (result["images"], result["labelled"], result["skipped"], result["errors"]) == (IMAGES, IMAGES, 0, 0)
    segmenter = Segmenter.load(scene_model)
    table = rows(result)
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
    found = [(entry["class_id"], entry["pixels"], entry["name"]) for entry in statistics]
    assert found == [(index, count, SCENE_CLASSES.names[index]) for index, count in zip(ids, pixels, strict=True)]
    assert sum(entry["fraction"] for entry in statistics) == pytest.approx(1.0)


def test_a_file_explains_itself(undisturbed: Finished, scene_model: Path) -> None:
    checkpoint = load_checkpoint(scene_model)
    folder = undisturbed.labels / "masks" / f"model={checkpoint.partition}" / "dt=2026-01-31"
    files = sorted(folder.glob("*.parquet"))
    assert [file.name for file in files] == [f"000000-00000{chunk}.parquet" for chunk in range(4)]
    opened = pq.ParquetFile(files[0])
    assert opened.schema_arrow.remove_metadata() == MASKS
    expected = {"fingerprint": checkpoint.fingerprint, "model": str(scene_model), "classes": SCENE_CLASSES.to_json()}
    expected["run_id"] = undisturbed.result["run_id"]
    assert expected.items() <= metadata_of(opened).items()


def test_what_belongs_to_the_end_of_a_run(undisturbed: Finished) -> None:
    record = record_of(undisturbed.config(), undisturbed.result)
    assert (record["images"], record["labelled"], record["errors"], record["chunks"]) == (IMAGES, IMAGES, {}, 4)
    totals = sql(
        "SELECT s.class_id, count(*), sum(s.pixels)::BIGINT FROM (SELECT unnest(class_stats) AS s FROM read_parquet(?))"
        " GROUP BY 1 ORDER BY 1",
        undisturbed.result["labels"],
    )
    statistics = "SELECT class_id, images, pixels FROM read_parquet(?) WHERE pixels > 0 ORDER BY 1"
    assert sql(statistics, undisturbed.labels / "class_stats/*/*/*.parquet") == totals
    expected = [(name, *color) for name, color in zip(SCENE_CLASSES.names, SCENE_CLASSES.colors, strict=True)]
    assert sql("SELECT name, r, g, b FROM read_parquet(?)", undisturbed.labels / "classes/*/*.parquet") == expected


def test_a_second_run_does_nothing(finished: Finished) -> None:
    before = files_below(finished.labels)
    again = label(finished.config(date="2026-02-01"))
    assert (again["images"], again["labelled"], again["skipped"], again["errors"]) == (IMAGES, 0, IMAGES, 0)
    assert files_below(finished.labels) == before


def test_new_changed_and_deleted_images(tmp_path: Path, scene_model: Path) -> None:
    """Two nights on a bucket that changes, the first of which is killed after it made its plan."""
    bucket, config = fill(tmp_path / "bucket"), make_config(tmp_path, scene_model)
    first = label(config)
    ledger = ledger_of(config)
    plan = ledger.latest_plan()
    assert plan is not None
    next((tmp_path / "labels").glob("masks/*/*/*-000000.parquet")).unlink()
    record_path(config, first).unlink()
    changed, deleted = ledger.read_chunk(plan, 0)["uri"].to_pylist()[:2]
    put_scene(Path(changed), 50)
    Path(deleted).unlink()
    put_scene(bucket / "new.png", 100)
    again = label(replace(config, date="2026-02-01"))
    table = rows(again)
    errors = {row["uri"]: row["error"].split(":")[0] for row in table if row["status"] == "error"}
    assert errors == {changed: "Changed", deleted: "Missing"}
    # One plan was finished with its own date, another made for what is new: the changed image and the added one.
    later = {row["uri"] for row in table if row["dt"] == datetime.date(2026, 2, 1)}
    assert later == {changed, str(bucket / "new.png")}
    assert len(table) == len({(row["uri"], row["etag"]) for row in table}) == IMAGES + 2
    assert again["images"] == again["labelled"] + again["skipped"] + again["errors"]


def bad_files() -> dict[str, tuple[bytes, str | None]]:
    """File name -> content and the error kind expected, or None where a label is."""
    image = scene(1)
    whole = encoded(image)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64))
    return {
        "zero.jpg": (b"", "Empty"),
        "truncated.jpg": (whole[: len(whole) // 2], "Truncated"),
        "text.png": (b"<html>not here</html>", "Unreadable"),
        "bomb.png": (encoded(Image.new("1", (20000, 20000)), "PNG"), "TooLarge"),
        "cmyk.jpg": (encoded(image.convert("CMYK")), None),
        "grey16.png": (encoded(grey16, "PNG"), None),
        "palette.png": (encoded(image.convert("P"), "PNG"), None),
        "grey.jpg": (encoded(image.convert("L")), None),
        "alpha.png": (encoded(image.convert("RGBA"), "PNG"), None),
        "animated.gif": (encoded(image, "GIF", save_all=True, append_images=[scene(4)]), None),
        "rotated.jpg": (encoded(scene(2, 96, 32), exif=rotated), None),
        "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), None),
    }


def test_bad_input_becomes_rows(tmp_path: Path, scene_model: Path) -> None:
    (tmp_path / "bucket").mkdir()
    expected = {name: kind for name, (_, kind) in bad_files().items()}
    for name, (content, _) in bad_files().items():
        (tmp_path / "bucket" / name).write_bytes(content)
    config = make_config(tmp_path, scene_model, mask="both")
    result = label(config)
    table = {row["key"]: row for row in rows(result)}
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
    assert record_of(config, result)["errors"] == {kind: 1 for kind in expected.values() if kind}


@pytest.mark.parametrize("lost", [["record"], ["record", "statistics"], ["record", "statistics", "masks"]])
def test_every_state_a_killed_run_leaves_is_finished_to_the_same_bytes(finished: Finished, lost: list[str]) -> None:
    """A run writes plan, chunks in any order, statistics, record: take away what a kill would have left undone."""
    whole = files_below(finished.labels)
    record = str(record_path(finished.config(), finished.result).relative_to(finished.labels))
    chunks = [path for path in whole if path.startswith("masks/")][1::2] if "masks" in lost else []
    statistics = [path for path in whole if path.startswith("class_stats/")] if "statistics" in lost else []
    for path in (*chunks, *statistics, record):
        (finished.labels / path).unlink()
    again = label(finished.config(date="2026-02-01", chunk=3, mask="png"))  # the plan's date, chunks and masks hold
    after = files_below(finished.labels)
    assert (again["run_id"], again["images"]) == (finished.result["run_id"], IMAGES)
    assert set(after) == set(whole)
    # Times are in the record, and in the footers of label files.
    assert {path: substance(whole[path]) for path in chunks} == {path: substance(after[path]) for path in chunks}
    assert {path for path in whole if after[path] != whole[path]} <= {record, *chunks}


JOB = [sys.executable, "jobs/label.py"]


def test_two_drivers_at_once_and_one_killed_leave_one_row_per_image(finished: Finished, tmp_path: Path) -> None:
    made = finished.config(chunk=1, output=str(tmp_path / "contested"))
    flags = [f"--{key}={getattr(made, key)}" for key in ("input", "output", "model", "date", "chunk")]
    command, environment = [*JOB, *flags, "--wait=false", "--local"], os.environ | {"PYTHONPATH": os.getcwd()}
    drivers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    until(lambda: any(Path(made.output).glob("masks/*/*/*.parquet")), drivers[1])
    drivers[0].send_signal(signal.SIGKILL)
    outputs = [driver.communicate(timeout=240)[0] for driver in drivers]
    assert drivers[1].returncode == 0
    line = json.loads(outputs[1].splitlines()[-1])
    assert line["images"] == line["labelled"] + line["skipped"] + line["errors"] == IMAGES
    table = rows(line)
    assert len(table) == len({(row["uri"], row["etag"]) for row in table}) == IMAGES
    assert label(made)["skipped"] == IMAGES
    assert len(list(Path(made.output).glob("plans/*/*.parquet"))) == 1


def test_chunks_under_way_outlast_an_output_that_is_away_for_two_minutes(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[RunContext] = []

    def read(context: RunContext, plan: Plan) -> None:
        found.append(context)
        raise ZeroDivisionError  # it is enough

    monkeypatch.setattr(labelling, "Read", read)
    with pytest.raises(ZeroDivisionError):
        label(finished.config(output=str(tmp_path / "away")))
    output, retries = found[0].output, found[0].output.retries
    assert (output.root, output.field) == (str(tmp_path / "away"), "output")
    assert sum(min(retries.first_wait * 2**done, retries.longest_wait) for done in range(retries.attempts - 1)) >= 120


def put_lease(config: LabelConfig, **changes: Any) -> Path:
    """A lease that this process holds, or another one as ``changes`` say."""
    lease = Path(config.output) / ledger_of(config).paths.lease
    lease.parent.mkdir(parents=True, exist_ok=True)
    lease.write_text(json.dumps(asdict(replace(Holder.here(), **changes))))
    return lease


def test_a_run_takes_over_from_a_killed_one_and_need_not_wait(finished: Finished) -> None:
    """Leases are told apart by what they say of their holder."""
    holders: list[tuple[dict[str, Any], bool]] = [({"started": 0.0}, False), ({"machine": "far-away"}, True)]
    for holder, left in holders:
        lease = put_lease(finished.config(), **holder)
        assert label(finished.config(wait=False))["skipped"] == IMAGES
        assert lease.exists() is left


def test_waiting_ends_with_a_new_listing(tmp_path: Path, scene_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    bucket, config = fill(tmp_path / "bucket"), make_config(tmp_path, scene_model)
    lease = put_lease(config, machine="far-away")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(label, config)
        until(lambda: "waiting for another run" in caplog.text)
        assert not list((tmp_path / "labels").glob("plans/*/*"))
        put_scene(bucket / "late.png", 99)
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
    places = {"input": f"{s3_bucket}/in put", "output": f"{s3_bucket}/labels", "model": f"{s3_bucket}/model"}
    command = [*JOB, *(f"--{key}={uri}" for key, uri in places.items()), "--chunk=5", "--local=false"]
    job = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": "local"}, text=True, capture_output=True)
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
    assert label(undisturbed.config(**places))["skipped"] == IMAGES


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": "/nowhere/at/all"}, "input"),
        ({"source": "webdataset"}, "input"),  # of which the bucket holds none
        ({"model": "/nowhere/at/all"}, "model"),
        ({"model": "models:/nobody@newest"}, "model"),
        ({"output": "memory://labels"}, "output"),
    ],
)
@pytest.mark.usefixtures("tracking_home")
def test_mistakes_write_nothing(undisturbed: Finished, changes: dict[str, str], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        label(undisturbed.config(**({"output": str(tmp_path / "labels")} | changes)))
    assert str(caught.value).startswith(f"{field}=")
    assert "\n" not in str(caught.value)
    assert not files_below(tmp_path / "labels")


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_holds(undisturbed: Finished, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^workers=1000: the cluster has"):
        label(undisturbed.config(workers="1000", local=None, output=str(tmp_path / "crowded")))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"chunk": 0}, "chunk=0: "),
        ({"max_pixels": -1}, "max_pixels=-1: "),
        ({"max_errors": 1.5}, "max_errors=1.5: "),
        ({"max_errors": -0.1}, "max_errors=-0.1: "),
        ({"retry_errors": ()}, "retry_errors=: "),
        ({"retry_errors": ("Mising",)}, "retry_errors=Mising: "),
        ({"mask": "jpeg"}, "mask=jpeg: "),
        ({"workers": "4:1"}, "workers=4:1: "),
        ({"workers": "2"}, "local=True: has one worker, on CPUs; leave out --workers and --gpus"),
        ({"price_cpu": -1.0}, "price_cpu=-1.0: "),
        ({"date": "tomorrow"}, "date=tomorrow: give a date as YYYY-MM-DD, today or yesterday"),
        ({"since": "last week"}, "since=last week: give a date or time such as"),
        ({"input": "s3://b/{day}/"}, "input=s3://b/{day}/: write {date}"),
        ({"source": "zip"}, "source=zip: choose one of images, webdataset, parquet, manifest"),
    ],
    ids=str,
)
def test_mistakes_in_flags(flags: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, tmp_path, **flags)
    assert str(caught.value).startswith(told)
