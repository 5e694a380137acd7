"""An MLflow run that is written in the background, and what labelling leaves in it."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow.entities import Run as Found
from mlflow.tracking import MlflowClient

from pipelines.demo.demo import draw_bucket
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.process.config_tree import build
from pipelines.tracking import background_run as module
from pipelines.tracking.background_run import background_run
from pipelines.tracking.model_uris import Origin, origin_of
from pipelines.tracking.registry import set_champion
from pipelines.tracking.runs import Run
from pipelines.tracking.server import Server, TrackingError, local_tracking, tracking_uri
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.errors import ConfigError, Terminated
from tests.support.mlflowserver import MlflowServer
from tests.support.registered import register

SECRET = "hunter2hunter2"
PATIENCE_S = 240


def only_run(experiment: str) -> Found:
    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_tracking: Path) -> Iterator[None]:
    """An MLflow store for all tests of this file, which the environment names."""
    with local_tracking(shutil.copytree(empty_tracking, tmp_path_factory.mktemp("tracking") / "home")):
        yield


@pytest.fixture(scope="module")
def registered(store: None, scene_model: Path) -> tuple[str, str]:
    """A checkpoint is version 1 of ``scenes``, and the champion: its version's URI and its run's id."""
    run_id = register(scene_model, "scenes")
    set_champion(Server(), "models:/scenes/1")
    return "models:/scenes/1", run_id


@pytest.mark.usefixtures("store")
def test_what_is_logged_arrives_in_order_and_one_failure_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Run) -> None:
        raise TrackingError("no such thing")

    with background_run("nights", "street") as run:
        run.log(lambda run: run.log_tags({"step": "one"}))
        run.log(refuse)
        run.log(lambda run: run.log_tags({"step": "two"}))
    found = only_run("nights")
    assert (found.info.run_name, found.info.status, found.data.tags["step"]) == ("street", "FINISHED", "two")
    assert "not logged: no such thing" in caplog.text


@pytest.mark.usefixtures("store")
def test_an_error_ends_the_run_too() -> None:
    with pytest.raises(Terminated), background_run("ended", "street") as run:
        run.log(lambda run: run.log_tags({"step": "one"}))
        raise Terminated({})
    assert only_run("ended").info.status == "KILLED"


@pytest.mark.usefixtures("tracking_home")
def test_without_an_action_there_is_no_run() -> None:
    with pytest.raises(ConfigError), background_run("nights", "street"):
        raise ConfigError("input", "", "give one")
    assert [found.name for found in MlflowClient(tracking_uri()).search_experiments()] == ["Default"]


@pytest.fixture
def config(tmp_path: Path, scene_model: Path) -> Callable[..., LabelConfig]:
    """Makes configs for a small bucket, whose name holds a secret: three images and four broken files."""
    draw_bucket(tmp_path / SECRET, images=3, seed=0)
    places = {"input": str(tmp_path / SECRET), "output": str(tmp_path / "labels"), "model": str(scene_model)}
    return lambda **changes: build(LabelConfig, places | {"local": True} | changes)


def test_a_labelling_run_and_the_model_that_did_it(
    config: Callable[..., LabelConfig],
    registered: tuple[str, str],
    scene_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BUCKET_TOKEN", SECRET)
    version, trained_by = registered
    result = label(config(model="models:/scenes@champion", price_cpu=0.1, date="2026-01-31"))
    found = only_run("pspnet-labelling")
    data = found.data
    assert (found.info.status, data.tags["run_id"]) == ("FINISHED", result["run_id"])
    assert (data.tags["model_version"], data.tags["source_run_id"]) == (version, trained_by)
    assert data.params["fingerprint"] == load_checkpoint(scene_model).fingerprint
    assert (data.params["model"], data.params["date"]) == ("models:/scenes@champion", "2026-01-31")
    counts = {name: data.metrics[name] for name in ("images", "labelled", "skipped", "errors", "errors_by_kind/Empty")}
    assert counts == {"images": 7, "labelled": 3, "skipped": 0, "errors": 4, "errors_by_kind/Empty": 1}
    assert data.metrics["gpu_seconds"] == 0
    assert data.metrics["cpu_seconds"] > 0
    assert data.metrics["stage_wall_seconds/segment"] > data.metrics["stage_wall_seconds/predict"] > 0
    assert data.metrics["cost"] == pytest.approx(data.metrics["cpu_seconds"] / 3600 * 0.1, rel=1e-3)
    version_tags = MlflowClient(tracking_uri()).get_model_version("scenes", "1").tags
    assert version_tags["labelling"] == found.info.run_id

    name = f"runs/{result['run_id']}.json"
    record = mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/{name}")
    assert record == json.loads((tmp_path / "labels" / name).read_text())
    assert (record["model_version"], record["model_run_id"]) == (version, trained_by)
    assert record["fingerprint"] == data.params["fingerprint"]
    assert record["code"]["version"] == record["version"]
    logged = json.dumps([data.params, data.tags, record])
    logged += mlflow.artifacts.load_text(f"{found.info.artifact_uri}/config.yaml")
    assert SECRET not in logged
    assert "***" in data.params["input"]


def test_a_server_that_is_away_holds_nothing_up(
    config: Callable[..., LabelConfig],
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The labels are written and the job ends well. What a process that lives on has not logged it logs later."""
    monkeypatch.setattr(module, "END_S", 0.1)
    mlflow_server.stop()
    with caplog.at_level(logging.WARNING):
        result = label(config(experiment="outage"))
    assert (result["labelled"], result["errors"]) == (3, 4)
    assert "does not answer" in caplog.text
    assert "this run is not there" in caplog.text
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "mlflow-run")
    mlflow_server.start()
    thread.join(PATIENCE_S)
    found = only_run("outage")
    assert (found.info.status, found.data.metrics["labelled"]) == ("FINISHED", 3)


def test_where_models_come_from(registered: tuple[str, str], scene_model: Path) -> None:
    version, run_id = registered
    expected = Origin(uri=version, version=version, run_id=run_id)
    assert origin_of("models:/scenes@champion") == expected
    assert origin_of("models:/scenes/1") == expected
    assert origin_of("models:/scenes/latest") == expected
    assert origin_of(f"runs:/{run_id}/model") == Origin(uri=f"runs:/{run_id}/model", run_id=run_id)
    for elsewhere in (str(scene_model), "s3://bucket/model"):
        assert origin_of(elsewhere) == Origin(uri=elsewhere)
    for missing in ("models:/scenes@nobody", "models:/scenes/7", "models:/others/1"):
        with pytest.raises(ConfigError, match=f"^model={missing}"):
            origin_of(missing)
