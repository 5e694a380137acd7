"""A checkpoint registered in MLflow at once, without what a model holds besides it."""

from pathlib import Path

from pipelines.tracking.model_uris import CHECKPOINT
from pipelines.tracking.runs import experiment_id
from pipelines.tracking.server import Server


def register(checkpoint: Path, name: str, *, tags: dict[str, str] | None = None) -> str:
    """Log a checkpoint folder as the model of a new run, and register it with these tags; returns the run's id."""
    server = Server()
    client = server.client
    run = client.create_run(experiment_id(client, server.uri, "training"))
    client.log_artifacts(run.info.run_id, str(checkpoint), f"model/{CHECKPOINT}")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id, tags=tags)
    return str(run.info.run_id)
