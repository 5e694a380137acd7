"""MLflow: runs, metrics, the model registry, and the way from a model URI to a checkpoint.

The server is the one that ``MLFLOW_TRACKING_URI`` names, else an SQLite file in the user's home, so that a job finds
what another one registered whatever folder it runs in (a submitted Ray job runs in a temporary one).
"""

import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import mlflow.artifacts
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis
from torch import Tensor, nn

from pipelines.storage import ObjectError, open_store, to_local
from pspnet_core import checkpoints
from pspnet_core.checkpoints import Checkpoint
from pspnet_core.errors import ConfigError, PspnetError
from pspnet_core.importers import import_checkpoint
from pspnet_core.pspnet import PSPNet, PSPNetConfig

log = logging.getLogger(__name__)
HOME = Path.home() / ".pspnet"
WEIGHT_FILES = (".pth", ".pt", ".safetensors")
MLFLOW_SCHEMES = ("runs:/", "models:/")
SQLITE = "sqlite:///"
EXISTS = "RESOURCE_ALREADY_EXISTS"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for what is not there


class TrackingError(PspnetError):
    """The MLflow server cannot be used."""


def tracking_uri() -> str:
    """The tracking server: ``MLFLOW_TRACKING_URI``, else ``~/.pspnet/mlflow.db``."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    HOME.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{HOME / 'mlflow.db'}"


@contextlib.contextmanager
def local_tracking(folder: Path) -> Iterator[None]:
    """Track in an SQLite file in ``folder`` meanwhile, whatever the environment says."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


@dataclass(frozen=True, kw_only=True)
class Run:
    """One MLflow run; small and picklable, so that any process may log to it."""

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client of the run's server."""
        return MlflowClient(self.uri)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, None values included, each cut at MLflow's 6,000 characters."""
        entities = [Param(key, str(value)[:6000]) for key, value in params.items()]
        self.client.log_batch(self.run_id, params=entities)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log the metrics of one step; TrackingError when the server cannot be used."""
        now = get_current_time_millis()
        entities = [Metric(key, value, now, step) for key, value in metrics.items()]
        with _server(self.uri):
            self.client.log_batch(self.run_id, entities)

    def log_model(self, folder: Path, name: str) -> str:
        """Log a checkpoint folder as the run's artifact ``model`` and register it; returns ``models:/name/version``."""
        client = self.client
        client.log_artifacts(self.run_id, str(folder), "model")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
        source = f"{client.get_run(self.run_id).info.artifact_uri}/model"
        version = client.create_model_version(name, source, self.run_id)
        return f"models:/{name}/{version.version}"

    def finish(self, status: str) -> None:
        """Close the run: ``FINISHED`` or ``FAILED``."""
        self.client.set_terminated(self.run_id, status)


def start_run(experiment: str, name: str) -> Run:
    """Begin a run called ``name`` in ``experiment``, which is made if need be.

    Raises:
        TrackingError: when the server cannot be used.
    """
    uri = tracking_uri()
    with _server(uri):
        client = MlflowClient(uri)
        run = client.create_run(_experiment_id(client, uri, experiment), run_name=name)
        return Run(uri=uri, run_id=run.info.run_id)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Beside the SQLite file, not in the current folder as MLflow would have it: that one may be temporary.
        place = str(Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" / name) if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != EXISTS:  # somebody else made it meanwhile
                raise
            found = client.get_experiment_by_name(name)
    assert found is not None
    return found.experiment_id


def load_model(uri: str, *, field: str = "model") -> Checkpoint:
    """The checkpoint at a model URI: a local folder, an object-store prefix, ``runs:/...`` or ``models:/...``.

    Raises:
        ConfigError: when there is no such model, or what is there is no checkpoint.
        TrackingError: when the MLflow server cannot be used.
    """
    if not uri.startswith(MLFLOW_SCHEMES) and "://" not in uri:
        return _load(Path(uri).expanduser(), uri, field)
    with tempfile.TemporaryDirectory() as folder:
        fetch = _download if uri.startswith(MLFLOW_SCHEMES) else _fetch
        return _load(fetch(uri, folder, field), uri, field)


def load_rgb_model(uri: str) -> Checkpoint:
    """``load_model`` for work on image files, which are read as RGB.

    Raises:
        ConfigError: as ``load_model``, and for a network of another number of input bands than 3.
    """
    checkpoint = load_model(uri)
    if checkpoint.config.bands != 3:
        raise ConfigError("model", uri, f"takes {checkpoint.config.bands} bands; image files are read as 3, RGB")
    return checkpoint


def _load(folder: Path, uri: str, field: str) -> Checkpoint:
    try:
        return checkpoints.load(folder)
    except ConfigError as error:
        raise ConfigError(field, uri, error.remedy) from error


def _fetch(uri: str, folder: str, field: str) -> Path:
    """The two files of a checkpoint in a store, and nothing else that may lie below the URI."""
    store = open_store(uri, field=field)
    for name in (checkpoints.CONFIG_FILE, checkpoints.WEIGHTS_FILE):
        try:
            (Path(folder) / name).write_bytes(store.read(name))
        except ObjectError as error:
            raise ConfigError(field, uri, f"no {name} there ({error}); give a folder that train.py wrote") from error
    return Path(folder)


def load_weights(uri: str, config: PSPNetConfig) -> dict[str, Tensor]:
    """State of a network of this config to start training from.

    Args:
        uri: a checkpoint (any model URI) of the same network, or a file (``.pth``, ``.pt`` or ``.safetensors``, local
            or remote) of another project: ImageNet weights of the backbone or a whole PSPNet, see ``importers``. The
            classifiers of a network with another number of classes are left out: they start afresh.

    Raises:
        ConfigError: when the weights do not fit the network.
    """
    model = PSPNet(config)
    weights, given, backbone_only = _start(uri)
    own = model.state_dict()
    fresh = _classifier_weights(model) if given.classes != config.classes else set()
    taken = {name for name in own if name.startswith("backbone.")} if backbone_only else own.keys() - fresh
    wrong = [name for name in own if name in taken and not _same_shape(own[name], weights.get(name))]
    if wrong:
        raise ConfigError("init", uri, f"its {wrong[0]} differs; start from the same backbone, stem and classes")
    if not backbone_only:
        _warn_of_differences(uri, given, config)
        if fresh:
            counts = f"it has {given.classes} classes, the data {config.classes}"
            log.info("weights of %s loaded but for the classifiers (%s): %s", uri, counts, ", ".join(sorted(fresh)))
    return {name: weights[name] if name in taken else own[name] for name in own}


def _start(uri: str) -> tuple[dict[str, Tensor], PSPNetConfig, bool]:
    """Weights under our names, their network, and whether only the backbone of them is trained."""
    if PurePosixPath(uri).suffix not in WEIGHT_FILES:
        checkpoint = load_model(uri, field="init")
        return checkpoint.weights, checkpoint.config, False
    with to_local(uri, field="init") as file:
        try:
            found = import_checkpoint(file, source=uri)
        except ConfigError as error:
            raise ConfigError("init", uri, error.remedy) from error
    return found.weights, found.config, found.backbone_only


def _classifier_weights(model: PSPNet) -> set[str]:
    """Names of the weights whose size is the number of classes: those of the last convolution of each head."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    heads = ([name for name in convolutions if name.startswith(head)][-1:] for head in ("decoder.", "auxiliary."))
    prefixes = tuple(f"{name}." for found in heads for name in found)
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def _warn_of_differences(uri: str, given: PSPNetConfig, config: PSPNetConfig) -> None:
    """Weights may fit a network that computes something else with them."""
    fields = [
        field.name for field in dataclasses.fields(config) if field.name not in ("classes", "auxiliary", "dropout")
    ]
    other = [f"{field} {getattr(given, field)}" for field in fields if getattr(given, field) != getattr(config, field)]
    if other:
        log.warning("the network of %s differs from the one to train: it has %s", uri, ", ".join(other))


def _same_shape(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.shape == own.shape


def _download(uri: str, folder: str, field: str) -> Path:
    server = tracking_uri()
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with _server(server):
        try:
            return Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder, tracking_uri=server))
        except (MlflowException, OSError) as error:
            if isinstance(error, MlflowException) and error.error_code not in ABSENT:
                raise
            remedy = f"MLflow at {_without_password(server)} has no such model ({_first_line(error)})"
            raise ConfigError(field, uri, remedy) from error


@contextlib.contextmanager
def _server(uri: str) -> Iterator[None]:
    """Tell in one line what went wrong with the server."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # MLflow lets through what HTTP, SQL and object-store clients raise, each of its own kind.
        remedy = "start it, or set MLFLOW_TRACKING_URI to another"
        reason = f"MLflow at {_without_password(uri)} cannot be used ({_first_line(error)})"
        raise TrackingError(f"{reason}; {remedy}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.rpartition("@")
    return f"{scheme.partition('://')[0]}://{rest}" if separator else uri
