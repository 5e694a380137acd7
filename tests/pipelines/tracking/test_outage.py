"""A real MLflow server that goes away in the middle of a run and comes back: nothing is lost."""

import threading

import pytest
from mlflow.tracking import MlflowClient

from pipelines.process.retrying import Retries
from pipelines.tracking.metrics_log import MetricsLog
from pipelines.tracking.runs import Run, start_run
from pipelines.tracking.server import Server, TrackingError
from tests.support.mlflowserver import MlflowServer

SECONDS = 120.0  # a busy machine takes long to start a server


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pipelines.process.retrying"]


def test_a_server_that_goes_away_loses_nothing(mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture) -> None:
    run = start_run("outage", "outage", server=Server(patience=SECONDS))
    hasty = Run(server=Server(patience=0), run_id=run.run_id)
    metrics = MetricsLog(run, every=0.05, retries=Retries(first_wait=0.1, longest_wait=0.3, jitter=0))
    metrics.add(0, {"loss": 10.0})
    assert metrics.flush(SECONDS)

    mlflow_server.stop()
    for step in range(1, 1500):
        metrics.add(step, {"loss": 10.0 - step, "rate": 0.1})
    metrics.add_file("pictures/late.png", b"png")
    with pytest.raises(TrackingError, match="cannot be used"):
        hasty.log_metrics({"miou": 0.5}, step=1)
    with pytest.raises(TrackingError, match="cannot be used"):
        hasty.finish("FINISHED")
    while not told(caplog):
        assert not metrics.flush(0.1)
    assert len(metrics.pending()) == 1499

    starter = threading.Thread(target=mlflow_server.start)
    starter.start()
    run.finish("FINISHED")  # waits for the server
    metrics.close(SECONDS)
    starter.join()
    client = MlflowClient(mlflow_server.uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    losses = client.get_metric_history(run.run_id, "loss")
    assert sorted((point.step, point.value) for point in losses) == [(step, 10.0 - step) for step in range(1500)]
    assert len(client.get_metric_history(run.run_id, "rate")) == 1499
    assert [entry.path for entry in client.list_artifacts(run.run_id, "pictures")] == ["pictures/late.png"]
    mlflow = f"MLflow at {mlflow_server.uri}"
    assert {line.partition(" (")[0].partition(" after")[0] for line in told(caplog)} == {
        f"{mlflow} does not answer",
        f"{mlflow} answers again",
    }

    # The answer to a request that did arrive may be lost: the same points again change nothing.
    with MetricsLog(run, every=0.05) as again:
        again.restore([[point.step, point.timestamp, {"loss": point.value}] for point in losses])
    assert len(client.get_metric_history(run.run_id, "loss")) == 1500
