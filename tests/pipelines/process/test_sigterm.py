"""SIGTERM: what it sets off in a process, and a labelling job that gets one."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from jobs.cli import parse_config
from pipelines.demo.demo import draw_dataset
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.process.sigterm import Ending, on_sigterm, own_sigint
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE_S, until

IMAGES = 80


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("handled", [lambda *_: sys.exit(0), lambda *_: None, lambda *_: 1 / 0])
def test_ctrl_c_stays_a_keyboard_interrupt(handled: Callable[..., Any]) -> None:
    """Ray Train puts a handler in its place that ends the process with exit code 0."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), own_sigint():
        signal.signal(signal.SIGINT, handled)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_without_ctrl_c_errors_stay_what_they_are() -> None:
    with own_sigint():
        pass
    with pytest.raises(SystemExit) as caught, own_sigint():
        sys.exit(3)
    assert caught.value.code == 3


@pytest.mark.parametrize("signals", [0, 1])
def test_in_an_orderly_stretch_the_first_signal_stops_and_the_work_goes_on_to_its_end(signals: int) -> None:
    before, stopped = signal.getsignal(signal.SIGTERM), threading.Event()
    with on_sigterm() as ending, ending.orderly(stopped.set):
        for _ in range(signals):
            send()
            assert stopped.wait(60)
    assert ending.came == stopped.is_set() == bool(signals)
    assert signal.getsignal(signal.SIGTERM) == before


def twice(ending: Ending) -> None:
    with ending.orderly(lambda: None):
        send()
        send()


def after_the_stretch(ending: Ending) -> None:
    with ending.orderly(lambda: pytest.fail("nothing is under way")):
        pass
    send()


def in_a_call_that_exits(ending: Ending) -> None:
    """As Ray does, with a code of its own."""
    try:
        send()
    except SystemExit:
        sys.exit(1)


@pytest.mark.parametrize(
    ("work", "code"),
    [(twice, 143), (after_the_stretch, 143), (in_a_call_that_exits, 143), (lambda ending: sys.exit(1), 1)],
)
def test_a_signal_ends_the_process(work: Callable[[Ending], None], code: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, on_sigterm() as ending:
        work(ending)
    assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with on_sigterm() as ending, ending.orderly(lambda: None):
            seen.append((ending.came, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.usefixtures("ray_cluster")
def test_sigterm_ends_a_job_in_order(tmp_path: Path, scene_model: Path, tracking_home: Path) -> None:
    """What was begun is written, nothing else; the same command does the rest."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = MlflowClient(uri)
    experiment = client.create_experiment("pspnet-labelling", str(tmp_path / "artifacts"))
    draw_dataset(tmp_path / "data", train=IMAGES, val=0, seed=0)
    images = tmp_path / "data/images/train"
    given = {"input": images, "output": tmp_path / "labels", "model": scene_model, "chunk": 1}
    flags = [f"--{name}={value}" for name, value in (given | {"date": "2026-01-31", "track": True}).items()]
    config = parse_config(LabelConfig, flags)
    log, files = tmp_path / "log", config.output + "/masks/*/*/*.parquet"

    def written() -> list[Path]:
        return list(Path(config.output).glob("masks/*/*/*.parquet"))

    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, ROOT / "jobs/label.py", *flags],
            env=os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        try:
            until(lambda: bool(written()) and bool(client.search_runs([experiment])), process, log)
            process.terminate()
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 143, log.read_text()[-3000:]
    result = json.loads(output.splitlines()[-1])
    assert result["stopped"] is True
    assert (result["images"], result["skipped"], result["errors"]) == (result["labelled"], 0, 0)
    assert 0 < len(written()) == result["labelled"] < IMAGES
    for file in written():
        assert pq.read_table(file).num_rows == 1
    assert not (tmp_path / "labels" / "runs").exists()
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    assert run.data.metrics["labelled"] == result["labelled"]

    again = label(config)
    assert (again["run_id"], again["labelled"], again["errors"]) == (result["run_id"], IMAGES - result["labelled"], 0)
    counted = duckdb.execute("SELECT count(*), count(DISTINCT uri) FROM read_parquet(?)", [files]).fetchall()
    assert counted == [(IMAGES, IMAGES)]
    assert (tmp_path / "labels" / "runs" / f"{again['run_id']}.json").exists()
    assert sorted(run.info.status for run in client.search_runs([experiment])) == ["FINISHED", "KILLED"]
