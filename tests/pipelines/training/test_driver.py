"""Training's driver without Ray: what it makes of its workers' end, and how it deals with MLflow."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipelines.tracking.server import TrackingError, tracking_uri
from pipelines.training import job
from pipelines.training.job import train
from pspnet_core.errors import ConfigError
from tests.support.faultproxy import FaultProxy, Rule, answer
from tests.support.in_process import replace_ray
from tests.support.setups import SMALL, config_of

EXPERIMENT = b'{"experiment": {"experiment_id": "3", "name": "pspnet-training"}}'


@pytest.fixture
def run_job(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains with a stand-in for the workers."""
    replace_ray(monkeypatch)

    def run(fit: Callable[..., None], **flags: Any) -> None:
        monkeypatch.setattr(job, "_torch_trainer", lambda *arguments: SimpleNamespace(fit=fit))
        train(config_of(data, output=str(tmp_path / "runs"), **SMALL, **flags))

    return run


def interrupted() -> None:
    """Ctrl-C, which Ray Train handles in its own way."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    signal.raise_signal(signal.SIGINT)


def broken() -> None:
    raise RuntimeError("broken")


@pytest.mark.usefixtures("tracking_home")
@pytest.mark.parametrize(
    ("fit", "error", "status"), [(interrupted, KeyboardInterrupt, "KILLED"), (broken, RuntimeError, "FAILED")]
)
def test_a_run_that_breaks_off_is_closed(
    run_job: Callable[[Callable[..., None]], None],
    tmp_path: Path,
    fit: Callable[[], None],
    error: type[BaseException],
    status: str,
) -> None:
    with pytest.raises(error):
        run_job(fit)
    run_id = json.loads((tmp_path / "runs/pspnet/config.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri()).get_run(run_id).info.status == status


def test_a_server_that_keeps_no_models_is_refused_before_any_step(
    run_job: Callable[[Callable[..., None]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server of MLflow 2 answers, which knows experiments, runs and versions, and no logged models."""

    def fit() -> None:
        raise AssertionError("the server was to be asked before")

    with FaultProxy("http://127.0.0.1:9") as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        proxy.add(Rule(answer(200, EXPERIMENT), path="experiments/get-by-name"))
        proxy.add(Rule(answer(404, b"<!doctype html><title>404 Not Found</title>"), path="logged-models"))
        with pytest.raises(TrackingError, match=r"404.*check .* that the server is MLflow 3 or later"):
            run_job(fit)
    assert not (tmp_path / "runs/pspnet").exists()  # the same command may be given again


def test_a_server_that_cannot_be_used_ends_the_job_in_one_line(
    run_job: Callable[[Callable[..., None]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(TrackingError, match="cannot be used") as caught:
        run_job(broken)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs/pspnet").exists()


@pytest.mark.usefixtures("tracking_home")
def test_a_damaged_record_of_a_run_is_a_mistake_in_one_line(run_job: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "runs/pspnet").mkdir(parents=True)
    (tmp_path / "runs/pspnet/config.json").write_text('{"run_id": "x"}')
    with pytest.raises(ConfigError, match=r"^resume=.*config\.json: is no record of a run") as caught:
        run_job(broken, resume=True)
    assert "\n" not in str(caught.value)
