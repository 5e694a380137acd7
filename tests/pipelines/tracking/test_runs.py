"""What a run logs, on a real server whose files lie in a bucket."""

import getpass
import json
import pickle
import shutil
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from pipelines.process.redaction import HIDDEN
from pipelines.process.retrying import Retries
from pipelines.tracking import provenance
from pipelines.tracking.metrics_log import MetricsLog
from pipelines.tracking.provenance import code_version
from pipelines.tracking.runs import Run, TrackingConfig, resume_run, start_run, status_after
from pipelines.tracking.server import Server, TrackingError
from pspnet_core import __version__
from pspnet_core.errors import Terminated
from tests.support.mlflowserver import MlflowServer
from tests.support.paths import ROOT
from tests.support.servers import request

SECONDS = 120.0  # a busy machine takes long to start a server
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
AWAY = Server(uri="http://127.0.0.1:9", patience=0)
CONFIG: dict[str, Any] = {
    "data": f"s3://AKIAEXAMPLE:{SECRET}@bucket/street",
    "output": "https://account.example/runs?sv=2024&sig=c2lnbmF0dXJl",
    "scale": (0.5, 2.0),
    "init": None,
    "epochs": 3,
    "notes": "x" * 7000,
}


def text_of(run: Run, name: str) -> str:
    return mlflow.artifacts.load_text(f"{run.server.client.get_run(run.run_id).info.artifact_uri}/{name}")


def test_the_setting_of_a_run_without_its_credentials(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    run = start_run("runs", f"street {SECRET}")
    many = {f"field_{index:03d}": index for index in range(150)}  # more than one request takes
    run.log_setting(CONFIG | many, card={"pixels": [1, 2], "source": f"s3://a:{SECRET}@bucket"})
    run.log_json("notes/log.json", ["token hf_0123456789 refused"])
    run.log_tags({"place": f"s3://a:{SECRET}@bucket", "long": "y" * 6000})
    run.log_file("pictures/confusion.png", b"\x89PNG")
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
    assert json.loads(text_of(run, "environment.json"))["packages"]["torch"] == torch.__version__
    assert json.loads(text_of(run, "data_card.json")) == {"pixels": [1, 2], "source": f"s3://{HIDDEN}@bucket"}
    assert json.loads(text_of(run, "notes/log.json")) == [f"token {HIDDEN} refused"]
    pictures = run.server.client.list_artifacts(run.run_id, "pictures")
    assert [item.path for item in pictures] == ["pictures/confusion.png"]
    tags = found.data.tags
    assert tags["code.version"] == __version__
    assert (tags["mlflow.user"], tags["mlflow.source.type"]) == (getpass.getuser(), "LOCAL")
    assert tags["mlflow.source.name"] == sys.argv[0]
    everything = json.dumps(found.to_dictionary()) + text_of(run, "config.yaml")
    assert SECRET not in everything and "c2lnbmF0dXJl" not in everything


def test_a_run_is_taken_up_again(mlflow_server: MlflowServer) -> None:
    run = start_run("runs", "broken off")
    run.log_metrics({"loss": 2.0}, step=1)
    run.finish("FAILED")
    again = resume_run("runs", "broken off", run.run_id)
    assert again.run_id == run.run_id
    again.log_metrics({"loss": 1.0}, step=2)
    found = again.server.client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics["loss"]) == ("RUNNING", 1.0)
    # One that the server never had: another run begins.
    assert resume_run("runs", "new", "0" * 32).run_id not in (run.run_id, "0" * 32)


def test_a_server_that_goes_away_loses_nothing(mlflow_server: MlflowServer) -> None:
    run = start_run("runs", "outage", server=Server(patience=SECONDS))
    metrics = MetricsLog(run, every=0.05, retries=Retries(first_wait=0.1, longest_wait=0.3, jitter=0))
    metrics.add(0, {"loss": 10.0})
    assert metrics.flush(SECONDS)
    mlflow_server.stop()
    for step in range(1, 1500):
        metrics.add(step, {"loss": 10.0 - step, "rate": 0.1})
    with pytest.raises(TrackingError, match="cannot be used"):
        Run(server=Server(patience=0), run_id=run.run_id).finish("FINISHED")
    assert not metrics.flush(0.1)
    assert len(metrics.pending()) == 1499
    starter = threading.Thread(target=mlflow_server.start)
    starter.start()
    run.finish("FINISHED")  # waits for the server
    metrics.close(SECONDS)
    starter.join()
    client = run.server.client
    assert client.get_run(run.run_id).info.status == "FINISHED"
    losses = client.get_metric_history(run.run_id, "loss")
    assert sorted((point.step, point.value) for point in losses) == [(step, 10.0 - step) for step in range(1500)]
    assert len(client.get_metric_history(run.run_id, "rate")) == 1499
    # The answer to a request that did arrive may be lost: the same points again change nothing.
    with MetricsLog(run, every=0.05) as again:
        again.restore([[point.step, point.timestamp, {"loss": point.value}] for point in losses])
    assert len(client.get_metric_history(run.run_id, "loss")) == 1500


def test_the_end_of_a_broken_run_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    Run(server=AWAY, run_id="0" * 32).finish("FAILED")
    assert "stays open: MLflow at http://127.0.0.1:9 cannot be used" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("broken"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (Terminated({}), "KILLED"),
    ],
)
def test_a_run_ends_as_its_work_did(error: BaseException | None, status: str) -> None:
    assert status_after(error) == status


@pytest.mark.parametrize(
    ("server", "model", "track", "wanted"),
    [
        ("", "folder", None, False),
        ("", "models:/a@champion", None, True),
        ("", "runs:/0/model", None, True),
        ("http://127.0.0.1:9", "folder", None, True),
        ("http://127.0.0.1:9", "models:/a/1", False, False),
        ("", "folder", True, True),
    ],
)
def test_when_a_job_is_logged(
    server: str, model: str, track: bool | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert TrackingConfig(track=track).wanted(model) == wanted


def test_an_error_names_the_server_without_its_password() -> None:
    def away(client: MlflowClient) -> None:
        raise ConnectionError("http://me:password1@host.example/api refused")

    run = Run(server=Server(uri="http://me:password1@host.example", patience=0), run_id="1")
    with pytest.raises(TrackingError) as caught:
        run.server.call(away)
    assert "password1" not in str(caught.value)
    assert f"MLflow at http://{HIDDEN}@host.example cannot be used" in str(caught.value)
    assert "password1" not in repr(run)
    assert pickle.loads(pickle.dumps(run)) == run


def test_the_commit_is_that_of_the_checkout() -> None:
    tags = code_version()
    assert tags["code.version"] == __version__
    if (ROOT / ".git").exists():
        said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert tags["mlflow.source.git.commit"] == said.stdout.strip()


def test_the_code_is_known_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a submitted job is: without its repository."""
    for room in ("jobs", "pipelines", "pspnet_core"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    here = code_version()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pipelines/tracking/provenance.py"))
    assert code_version() == {key: here[key] for key in ("code.version", "code.sha256")}
    (tmp_path / "jobs/label.py").write_text("changed")
    assert code_version()["code.sha256"] != here["code.sha256"]


def test_a_deleted_experiment_is_named_with_what_restores_it(tracking_home: Path) -> None:
    client = Server().client
    number = client.create_experiment("nights")
    client.delete_experiment(number)
    remedy = (
        rf"the experiment nights of MLflow at .* was deleted: .*mlflow experiments restore --experiment-id {number}"
    )
    with pytest.raises(TrackingError, match=remedy):
        start_run("nights", "one")


def test_the_documented_server_is_reached_by_name(mlflow_server: MlflowServer) -> None:
    """MLflow 3 refuses names that it was not told of."""
    port = mlflow_server.uri.rpartition(":")[2]
    for host in (f"mlflow.example:{port}", "mlflow.example"):
        request(f"{mlflow_server.uri}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        request(
            f"{mlflow_server.uri}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": "evil.example"}
        )
