"""MLflow's model registry: a checkpoint becomes a version of a model, and a version the champion."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from pipelines.process.redaction import redacted
from pipelines.tracking.answers import ABSENT, EXISTS, Suppress
from pipelines.tracking.pyfunc_folder import save_pyfunc
from pipelines.tracking.runs import LONGEST_TAG, Run, experiment_id
from pipelines.tracking.server import START_S, Server
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint

CHAMPION = "champion"
MODEL = "model"
"""The name of a run's model, as in ``runs:/ID/model``."""


def check_keeps_models(experiment: str) -> None:
    """Ask for logged models, which a server before MLflow 3 does not know: training would end without a model.

    Args:
        experiment: the one of the runs to come; it is made if need be.

    Raises:
        TrackingError: it does not know them, or does not answer.
    """
    server = Server(patience=START_S)
    place = server.call(lambda client: experiment_id(client, server.uri, experiment))
    server.call(lambda client: client.search_logged_models([place], max_results=1))


def log_model(
    run: Run, folder: Path, name: str, *, miou: float | None = None, data: str | None = None, step: int = 0
) -> str:
    """Log a checkpoint folder as the run's model ``model`` and register it; returns ``models:/name/version``.

    A checkpoint that the run has registered already stays the version that it is.

    Args:
        folder: a checkpoint.
        name: of the registered model.
        miou: its score, 0 to 1.
        data: fingerprint of what it was scored on.
        step: the step that it is from.

    Raises:
        ConfigError: when the folder is no checkpoint.
        TrackingError: when the server cannot be used.
    """
    checkpoint, server = load_checkpoint(folder), run.server
    if known := server.call(lambda client: _registered(client, run.run_id, name, checkpoint.fingerprint)):
        return known
    # Call by call: what has arrived is not sent again.
    logged = _create_logged_model(run)
    with tempfile.TemporaryDirectory() as place:
        packed = Path(place) / MODEL
        about = Model(
            artifact_path=logged.artifact_location,
            run_id=run.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        save_pyfunc(checkpoint, packed, about)
        server.call(lambda client: client.log_model_artifacts(logged.model_id, str(packed)))
    server.call(lambda client: _log_output(client, run.run_id, logged.model_id, step))
    server.call(lambda client: client.finalize_logged_model(logged.model_id, "READY"))
    server.call(lambda client: _ensure_registered(client, name))
    version = server.create(
        lambda client, own: client.create_model_version(
            name,
            logged.artifact_location,
            run.run_id,
            tags=_tags(checkpoint, miou, data) | own,
            model_id=logged.model_id,
        ),
        lambda client, own: list(client.search_model_versions(f"name = '{name}' AND {own}")),
    )
    return f"models:/{name}/{version.version}"


def _registered(client: MlflowClient, run_id: str, name: str, fingerprint: str) -> str | None:
    """The version that a run has made of a checkpoint; None where it has made none."""
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    found = [each.version for each in versions if each.tags.get("fingerprint") == fingerprint]
    return f"models:/{name}/{min(found, key=int)}" if found else None


def _create_logged_model(run: Run) -> LoggedModel:
    experiment = run.server.call(lambda client: client.get_run(run.run_id)).info.experiment_id
    return run.server.create(
        lambda client, own: client.create_logged_model(
            experiment, MODEL, run.run_id, tags=own, model_type="segmentation"
        ),
        lambda client, own: list(client.search_logged_models([experiment], own)),
    )


def _log_output(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    outputs = client.get_run(run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _ensure_registered(client: MlflowClient, name: str) -> None:
    with Suppress(EXISTS):
        client.create_registered_model(name)


def _tags(checkpoint: Checkpoint, miou: float | None, data: str | None) -> dict[str, str]:
    tags = {
        "classes": _class_tag(checkpoint),
        "fingerprint": checkpoint.fingerprint,
        "miou": None if miou is None else repr(float(miou)),
        "data": data,
    }
    return {name: redacted(value) for name, value in tags.items() if value is not None}


def _class_tag(checkpoint: Checkpoint) -> str:
    """The class names; of those that are too many for a tag, their number and a hash."""
    names = json.dumps(checkpoint.classes.names)
    if len(names) <= LONGEST_TAG:
        return names
    return f"{len(checkpoint.classes)} names, SHA-256 {hashlib.sha256(names.encode()).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The version that has the alias ``@champion``.

    Attributes:
        uri: ``models:/name/version``.
        miou: the score that it was logged with, 0 to 1.
        data: fingerprint of what it was scored on.
    """

    uri: str
    miou: float | None
    data: str | None


def champion_of(server: Server, name: str) -> Champion | None:
    """The champion of a registered model; None when it has none.

    Raises:
        TrackingError: when the server cannot be used.
    """
    version = server.call(lambda client: _champion(client, name))
    if version is None:
        return None
    miou = version.tags.get("miou")
    return Champion(
        uri=f"models:/{name}/{version.version}",
        miou=None if miou is None else float(miou),
        data=version.tags.get("data"),
    )


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    with Suppress(*ABSENT):
        return client.get_model_version_by_alias(name, CHAMPION)
    return None


def set_champion(server: Server, model: str) -> None:
    """Move the alias ``@champion`` to ``models:/name/version``.

    Two processes that do so at the same moment may overtake each other: MLflow has no conditional change of an alias.

    Raises:
        TrackingError: when the server cannot be used.
    """
    name, version = model.removeprefix("models:/").rsplit("/", 1)
    server.call(lambda client: client.set_registered_model_alias(name, CHAMPION, version))
