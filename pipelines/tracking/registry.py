"""MLflow's model registry: a checkpoint becomes a version of a model, and the best version the champion.

::

    <model>/MLmodel                      signature, class table, what to run
           /pyfunc_model.py, code/       the code that predicts: pspnet_core as it was
           /artifacts/checkpoint/        the checkpoint, a folder like any other

A model logged by an older version is the bare checkpoint folder; ``fetch`` reads both.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

import pspnet_core
from pipelines.process.redaction import redacted
from pipelines.tracking.server import (
    ABSENT,
    EXISTS,
    PATIENCE_S,
    TrackingError,
    client_of,
    first_line,
    patiently,
    reaching,
    tracking_uri,
)
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pspnet_core.errors import ConfigError, PspnetError

log = logging.getLogger(__name__)
CHAMPION = "champion"
MODEL = "model"  # the name of a run's model, as in runs:/ID/model
CHECKPOINT = "artifacts/checkpoint"
CODE = Path(__file__).with_name("pyfunc_model.py")
REQUIREMENTS = ("mlflow", "torch", "numpy", "opencv-python-headless", "pillow", "safetensors")
_VERSION_URI = re.compile(r"models:/([^/@]+)(?:/(\d+|latest)|@([^/@]+))")
_RUN_URI = re.compile(r"runs:/([^/]+)/(.+)")
LONGEST_TAG = 5000
_LOGGED_URI = re.compile(r"models:/(m-[0-9a-f]+)")


def log_model(
    uri: str,
    run_id: str,
    folder: Path,
    name: str,
    *,
    miou: float | None = None,
    data: str | None = None,
    step: int = 0,
    patience: float = PATIENCE_S,
) -> str:
    """``Run.log_model``, on the server at ``uri``."""
    checkpoint = load_checkpoint(folder)
    client = client_of(uri)
    tags = _tags(checkpoint, miou, data)
    # One attempt after the other: what has arrived is not sent again.
    run = patiently(uri, lambda: client.get_run(run_id), seconds=patience)
    logged = patiently(
        uri,
        lambda: client.create_logged_model(run.info.experiment_id, MODEL, run_id, model_type="segmentation"),
        seconds=patience,
    )
    with tempfile.TemporaryDirectory() as place:
        packed = Path(place) / MODEL
        about = Model(
            artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id
        )
        save_pyfunc(checkpoint, packed, about)
        patiently(uri, lambda: client.log_model_artifacts(logged.model_id, str(packed)), seconds=patience)
    output = LoggedModelOutput(logged.model_id, step)
    patiently(uri, lambda: client.log_outputs(run_id, [output]), seconds=patience)
    patiently(uri, lambda: client.finalize_logged_model(logged.model_id, "READY"), seconds=patience)
    patiently(uri, lambda: _ensure_registered(client, name), seconds=patience)
    version = patiently(
        uri,
        lambda: client.create_model_version(
            name, logged.artifact_location, run_id, tags=tags, model_id=logged.model_id
        ),
        seconds=patience,
    )
    return f"models:/{name}/{version.version}"


def save_pyfunc(checkpoint: Checkpoint, folder: Path, about: Model | None = None) -> None:
    """Write a checkpoint as an ``mlflow.pyfunc`` model into ``folder``, which must be empty or absent.

    Args:
        about: what MLflow knows of the model already.
    """
    bands, classes = checkpoint.config.bands, len(checkpoint.classes)
    mask = np.dtype(np.uint8 if classes <= 256 else np.uint16)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, bands))]),
        outputs=Schema([TensorSpec(mask, (-1, -1, -1))]),
    )
    with tempfile.TemporaryDirectory() as place:
        artifact = Path(place) / "checkpoint"
        checkpoint.save(artifact)
        mlflow.pyfunc.save_model(
            str(folder),
            mlflow_model=about or Model(),
            python_model=str(CODE),
            code_paths=[str(Path(pspnet_core.__file__).parent)],
            artifacts={artifact.name: str(artifact)},
            signature=signature,
            input_example=np.full((1, 32, 32, bands), 127, np.uint8),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
            metadata={"classes": checkpoint.classes.to_json(), "fingerprint": checkpoint.fingerprint},
        )


def _public_version(package: str) -> str:
    """The version without its local part, such as ``+cpu``, which no registry has."""
    return importlib.metadata.version(package).partition("+")[0]


def _tags(checkpoint: Checkpoint, miou: float | None, data: str | None) -> dict[str, str]:
    tags = {
        "classes": _class_tag(checkpoint),
        "fingerprint": checkpoint.fingerprint,
        "miou": None if miou is None else repr(float(miou)),
        "data": data,
    }
    return {name: redacted(value) for name, value in tags.items() if value is not None}


def _class_tag(checkpoint: Checkpoint) -> str:
    """The class names, or what tells them from others where they are too many for a tag."""
    names = json.dumps(checkpoint.classes.names)
    if len(names) <= LONGEST_TAG:
        return names
    return f"{len(checkpoint.classes)} names, SHA-256 {hashlib.sha256(names.encode()).hexdigest()}"


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != EXISTS:
            raise


def promote(
    model: str,
    score: Callable[[Checkpoint], float],
    *,
    uri: str | None = None,
    patience: float = PATIENCE_S,
) -> bool:
    """Make a version the ``@champion`` if it is the first or better than the champion, on the same data.

    The version's score and data are those that ``log_model`` was given. A champion that was scored on the same data is
    compared by its recorded mIoU; any other is scored anew. One that cannot be, as its classes are others, stays.

    Args:
        model: ``models:/name/version``, as ``log_model`` returned it.
        score: mIoU, 0 to 1, of another checkpoint on the version's data. It may raise a ``PspnetError``.
        uri: the server; by default ``tracking_uri()``.

    Returns:
        Whether it is the champion now. Two runs that promote at the same moment may overtake each other: MLflow has no
        conditional change of an alias.

    Raises:
        ConfigError: for a model without a score.
        TrackingError: when the server cannot be used.
    """
    server = uri or tracking_uri()
    client = client_of(server)
    version = patiently(server, lambda: _version(client, model), seconds=patience)
    if "miou" not in version.tags:
        raise ConfigError("model", model, "has no mIoU on record; log it with its score")
    champion = patiently(server, lambda: _champion(client, version.name), seconds=patience)
    if champion is not None and champion.version != version.version:
        best = _champion_score(server, version, champion, score, patience)
        own = float(version.tags["miou"])
        # A score that is no number, of a model that diverged, beats nothing and is beaten by any.
        if best is None or not math.isfinite(own) or own <= best:
            return False
    patiently(
        server,
        lambda: client.set_registered_model_alias(version.name, CHAMPION, str(version.version)),
        seconds=patience,
    )
    log.info("%s is the champion now", model)
    return True


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def _champion_score(
    server: str, version: ModelVersion, champion: ModelVersion, score: Callable[[Checkpoint], float], patience: float
) -> float | None:
    """The champion's mIoU on the version's data; None when it cannot be scored on it."""
    if "miou" in champion.tags and "data" in version.tags and champion.tags.get("data") == version.tags["data"]:
        return float(champion.tags["miou"])
    place = f"models:/{champion.name}/{champion.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            local = patiently(server, lambda: fetch(place, folder, server=server), seconds=patience)
            checkpoint = load_checkpoint(local)
            if redacted(_class_tag(checkpoint)) != version.tags["classes"]:
                raise ConfigError("model", place, "its classes are others")
            return score(checkpoint)
        except TrackingError:
            raise
        except PspnetError as error:
            log.warning("%s stays the champion: it cannot be scored on this data (%s)", place, first_line(error))
            return None


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


def origin_of(model: str, *, field: str = "model") -> Origin:
    """Look up what a model URI of any kind stands for now; arguments and errors as for ``fetch``."""
    if found := _RUN_URI.fullmatch(model):
        return Origin(uri=model, run_id=found[1])
    if not model.startswith("models:/"):
        return Origin(uri=model)
    server = tracking_uri()
    with _reading(server, model, field):
        client = client_of(server)
        if found := _LOGGED_URI.fullmatch(model):
            return Origin(uri=model, run_id=client.get_logged_model(found[1]).source_run_id)
        version = _version(client, model, field)
        uri = f"models:/{version.name}/{version.version}"
        return Origin(uri=uri, version=uri, run_id=version.run_id or None)


def fetch(model: str, folder: str, *, field: str = "model", server: str | None = None) -> Path:
    """Copy the checkpoint of an MLflow model, and nothing else of it, into ``folder``; returns where it lies.

    Args:
        model: ``runs:/ID/model``, ``models:/name/version``, ``models:/name@alias`` or ``models:/m-ID``.
        field: the config field that ``model`` came from; errors name it.
        server: by default ``tracking_uri()``.

    Raises:
        ConfigError: when there is no such model.
        TrackingError: when the server cannot be used.
    """
    server = server or tracking_uri()
    with _reading(server, model, field):
        place = _place(client_of(server), model, field)
        names = {Path(entry.path).name for entry in mlflow.artifacts.list_artifacts(place, tracking_uri=server)}
        if not names:
            raise ConfigError(field, model, f"MLflow at {redacted(server)} has no files of it; log it again")
        if "MLmodel" in names:
            place = f"{place}/{CHECKPOINT}"
        return Path(mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=server))


def fetch_file(file: str, folder: str, *, field: str) -> Path:
    """Copy one file that a run logged, ``runs:/ID/path``, into ``folder``; arguments and errors as for ``fetch``."""
    server = tracking_uri()
    with _reading(server, file, field):
        place = _place(client_of(server), file, field)
        return Path(mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=server))


@contextlib.contextmanager
def _reading(server: str, what: str, field: str) -> Iterator[None]:
    """Tell what is not there from a server that cannot be used."""
    with reaching(server):
        try:
            yield
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            remedy = f"MLflow at {redacted(server)} has no such model ({first_line(error)})"
            raise ConfigError(field, what, remedy) from error


def _place(client: MlflowClient, model: str, field: str) -> str:
    """URI of the folder that holds a model. MLflow's own look-up asks the global server, whichever client is used."""
    if found := _LOGGED_URI.fullmatch(model):
        return client.get_logged_model(found[1]).artifact_location
    if found := _RUN_URI.fullmatch(model):
        return _place_in_run(client, found[1], found[2])
    version = _version(client, model, field)
    return client.get_model_version_download_uri(version.name, str(version.version))


def _place_in_run(client: MlflowClient, run_id: str, path: str) -> str:
    run = client.get_run(run_id).info
    if "/" not in path:
        token: str | None = None
        while True:
            page = client.search_logged_models([run.experiment_id], f"name = '{path}'", page_token=token)
            for logged in page:
                if logged.source_run_id == run_id:
                    return logged.artifact_location
            token = page.token
            if not token:
                break
    return f"{run.artifact_uri}/{path}"


def _version(client: MlflowClient, model: str, field: str = "model") -> ModelVersion:
    found = _VERSION_URI.fullmatch(model)
    if not found:
        raise ConfigError(field, model, "give models:/name/version, models:/name@alias or runs:/ID/model")
    name, version, alias = found.groups()
    if alias is not None or version == "latest":
        return client.get_model_version_by_alias(name, alias or version)
    return client.get_model_version(name, version)
