"""The command line: flags and files into a config, exit codes, one line of JSON on standard output."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.__main__ import JOBS as COMMANDS
from jobs.__main__ import main as command
from jobs.cli import json_line, main, parse_config
from pipelines.datasets.packing import PrepareConfig
from pipelines.demo.demo import DemoConfig
from pipelines.evaluation.evaluate import EvaluateConfig
from pipelines.labelling.config import LabelConfig
from pipelines.models.converting import ConvertConfig
from pipelines.models.exporting import ExportConfig
from pipelines.process.config_tree import build, flatten, leaves, parts
from pipelines.training.config import TrainConfig
from pspnet_core.errors import ConfigError, ImageError, PspnetError
from tests.support.paths import ROOT

JOBS: dict[str, Any] = {
    "convert": ConvertConfig,
    "demo": DemoConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "label": LabelConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaintConfig:
    """The paint."""

    kind: str = "oil"
    gloss_share: float = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HouseConfig:
    """Paint a house."""

    owner: str
    paint: PaintConfig
    floors: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Paint a fence.

    More about fences.

    Attributes:
        fence: where the fence stands.
        workers: ``N`` or ``MIN:MAX``.
        scales, names, span, flip, gloss, rate, coats, limit, retry_errors: one of each type.
    """

    fence: str
    workers: str = "1"
    date: str | None = None
    """day of the work, 100 % of it"""
    scales: tuple[float, ...] | None = None
    names: tuple[str, ...] = ()
    span: tuple[float, float] = (0.5, 2.0)
    flip: bool = False
    gloss: bool | None = None
    rate: float = 0.5
    coats: int = 2
    limit: int | None = None
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if self.coats < 1:
            raise ConfigError("coats", self.coats, "must be 1 or more")


def parsed(*argv: str) -> SampleConfig:
    return parse_config(SampleConfig, ["--fence", "garden", *argv])


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return str(path)


def error_of(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a job says that refuses its flags."""
    assert main(SampleConfig, dataclasses.asdict, argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--flip", "false"], "flip", False),
        (["--flip", "--coats", "3"], "flip", True),
        (["--rate", "-1e-3"], "rate", -1e-3),
        (["--scales=0.5, 1"], "scales", (0.5, 1.0)),
        (["--scales", "[0.5, 1.0]"], "scales", (0.5, 1.0)),
        (["--names", "a,b"], "names", ("a", "b")),
        (["--span", "1,2"], "span", (1.0, 2.0)),
        (["--date", "2026-01-31"], "date", "2026-01-31"),
        (["--date", "null"], "date", None),
        (["--rate", "1"], "rate", 1.0),
        (["--limit", "7"], "limit", 7),
        (["--retry_errors"], "retry_errors", True),
        (["--coats", "3", "--coats", "4"], "coats", 4),
    ],
)
def test_flags(argv: list[str], field: str, value: object) -> None:
    found = getattr(parsed(*argv), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["[x", "{a: 1}", "a: b", "- x", "true", "null", "1e3", "", '"q"', "s3://b/k?x=1#y"])
def test_text_is_taken_as_it_is_written(text: str) -> None:
    assert parse_config(SampleConfig, [f"--fence={text}"]).fence == text


def test_help_shows_the_docs_of_the_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(SampleConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for part in ("Paint a fence.", "--config FILE", "where the fence stands. (required)", "``N`` or ``MIN:MAX``"):
        assert part in text
    for part in ("--date STR day of the work, 100 % of it", "--rate FLOAT (default: 0.5)", "--scales LIST"):
        assert part in text


def test_the_flags_of_a_tree_are_flat_and_kind_is_its_part() -> None:
    expected = HouseConfig(owner="Ada", paint=PaintConfig(kind="lime", gloss_share=0.5))
    assert parse_config(HouseConfig, ["--paint=lime", "--owner=Ada", "--gloss-share", ".5"]) == expected
    flat = {"owner": "Ada", "paint": "lime", "gloss_share": 0.5, "floors": 1}
    assert flatten(expected) == flat
    assert build(HouseConfig, flat) == expected


@pytest.mark.parametrize(
    "text",
    [
        "paint: lime\ngloss-share: .5",
        "paint:\n  kind: lime\n  gloss_share: .5",
        "paint: {paint: lime, gloss-share: .5}",
    ],
)
def test_a_file_may_be_flat_or_nested_by_component(text: str, tmp_path: Path) -> None:
    found = parse_config(HouseConfig, ["--config", written(tmp_path, text), "--owner=Ada"])
    assert found == HouseConfig(owner="Ada", paint=PaintConfig(kind="lime", gloss_share=0.5))


def test_a_file_that_says_a_thing_flat_and_nested_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "gloss_share: .1\npaint: {gloss_share: .2}")
    with pytest.raises(ConfigError, match=r"^gloss_share=.2: stands twice in .*run.yaml; leave one of them out"):
        parse_config(HouseConfig, ["--config", path, "--owner=Ada"])


def test_every_job_is_looked_at() -> None:
    assert list(JOBS) == COMMANDS


@pytest.mark.parametrize("config", JOBS.values(), ids=JOBS)
def test_the_leaves_of_a_job_have_names_of_their_own(config: Any) -> None:
    def count(part: Any) -> int:
        below = parts(part)
        return sum(map(count, below.values())) + len(dataclasses.fields(part)) - len(below)

    assert len(leaves(config)) == count(config)


FILE = """
fence: yard
workers: 1:4
date: 2026-01-31
scales: [0.5, 1]
names: [a, "b"]
flip: yes
rate: 1e-4
coats: 5
limit: null
retry-errors: true
"""


def test_a_file_gives_values_and_flags_override_them_wherever_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    expected = SampleConfig(fence="yard", workers="1:4", date="2026-01-31", scales=(0.5, 1.0), names=("a", "b"))
    expected = dataclasses.replace(expected, flip=True, rate=1e-4, coats=5, retry_errors=True)
    assert parse_config(SampleConfig, ["--config", path]) == expected
    overridden = dataclasses.replace(expected, coats=6)
    assert parse_config(SampleConfig, ["--config", path, "--coats", "6"]) == overridden
    assert parse_config(SampleConfig, ["--coats", "6", "--config", path]) == overridden


@pytest.mark.parametrize("text", ["limit:", "limit: ~", "limit: null", "limit: 'null'"])
def test_a_later_file_overrides_an_earlier_one_and_may_say_null(text: str, tmp_path: Path) -> None:
    first, second = written(tmp_path, "coats: 3\nlimit: 8"), written(tmp_path, text, "second.yaml")
    assert parsed("--config", first, "--config", second) == SampleConfig(fence="garden", coats=3, limit=None)


def test_nothing_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^fence=null: must be text$"):
        parse_config(SampleConfig, ["--config", written(tmp_path, "fence:")])


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert parsed("--config", written(tmp_path, "# nothing yet\n")) == parsed()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "fence=: required; give --fence"),
        (["--coat", "3"], "--coat=3: unknown flag; did you mean --coats?"),
        (["--zzz"], "--zzz=: unknown flag; --help lists them all"),
        (["-v"], "argument=-v: values belong to flags; --help lists them"),
        (["--fence"], "--fence=: needs a value: text"),
        (["--fence", "--coats", "3"], "--fence=: needs a value: text"),
        (["--fence=x", "--coats=3.0"], "coats=3.0: must be an integer"),
        (["--fence=x", "--limit=all"], "limit=all: must be an integer or null"),
        (["--fence=x", "--rate=fast"], "rate=fast: must be a number"),
        (["--fence=x", "--flip=1"], "flip=1: must be true or false"),
        (["--fence=x", "--scales=a,b"], "scales=a,b: must be a comma-separated list (each a number) or null"),
        (["--fence=x", "--span=1"], "span=1: must be a comma-separated list (2 values, each a number)"),
        (["--fence=x", "--scales=1,,2"], "scales=1,,2: must be a comma-separated list (each a number) or null"),
        (["--fence=x", "--coats=0"], "coats=0: must be 1 or more"),
        (["s3://me:geheim@b"], "argument=s3://***@b: values belong to flags; --help lists them"),
        (["--config=/nowhere/at.all"], "config=/nowhere/at.all: cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_in_flags(argv: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert error_of(argv, capfd) == f"error: {line}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("coat: 3", "coat=3: unknown field in {path}; did you mean --coats?"),
        ("coats: {kind: 1}", 'coats={{"kind": "1"}}: must be an integer'),
        ("coats: [1]", 'coats=["1"]: must be an integer'),
        ("scales: fast", "scales=fast: must be a comma-separated list (each a number) or null"),
        ("- fence", "config={path}: must hold lines of the form 'field: value'"),
        ("fence: [", "config={path}: is not YAML"),
        ("\udcff", "config={path}: is not YAML"),  # a byte that is no UTF-8
        ("~: 3", "None=3: unknown field in {path}; "),
        ("fence: &x [*x]", "config={path}: is not YAML"),
        ("coats: 3\ncoats: 4", "config={path}: is not YAML (coats stands twice; leave one of them out)"),
        ("scales: [1, [2]]", 'scales=["1", ["2"]]: must be a comma-separated list (each a number) or null'),
        ("retry-errors: yes\nretry_errors: no", "retry_errors=no: stands twice in {path}; leave one of them out"),
    ],
)
def test_mistakes_in_a_file(text: str, line: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    err = error_of(["--config", path, "--fence", "x"], capfd)
    assert err.count("\n") == 1
    assert err.startswith("error: " + line.format(path=path))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("model", "x", "no such folder"), 2, "error: model=x: no such folder"),
        (ImageError("Empty", "no bytes"), 1, "error: Empty: no bytes"),
        (PspnetError("two\nlines"), 1, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_job_raises(error: BaseException, code: int, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(config: SampleConfig) -> Mapping[str, object]:
        raise error

    assert main(SampleConfig, fail, ["--fence=x"]) == code
    assert capfd.readouterr() == ("", line + "\n")


def test_a_fault_of_the_program_is_logged_with_its_traceback(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(config: SampleConfig) -> Mapping[str, object]:
        raise RuntimeError("not foreseen")

    assert main(SampleConfig, fail, ["--fence=x"]) == 1
    assert capfd.readouterr().out == ""
    assert caplog.messages == ["the program failed"]
    assert caplog.text.rstrip().endswith("RuntimeError: not foreseen")


def test_the_line_is_json_whatever_the_values_are() -> None:
    values: list[tuple[object, object]] = [
        (float("nan"), None),
        ([1.0, -float("inf")], [1.0, None]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array([1.0, np.nan]), [1.0, None]),
        (torch.tensor([1, 2]), [1, 2]),
        (Path("/a/b"), "/a/b"),
        ("two\nlines", "two\nlines"),
        ({3: (1, 2)}, {"3": [1, 2]}),
        (None, None),
        (True, True),
    ]
    line = json_line({"values": [value for value, _ in values]})
    assert "\n" not in line
    assert json.loads(line) == {"values": [expected for _, expected in values]}


def test_the_result_goes_to_standard_output_and_prints_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: SampleConfig) -> Mapping[str, object]:
        print("painting", config.fence)
        return {"coats": config.coats}

    assert main(SampleConfig, run, ["--fence=x"]) == 0
    out, err = capsys.readouterr()
    assert out == '{"coats": 2}\n'
    assert err == "painting x\n"


NOISY_JOB = """
import atexit, ctypes, dataclasses, logging, os, subprocess, sys, threading
from jobs.cli import main

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    coats: int = 2

done = threading.Event()

def late():
    done.wait()
    print("late thread")

def run(config):
    print("python")
    print("log line", file=sys.__stdout__)
    logging.getLogger("pipelines.painting").info("progress")
    logging.getLogger("stranger").info("chatter")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"from C")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    threading.Thread(target=late).start()
    atexit.register(print, "at exit")
    return {"coats": config.coats}

code = main(Config, run)
done.set()
sys.exit(code)
"""


def run_script(script: Path, *flags: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Started where it lies, with no ``PYTHONPATH`` but one among ``extra``, more variables."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | extra
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False)


def test_standard_output_holds_the_line_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(NOISY_JOB, encoding="utf-8")
    done = run_script(script, "--coats=3", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (0, '{"coats": 3}\n')
    for text in ("python", "log line", "INFO progress", "descriptor", "from C", "child", "late thread", "at exit"):
        assert text in done.stderr
    assert "chatter" not in done.stderr


@pytest.mark.parametrize(
    ("closed", "line"),
    [("<&-", '{"coats": 2}\n'), (">&-", ""), ("2>&-", '{"coats": 2}\n'), ("<&- >&- 2>&-", "")],
)
def test_a_stream_that_is_closed_harms_nobody(closed: str, line: str, tmp_path: Path) -> None:
    """A file that is opened in its place would get what is printed."""
    script = tmp_path / "noisy.py"
    script.write_text(NOISY_JOB, encoding="utf-8")
    start = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, str(script)]
    done = subprocess.run(
        start, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, line)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", COMMANDS)
def test_every_script_has_help(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [job, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert end.value.code == 0
    assert " --config FILE " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["convert", "--coat=3"], 2, "error: --coat=3: unknown flag; --help lists them all\n"),
        (["paint"], 2, "error: job=paint: choose one of convert, "),
        ([], 2, "error: job=: choose one of convert, "),
    ],
)
def test_the_command_runs_the_job_that_it_names(
    argv: list[str], code: int, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pspnet", *argv])
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == code
    assert capfd.readouterr().err.startswith(text)


@pytest.mark.parametrize("uploaded", [True, False])
def test_the_uploaded_working_dir_goes_before_the_installed_project(uploaded: bool, tmp_path: Path) -> None:
    """``ray job submit --working-dir`` puts its folder on ``PYTHONPATH``, so the code sent is what runs."""
    for room in ("jobs", "pipelines", "pspnet_core"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    script = tmp_path / "probe" / "probe.py"
    script.parent.mkdir()
    script.write_text("import jobs, pipelines, pspnet_core as core\nprint(jobs, pipelines, core, sep='\\n')")
    done = run_script(script, **({"PYTHONPATH": str(tmp_path)} if uploaded else {}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"from '{tmp_path}") == (3 if uploaded else 0)
