"""What a run logs, on a real server whose files lie in a bucket."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient

from pipelines.process.redaction import HIDDEN
from pipelines.tracking import runs
from pipelines.tracking.runs import Run, code_version, environment, resume_run, start_run
from pipelines.tracking.server import TrackingError, patiently, reaching
from pspnet_core import __version__
from tests.support.mlflowserver import MlflowServer
from tests.support.paths import ROOT

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
CONFIG: dict[str, Any] = {
    "data": f"s3://AKIAEXAMPLE:{SECRET}@bucket/street",
    "output": "https://account.example/runs?sv=2024&sig=c2lnbmF0dXJl",
    "scale": (0.5, 2.0),
    "init": None,
    "epochs": 3,
    "notes": "x" * 7000,
}


def text_of(run: Run, name: str) -> str:
    return mlflow.artifacts.load_text(f"{run.client.get_run(run.run_id).info.artifact_uri}/{name}")


def test_the_setting_of_a_run_without_its_credentials(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    run = start_run("runs", f"street {SECRET}")
    many = {f"field_{index:03d}": index for index in range(150)}  # more than one request takes
    run.log_setting(CONFIG | many, card={"pixels": [1, 2], "source": f"s3://a:{SECRET}@bucket"})
    run.log_text("notes/log.txt", "token hf_0123456789 refused")
    run.log_tags({"place": f"s3://a:{SECRET}@bucket", "long": "y" * 6000})
    run.log_picture("pictures/confusion.png", b"\x89PNG")
    run.finish("FINISHED")

    found = MlflowClient(mlflow_server.uri).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    params = found.data.params
    assert params["data"] == f"s3://{HIDDEN}@bucket/street"
    assert params["output"] == f"https://account.example/runs?sv=2024&sig={HIDDEN}"
    assert (params["init"], params["scale"], params["field_149"]) == ("None", "[0.5, 2.0]", "149")
    assert params["notes"] == "x" * 5997 + "..."
    config = yaml.safe_load(text_of(run, "config.yaml"))
    assert config["notes"] == CONFIG["notes"]
    assert config["scale"] == [0.5, 2.0]
    assert json.loads(text_of(run, "environment.json"))["packages"].keys() >= {"torch", "ray", "mlflow"}
    assert json.loads(text_of(run, "data_card.json")) == {"pixels": [1, 2], "source": f"s3://{HIDDEN}@bucket"}
    assert text_of(run, "notes/log.txt") == f"token {HIDDEN} refused"
    assert [item.path for item in run.client.list_artifacts(run.run_id, "pictures")] == ["pictures/confusion.png"]
    assert found.data.tags["code.version"] == __version__
    everything = json.dumps(found.to_dictionary()) + text_of(run, "config.yaml")
    assert SECRET not in everything and "c2lnbmF0dXJl" not in everything


def test_a_run_is_taken_up_again(mlflow_server: MlflowServer) -> None:
    run = start_run("runs", "broken off")
    run.log_metrics({"loss": 2.0}, step=1)
    run.finish("FAILED")
    again = resume_run("runs", "broken off", run.run_id)
    assert again.run_id == run.run_id
    again.log_metrics({"loss": 1.0}, step=2)
    found = again.client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics["loss"]) == ("RUNNING", 1.0)
    # One that the server never had, and none at all: another run begins.
    assert resume_run("runs", "new", "0" * 32).run_id not in (run.run_id, "0" * 32)
    assert resume_run("runs", "new", None).run_id != run.run_id


def test_a_refusal_is_not_waited_out(mlflow_server: MlflowServer) -> None:
    run = start_run("runs", "refused")
    run.log_params({"batch": 4})
    with pytest.raises(TrackingError, match="cannot be used"):  # patience is ten minutes
        run.log_params({"batch": 8})


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    attempts = iter([ConnectionError("refused\nby peer"), ConnectionError("refused"), None])

    def away_at_first() -> str:
        error = next(attempts)
        if error:
            raise error
        return "done"

    assert patiently("http://me:password1@host.example", away_at_first, seconds=60) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        f"MLflow at http://{HIDDEN}@host.example does not answer (refused); trying for 60 s more",
        f"MLflow at http://{HIDDEN}@host.example answers again",
    ]


def test_a_mistake_of_the_program_is_not_waited_out() -> None:
    attempts = []

    def broken() -> None:
        attempts.append(1)
        raise TypeError("no number")

    with pytest.raises(TrackingError, match="no number"):
        patiently("http://me:password1@host.example", broken, seconds=600)
    assert len(attempts) == 1


def test_a_refusal_that_was_told_already_is_not_waited_out_either() -> None:
    attempts = []

    def refused() -> None:
        attempts.append(1)
        with reaching("http://host.example"):
            raise MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST)

    with pytest.raises(TrackingError, match="no such run"):
        patiently("http://host.example", refused, seconds=600)
    assert len(attempts) == 1


def test_a_failed_run_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    Run(uri="http://127.0.0.1:9", run_id="0" * 32, patience=0).finish("FAILED")
    assert "stays open: MLflow at http://127.0.0.1:9 cannot be used" in caplog.text


def test_an_error_names_the_server_without_its_password() -> None:
    def away() -> None:
        raise ConnectionError("http://me:password1@host.example/api refused")

    with pytest.raises(TrackingError) as caught:
        patiently("http://me:password1@host.example", away, seconds=0)
    assert "password1" not in str(caught.value)
    assert f"MLflow at http://{HIDDEN}@host.example cannot be used" in str(caught.value)
    assert "password1" not in repr(Run(uri="http://me:password1@host.example", run_id="1"))


def test_the_environment_is_this_one() -> None:
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.dumps(found)


def test_the_commit_is_that_of_the_checkout() -> None:
    tags = code_version()
    root = ROOT
    assert tags["code.version"] == __version__
    if (root / ".git").exists():
        said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert tags["mlflow.source.git.commit"] == said.stdout.strip()


def test_the_code_is_known_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a submitted job is: without its repository."""
    root = ROOT
    for room in ("jobs", "pipelines", "pspnet_core"):
        shutil.copytree(root / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    here = code_version()
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "pipelines/tracking/runs.py"))
    assert code_version() == {key: here[key] for key in ("code.version", "code.sha256")}
    (tmp_path / "jobs/label.py").write_text("changed")
    assert code_version()["code.sha256"] != here["code.sha256"]
