"""A checkpoint registered in MLflow at once, without what a model holds besides it."""

from pathlib import Path

from mlflow.tracking import MlflowClient

from pipelines.tracking.model_uris import CHECKPOINT


def register(
    client: MlflowClient, checkpoint: Path, name: str, *, experiment: str, tags: dict[str, str] | None = None
) -> str:
    """Log a checkpoint folder as the model of a new run, and register it; returns the run's id.

    Args:
        experiment: an experiment's id.
        tags: of the version.
    """
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(checkpoint), f"model/{CHECKPOINT}")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id, tags=tags)
    return str(run.info.run_id)
