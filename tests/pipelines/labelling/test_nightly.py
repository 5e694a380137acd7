"""Night after night on a bucket that grows, in all formats and any number; what cron or Kubernetes starts."""

import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from jobs.cli import parse_config
from pipelines.label_table import ledger as ledgers
from pipelines.label_table.ledger import ChunkLimits, PlanSpec
from pipelines.label_table.schema import LISTING
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.storage import open_store
from pspnet_core.errors import ConfigError
from tests.support.buckets import parquet, tar
from tests.support.labeljob import ledger_of, make_config, put_scene, sql
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("stages_here")

NAMES = ["0.jpg", "1.png", "2.webp", "3.tiff", "4.bmp"]
Night = Callable[..., dict[str, Any]]


def add(folder: Path, name: str, seed: int, *, days_old: float = 0) -> Path:
    path = put_scene(folder / name, seed)
    then = time.time() - 86400 * days_old
    os.utime(path, (then, then))
    return path


def counts(result: dict[str, Any]) -> tuple[int, int, int]:
    assert result["images"] == result["labelled"] + result["skipped"] + result["errors"]
    return result["labelled"], result["skipped"], result["errors"]


def rows(result: dict[str, Any], columns: str) -> list[Any]:
    return sql(f"SELECT {columns} FROM read_parquet(?, filename = true) ORDER BY uri, labelled_at", result["labels"])


@pytest.fixture
def night(tmp_path: Path, scene_model: Path) -> Night:
    """From ``tmp_path/bucket`` to ``tmp_path/labels``, unless the flags say otherwise."""
    return lambda **flags: label(make_config(tmp_path, scene_model, **{"chunk": 3} | flags))


def test_two_nights_on_a_growing_bucket(tmp_path: Path, night: Night) -> None:
    bucket = tmp_path / "bucket"
    old = add(bucket, "2025/old.jpg", 1, days_old=40)
    kept, changed = add(bucket, "2026/a.jpg", 2, days_old=1), add(bucket, "2026/b.jpg", 3, days_old=1)
    assert counts(night(since="7d", date="yesterday")) == (2, 0, 0)
    new = [add(bucket, "2026/c.jpg", 4), add(bucket, "2026/late/d.jpg", 5)]
    add(bucket, "2026/b.jpg", 6)
    second = night(since="7d", date="today")
    assert counts(second) == (3, 1, 0)  # two new ones and the one that changed; what was labelled is skipped
    assert counts(night(since="7d", date="today")) == (0, 4, 0)
    table = rows(second, "uri, etag, CAST(dt AS VARCHAR)")
    assert [uri for uri, _, _ in table] == [str(path) for path in (kept, changed, changed, *new)]
    assert len({(uri, etag) for uri, etag, _ in table}) == 5
    days = [day for _, _, day in table]
    assert days[0] == days[1] < days[2] == days[3] == days[4]
    now = {item.uri: item.etag for item in open_store(str(bucket), field="input").list()}
    assert [etag == now[uri] for uri, etag, _ in table] == [True, False, True, True, True]
    whole = night()  # for which that is pending which --since left out
    assert counts(whole) == (1, 4, 0)
    assert rows(whole, "uri")[0] == (str(old),)


def test_a_night_without_new_images_is_no_error(tmp_path: Path, night: Night) -> None:
    add(tmp_path / "bucket", "a.jpg", 1, days_old=40)
    result = night(since="36h")
    assert counts(result) == (0, 0, 0)
    assert result["run_id"] is None
    with pytest.raises(ConfigError, match=r"^input=.*: holds no images for --source parquet"):
        night(source="parquet")


def test_each_day_has_a_folder_and_each_camera_a_bucket(tmp_path: Path, night: Night) -> None:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    for number in (1, 2):
        add(tmp_path / f"camera-{number}", f"{today:%Y/%m/%d}/a.jpg", number)
        add(tmp_path / f"camera-{number}", "1999/12/31/b.jpg", number + 10)
    template = f"{tmp_path}/camera-1/{{date:%Y/%m/%d}},{tmp_path}/camera-2/{{date:%Y/%m/%d}}/*.jpg"
    result = night(input=template, date=f"{today}")
    assert counts(result) == (2, 0, 0)
    assert rows(result, "uri, key") == [(f"{tmp_path}/camera-{n}/{today:%Y/%m/%d}/a.jpg", "a.jpg") for n in (1, 2)]
    again = night(input=template, date="1999-12-31")
    assert counts(again) == (2, 0, 0)
    assert len(rows(again, "uri")) == 4


@pytest.mark.parametrize("next_day", ["missing", "empty", "filled"])
def test_a_night_after_an_interrupted_one_finishes_that_first(next_day: str, tmp_path: Path, night: Night) -> None:
    """The same command, after midnight: ``{date}`` leads to another folder, which may not be there yet."""
    for number in range(5):
        add(tmp_path / "bucket", f"2026-01-30/{number}.jpg", number)
    flags = {"input": f"{tmp_path}/bucket/{{date}}"}
    first = night(**flags, date="2026-01-30")
    whole = rows(first, "uri, etag, mask_lengths, run_id, dt")
    record = tmp_path / "labels" / "runs" / f"{first['run_id']}.json"
    record.unlink()
    min((tmp_path / "labels").glob("masks/*/*/*.parquet")).unlink()
    assert len(rows(first, "uri")) == 2
    if next_day == "missing":
        with pytest.raises(ConfigError, match=r"^input=.*/2026-01-31: no such folder"):
            night(**flags, date="2026-01-31")
    elif next_day == "empty":
        (tmp_path / "bucket" / "2026-01-31").mkdir()
        second = night(**flags, date="2026-01-31")
        assert counts(second) == (3, 2, 0)
        assert second["run_id"] == first["run_id"]
    else:
        add(tmp_path / "bucket", "2026-01-31/a.jpg", 9)
        second = night(**flags, date="2026-01-31")
        assert counts(second) == (4, 2, 0)
        assert rows(second, "uri, CAST(dt AS VARCHAR)")[5:] == [(f"{tmp_path}/bucket/2026-01-31/a.jpg", "2026-01-31")]
    assert rows(first, "uri, etag, mask_lengths, run_id, dt")[:5] == whole
    assert record.exists()
    add(tmp_path / "bucket", "2026-02-01/b.jpg", 10)
    assert counts(night(**flags, date="2026-02-01")) == (1, 0, 0)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory, scene_model: Path) -> tuple[dict[str, bytes], list[Any]]:
    """Images in all formats, and the masks that they get as an object each."""
    folder = tmp_path_factory.mktemp("loose")
    images = {name: put_scene(folder / "bucket" / name, seed).read_bytes() for seed, name in enumerate(NAMES)}
    result = label(make_config(folder, scene_model, chunk=256))
    assert counts(result) == (5, 0, 0)
    return images, rows(result, "bytes, mask_classes, mask_lengths, confidence")


@pytest.mark.parametrize("source", ["webdataset", "parquet", "manifest"])
def test_every_source_gives_the_same_masks(
    source: str, loose: tuple[dict[str, bytes], list[Any]], tmp_path: Path, night: Night
) -> None:
    images, masks = loose
    folder = tmp_path / "bucket"
    folder.mkdir()
    if source == "webdataset":
        (folder / "x.tgz").write_bytes(tar(list(images.items()), "x.tgz"))
        (folder / "torn.tar").write_bytes(b"no archive")
    elif source == "parquet":
        (folder / "x.parquet").write_bytes(parquet(pa.table({"key": list(images), "image": list(images.values())})))
        (folder / "torn.parquet").write_bytes(b"no table")
    else:
        for name, data in images.items():
            (folder / name).write_bytes(data)
        (folder / "x.txt").write_text("".join(f"{name}\n" for name in images))
    result = night(source=source, chunk=256)
    assert counts(result) == (5, 0, 0)
    assert result["damaged"] == (0 if source == "manifest" else 1)
    assert rows(result, "bytes, mask_classes, mask_lengths, confidence") == masks
    assert counts(night(source=source)) == (0, 5, 0)


def test_an_open_plan_is_finished_from_its_own_input(tmp_path: Path, scene_model: Path, night: Night) -> None:
    """Whatever the flags say now: other input, other source, nothing new."""
    add(tmp_path / "bucket", "a.jpg", 1)
    (tmp_path / "other").mkdir()
    ledger = ledger_of(make_config(tmp_path, scene_model))
    (item,) = open_store(str(tmp_path / "bucket"), field="input").list()
    listing = pa.Table.from_pylist([{name: getattr(item, name) for name in LISTING.names}], LISTING)
    spec = PlanSpec(source="images", input=(f"{tmp_path}/bucket",), date="2026-01-31", mask="rle")
    ledger.make_plan(listing, spec, ChunkLimits(images=4, bytes=2**20), None)
    result = night(input=str(tmp_path / "other"), source="webdataset", since="1d", date="today")
    assert counts(result) == (1, 0, 0)
    assert rows(result, "uri, CAST(dt AS VARCHAR)") == [(f"{tmp_path}/bucket/a.jpg", "2026-01-31")]


def test_a_plan_names_all_that_was_listed(tmp_path: Path, scene_model: Path, night: Night) -> None:
    add(tmp_path / "a", "1.jpg", 1)
    add(tmp_path / "b,c", "2.jpg", 2)
    (tmp_path / "night.yaml").write_text(f"input: ['{tmp_path}/a', '{tmp_path}/b,c/{{date:%Y}}*', '{tmp_path}/b,c']\n")
    required = ["--config", str(tmp_path / "night.yaml"), "--output=x", "--model=y", "--date=2026-01-31"]
    config = parse_config(LabelConfig, required)
    result = night(input=config.input, date=config.date)
    assert counts(result) == (2, 0, 0)
    plan = ledger_of(make_config(tmp_path, scene_model)).read_plan(0)
    assert list(plan.spec.input) == [f"{tmp_path}/a", f"{tmp_path}/b,c/2026*", f"{tmp_path}/b,c"]


def test_more_images_than_one_plan_may_hold(tmp_path: Path, scene_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PLAN_IMAGES", 5)
    monkeypatch.setattr(ledgers, "PLAN_CHUNKS", 2)
    for number in range(7):
        put_scene(tmp_path / "bucket" / f"{number}.jpg", number)
    config = make_config(tmp_path, scene_model, chunk=2)
    result = label(config)
    assert (result["images"], result["labelled"], result["skipped"], result["errors"]) == (7, 7, 0, 0)
    found = rows(result, "parse_filename(filename), key, run_id")
    names = ["000000-000000", "000000-000001", "000001-000000", "000001-000001"]
    assert [name.removesuffix(".parquet") for name, _, _ in found] == [names[number // 2] for number in range(7)]
    assert [key for _, key, _ in found] == [f"{number}.jpg" for number in range(7)]
    # A plan is a run of its own to readers: one record each, the last one's id in the result.
    records = [json.loads(path.read_text()) for path in (tmp_path / "labels/runs").iterdir()]
    assert sorted((record["plan"], record["images"]) for record in records) == [(0, 4), (1, 3)]
    assert {record["run_id"] for record in records} == {run_id for _, _, run_id in found}
    assert result["run_id"] == found[-1][2]

    # As if the run had been killed in the first plan: the next one finishes that, then makes the second.
    paths = ledger_of(config).paths
    (first,) = (record["run_id"] for record in records if record["plan"] == 0)
    lost = [paths.run(first), paths.run(result["run_id"]), paths.plan(1), paths.chunk("2026-01-31", 0, 1)]
    for name in (*lost, *(paths.chunk("2026-01-31", 1, chunk) for chunk in range(2))):
        (tmp_path / "labels" / name).unlink()
    again = label(config)
    assert (again["images"], again["labelled"], again["skipped"]) == (7, 5, 2)
    assert rows(again, "parse_filename(filename), key") == [row[:2] for row in found]
    assert label(config)["skipped"] == 7


VARIABLES = {
    "INPUT": "s3://b/{date:%Y/%m/%d}/,s3://c/x y",
    "OUTPUT": "s3://labels/street",
    "MODEL": "models:/street@champion",
}


STAND_IN = (
    "#!/bin/sh\nexec "
    + shlex.quote(sys.executable)
    + " -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"
)
"""In place of the Python that starts the job: prints its arguments."""


def make_nightly(folder: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make nightly` with a Python that only prints its arguments."""
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    # Without what belongs to a make that runs the tests, such as its ARGS.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    # The stamp is taken for new: nothing shall be installed here.
    command = [
        "make",
        "--no-print-directory",
        "--silent",
        "-o",
        ".venv/.stamp",
        f"BIN={folder}",
        "STAMP=.venv/.stamp",
        *(arguments if "nightly" in arguments else ("nightly", *arguments)),
    ]
    return subprocess.run(command, cwd=ROOT, env=inherited | variables, text=True, capture_output=True)


def nightly(folder: Path, variables: dict[str, str], *arguments: str) -> list[str]:
    """The flags with which `make nightly` starts the job."""
    done = make_nightly(folder, variables, *arguments)
    assert done.returncode == 0, done.stderr
    words: list[str] = json.loads(done.stdout)
    assert words[0] == "jobs/label.py"
    return words[1:]


def test_make_nightly_takes_its_flags_from_the_environment(tmp_path: Path) -> None:
    config = parse_config(LabelConfig, nightly(tmp_path, VARIABLES))
    expected = LabelConfig(
        input=VARIABLES["INPUT"], output=VARIABLES["OUTPUT"], model=VARIABLES["MODEL"], date="today", source="images"
    )
    assert config == expected
    more = VARIABLES | {"DATE": "yesterday", "SINCE": "36h", "SOURCE": "manifest"}
    config = parse_config(LabelConfig, nightly(tmp_path, more, "ARGS=--workers 1:4 --chunk 64"))
    assert (config.date, config.since, config.source) == ("yesterday", "36h", "manifest")
    assert (config.actors.workers, config.chunk) == ("1:4", 64)


ODD_VALUES = [
    *("it's", "a$b", "a$$b", "$(shell touch EVIL)x", "${HOME}", "`touch EVIL`", 'a"b;c|d&e>f', "a\\b", "a#b", "a b "),
    *("*", "~/x", "a$", "%d", "two\nlines", "ä=1", "--x"),
]


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("by", ["environment", "command line"])
def test_make_nightly_hands_every_value_on_as_it_is(value: str, by: str, tmp_path: Path) -> None:
    """Neither make nor the shell interprets any of it."""
    value = value.replace("EVIL", str(tmp_path / "evil"))
    given = dict.fromkeys(["INPUT", "OUTPUT", "MODEL", "SOURCE", "DATE", "SINCE"], value)
    if by == "environment":
        found = nightly(tmp_path, given)
    else:
        found = nightly(tmp_path, {}, *(f"{name}={value}" for name in given))
    assert found == [f"--{name.lower()}={value}" for name in given]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("goals", [("setup", "nightly"), ("nightly", "setup")])
def test_make_nightly_does_the_same_beside_another_goal(goals: tuple[str, ...], tmp_path: Path) -> None:
    given = [f"{name}=a$b" for name in ("INPUT", "OUTPUT", "MODEL")]
    flags = ["--input=a$b", "--output=a$b", "--model=a$b", "--source=images", "--date=today"]
    assert nightly(tmp_path, {}, *goals, *given) == flags


def test_what_args_holds_is_cut_at_blanks_and_nothing_else(tmp_path: Path) -> None:
    assert nightly(tmp_path, {"ARGS": "--exclude *  --limit=$(x)`y`"})[-3:] == ["--exclude", "*", "--limit=$(x)`y`"]
    refused = make_nightly(tmp_path, {"ARGS": "--exclude 'a b'"})
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: ARGS=--exclude 'a b': is cut at blanks and knows no quotes; leave them out"
    )


def test_make_nightly_tells_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^input='': give a folder"):
        parse_config(LabelConfig, nightly(tmp_path, {}))


def test_the_kubernetes_example_starts_the_same(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "docs" / "nightly.yaml").read_text())
    assert (job["kind"], job["spec"]["concurrencyPolicy"]) == ("CronJob", "Forbid")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["make", "nightly"]
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    config = parse_config(LabelConfig, nightly(tmp_path, variables))
    assert config.input == variables["INPUT"]
    assert config.date == "yesterday"
