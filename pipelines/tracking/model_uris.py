"""Model URIs of MLflow: which version and run each stands for, and its checkpoint, fetched.

::

    runs:/ID/model   models:/name/version   models:/name/latest   models:/name@alias   models:/m-ID
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.process.redaction import first_line
from pipelines.tracking.answers import ABSENT
from pipelines.tracking.server import START_S, Server
from pspnet_core.errors import ConfigError

T = TypeVar("T")
MLFLOW_SCHEMES = ("runs:/", "models:/")
CHECKPOINT = "artifacts/checkpoint"
"""Where the checkpoint lies in a logged model."""

_VERSION_URI = re.compile(r"models:/([^/@]+)(?:/(\d+|latest)|@([^/@]+))")
_RUN_URI = re.compile(r"runs:/([^/]+)/(.+)")
_LOGGED_URI = re.compile(r"models:/(m-[0-9a-f]+)")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which model a URI stands for.

    Attributes:
        uri: where to fetch it: of an alias, the version that it stands for now.
        version: ``models:/name/version`` of a registered model.
        run_id: the MLflow run that logged it.
    """

    uri: str
    version: str | None = None
    run_id: str | None = None


def origin_of(model: str) -> Origin:
    """Look up what a model URI of any kind stands for now; errors as for ``fetch``."""
    if found := _RUN_URI.fullmatch(model):
        return Origin(uri=model, run_id=found[1])
    if not model.startswith("models:/"):
        return Origin(uri=model)

    def look_up(client: MlflowClient) -> Origin:
        if found := _LOGGED_URI.fullmatch(model):
            return Origin(uri=model, run_id=client.get_logged_model(found[1]).source_run_id)
        version = _version(client, model, "model")
        uri = f"models:/{version.name}/{version.version}"
        return Origin(uri=uri, version=uri, run_id=version.run_id or None)

    return _ask(Server(patience=START_S), look_up, model, "model")


def fetch(model: str, folder: str, *, field: str = "model", server: Server | None = None) -> Path:
    """Copy the checkpoint of an MLflow model, and nothing else of it, into ``folder``; returns where it lies.

    Args:
        model: its URI.
        field: the config field that ``model`` came from; errors name it.
        server: by default ``Server()`` with the patience of a job that starts.

    Raises:
        ConfigError: when there is no such model.
        TrackingError: when the server cannot be used.
    """
    server = server or Server(patience=START_S)

    def download(client: MlflowClient) -> Path:
        place = f"{_place(client, model, field)}/{CHECKPOINT}"
        if not mlflow.artifacts.list_artifacts(place, tracking_uri=server.uri):
            raise ConfigError(field, model, f"{server} has no checkpoint of it; give a model that train.py logged")
        return _download(place, folder, server)

    return _ask(server, download, model, field)


def fetch_file(file: str, folder: str, *, field: str) -> Path:
    """Copy one file that a run logged, ``runs:/ID/path``, into ``folder``; arguments and errors as for ``fetch``."""
    server = Server(patience=START_S)
    return _ask(server, lambda client: _download(_place(client, file, field), folder, server), file, field)


def _ask(server: Server, action: Callable[[MlflowClient], T], model: str, field: str) -> T:
    """``server.call(action)``; a ConfigError where the server has no such thing."""

    def ask(client: MlflowClient) -> T:
        try:
            return action(client)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise ConfigError(field, model, f"{server} has no such model ({first_line(error)})") from error

    return server.call(ask)


def _download(place: str, folder: str, server: Server) -> Path:
    return Path(mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=server.uri))


def _place(client: MlflowClient, model: str, field: str) -> str:
    """URI of the folder that holds a model.

    MLflow's own look-up (3.17) asks the global server, whichever client is used, and takes an outage for a run without
    the model.
    """
    if found := _LOGGED_URI.fullmatch(model):
        return client.get_logged_model(found[1]).artifact_location
    if found := _RUN_URI.fullmatch(model):
        return _place_in_run(client, found[1], found[2])
    version = _version(client, model, field)
    return client.get_model_version_download_uri(version.name, str(version.version))


def _place_in_run(client: MlflowClient, run_id: str, path: str) -> str:
    run = client.get_run(run_id).info
    if "/" not in path:
        logged = client.search_logged_models([run.experiment_id], f"name = '{path}' AND source_run_id = '{run_id}'")
        if logged:
            return logged[0].artifact_location
    return f"{run.artifact_uri}/{path}"


def _version(client: MlflowClient, model: str, field: str) -> ModelVersion:
    found = _VERSION_URI.fullmatch(model)
    if not found:
        raise ConfigError(field, model, "give models:/name/version, models:/name@alias or runs:/ID/model")
    name, version, alias = found.groups()
    if alias is not None or version == "latest":
        return client.get_model_version_by_alias(name, alias or version)
    return client.get_model_version(name, version)
