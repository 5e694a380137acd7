"""From a model URI of any kind to a checkpoint."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.storage import ObjectError, open_store, to_local
from pipelines.tracking.model_uris import MLFLOW_SCHEMES, Origin, fetch, origin_of
from pipelines.tracking.server import Server
from pspnet_core.checkpoints.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, load_checkpoint
from pspnet_core.checkpoints.weight_files import INDEX, shards_of
from pspnet_core.errors import ConfigError
from pspnet_core.paths import inside


@dataclass(frozen=True, kw_only=True)
class InferenceOverrides:
    """Settings of inference in place of the checkpoint's."""

    scales: tuple[float, ...] | None = None
    """Input scales to average over; by default the checkpoint's."""
    flip: bool | None = None
    """Whether to average with the mirrored image; by default the checkpoint's setting."""
    window: int | None = None
    """Side of the sliding window in pixels, 0 for whole images; by default the checkpoint's."""
    reduced: bool | None = None
    """Whether JPEGs larger than the network's input are decoded to fewer pixels; by default the checkpoint's."""


def load_model(uri: str, *, field: str = "model", server: Server | None = None) -> Checkpoint:
    """The checkpoint at a model URI: a local folder, an object-store prefix, ``runs:/...`` or ``models:/...``.

    Args:
        field: the config field that ``uri`` came from; errors name it.
        server: as for ``model_uris.fetch``.

    Raises:
        ConfigError: when there is no such model, or what is there is no checkpoint.
        TrackingError: when the MLflow server cannot be used.
    """
    if not uri.startswith(MLFLOW_SCHEMES) and "://" not in uri:
        return _load(Path(uri).expanduser(), uri, field)
    with tempfile.TemporaryDirectory() as folder:
        if uri.startswith(MLFLOW_SCHEMES):
            return _load(fetch(uri, folder, field=field, server=server), uri, field)
        return _load(_from_store(uri, folder, field), uri, field)


@contextmanager
def local_weights(uri: str, *, field: str) -> Iterator[Path]:
    """A file of another project's weights as a local path; beside an index lie the files that it names.

    Raises:
        ConfigError: there is no such file, or not one of those that the index names.
        And as ``to_local``.
    """
    with to_local(uri, field=field) as file:
        shards = shards_of(file, source=uri).values() if file.name.endswith(INDEX) else ()
        for shard in sorted(set(shards)):
            place = inside(file.parent, shard)
            if not place.exists():  # beside a local index it does, or is told to be missing
                with to_local(f"{uri.rpartition('/')[0]}/{shard}", field=field) as fetched:
                    shutil.move(fetched, place)
        yield file


def load_rgb_model(uri: str, overrides: InferenceOverrides) -> tuple[Checkpoint, Origin]:
    """Load a model for work on image files, which are read as RGB, and look up its version and run.

    Raises:
        ConfigError: as ``load_model``, and for a network of another number of input bands than 3; it names the model as
            ``uri`` does, and not the version that an alias stands for.
    """
    origin = origin_of(uri)
    try:
        checkpoint = load_model(origin.uri)
    except ConfigError as error:
        raise ConfigError("model", uri, error.remedy) from error
    check_rgb(checkpoint, uri)
    return checkpoint.with_settings(**vars(overrides)), origin


def check_rgb(checkpoint: Checkpoint, uri: str) -> None:
    """Raise a ConfigError for a network of another number of input bands than 3."""
    if checkpoint.config.bands != 3:
        raise ConfigError("model", uri, f"takes {checkpoint.config.bands} bands; image files are read as 3, RGB")


def _load(folder: Path, uri: str, field: str) -> Checkpoint:
    try:
        return load_checkpoint(folder)
    except ConfigError as error:
        raise ConfigError(field, uri, error.remedy) from error


def _from_store(uri: str, folder: str, field: str) -> Path:
    """The two files of a checkpoint in a store, and nothing else that may lie below the URI."""
    store = open_store(uri, field=field)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            (Path(folder) / name).write_bytes(store.read(name))
        except ObjectError as error:
            raise ConfigError(field, uri, f"no {name} there ({error}); give a folder that train.py wrote") from error
    return Path(folder)
