"""How training's driver deals with MLflow, without a Ray: the workers' part is replaced."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient

from pipelines.demo.demo import draw_dataset
from pipelines.process.config_tree import build
from pipelines.tracking.server import TrackingError, tracking_uri
from pipelines.training import job
from pipelines.training.config import TrainConfig
from pipelines.training.job import train
from tests.support.faultproxy import FaultProxy, Rule, answer

EXPERIMENT = b'{"experiment": {"experiment_id": "3", "name": "pspnet-training"}}'


@pytest.fixture
def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Trains with a stand-in for the workers."""
    monkeypatch.setattr(job, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    draw_dataset(tmp_path / "data", train=4, val=2, seed=0)
    small: dict[str, Any] = {"backbone": "resnet18", "output_stride": 32, "bins": (1, 2), "crop": 48, "batch": 4}

    def run(fit: Callable[..., None]) -> None:
        monkeypatch.setattr(job, "_fit", fit)
        train(build(TrainConfig, {"data": str(tmp_path / "data"), "output": str(tmp_path / "runs")} | small))

    return run


@pytest.mark.usefixtures("tracking_home")
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (RuntimeError("broken"), "FAILED")])
def test_a_run_that_breaks_off_is_closed(
    run_job: Callable[[Callable[..., None]], None], tmp_path: Path, error: BaseException, status: str
) -> None:
    def fit(*arguments: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        run_job(fit)
    run_id = json.loads((tmp_path / "runs/pspnet/config.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri()).get_run(run_id).info.status == status


def test_a_server_that_keeps_no_models_is_told_before_any_step(
    run_job: Callable[[Callable[..., None]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: Any) -> None:
        raise AssertionError("the server was to be asked before")

    with FaultProxy("http://127.0.0.1:9") as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        proxy.add(Rule(answer(200, EXPERIMENT), path="experiments/get-by-name"))
        proxy.add(Rule(answer(404, b"<!doctype html><title>404 Not Found</title>"), path="logged-models"))
        with pytest.raises(TrackingError, match="that the server is MLflow 3 or later"):
            run_job(fit)
    assert not (tmp_path / "runs/pspnet").exists()  # the same command may be given again
