"""Conversion: another project's checkpoint file in, a checkpoint folder of ours out.

file at any URI -> ``importers`` -> a folder beside the output -> one move, so that the output is whole or not there at
all. In a bucket ``model.json`` comes last: without it the folder is no checkpoint.
"""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from pipelines.models.loading import local_weights
from pipelines.storage import Store, open_store, to_local
from pipelines.storage.local import LocalStore
from pspnet_core.checkpoints.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, check_name
from pspnet_core.checkpoints.importers import import_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable, class_table

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a PSPNet checkpoint of another project into ours: the same logits, and nothing to unpickle any more."""

    source: str
    """Checkpoint file (.pth, .pt, .ckpt, .safetensors, .safetensors.index.json...): a local path or a URI (s3://...)."""
    output: str
    """Folder for the checkpoint: a local path or a URI. It must be new, empty, or hold this very checkpoint."""
    key: str | None = None
    """Which copy of the weights to take, where the source holds several: state_dict, model_ema...; by default averaged
    ones."""
    name: str | None = None
    """Name of the model: small letters, digits, - and _; by default made from the source's file name."""
    classes: str | None = None
    """A built-in class table, or a classes.json file; by default what the source says."""
    align: bool | None = None
    """Whether resizing maps corner to corner (align_corners); by default the source's way."""
    bins: tuple[int, ...] | None = None
    """Grid sizes of the pyramid, which weights do not show; by default the source's, else 1,2,3,6."""
    mean: tuple[float, ...] | None = None
    """Mean of the training images in each band, range 0 to 255; by default the source's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each band, same unit; by default the source's."""

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert one checkpoint.

    Returns:
        ``model`` (the folder), ``source_kind``, ``leftover`` (names in the source that nothing was taken from),
        ``name``, ``fingerprint``, ``backbone``, ``classes`` (how many) and ``align_corners``.

    Raises:
        ConfigError: the source is not known or not complete, or the output holds something else.
    """
    store = open_store(config.output, field="output")
    classes = None if config.classes is None else _read_classes(config.classes)
    given = {"align_corners": config.align, "bins": config.bins, "mean": config.mean, "std": config.std}
    overrides = {field: value for field, value in given.items() if value is not None}
    with local_weights(config.source, field="source") as file:
        found = import_checkpoint(file, source=config.source, key=config.key, classes=classes, overrides=overrides)
    name = config.name or model_name(config.source)
    checkpoint = Checkpoint(name=name, config=found.config, classes=found.classes, weights=found.weights)
    log.info("%s: %s", found.kind, found.config)
    if found.leftover:
        log.info("%d weights not used: %s", len(found.leftover), ", ".join(found.leftover))
    publish(checkpoint, store)
    return {
        "model": store.root,
        "source_kind": found.kind,
        "leftover": found.leftover,
        "name": name,
        "fingerprint": checkpoint.fingerprint,
        "backbone": found.config.backbone,
        "classes": found.config.classes,
        "align_corners": found.config.align_corners,
    }


def model_name(uri: str) -> str:
    """A valid model name from the name of a file: what is not allowed becomes ``-``."""
    stem = PurePosixPath(uri).stem.lower()
    plain = re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-")
    return check_name((plain if plain[:1].isalpha() else f"pspnet-{plain}".rstrip("-"))[:64])


def publish(checkpoint: Checkpoint, store: Store) -> None:
    """Write a checkpoint into a folder that is new or empty; one that holds the very same is left as it is.

    Raises:
        ConfigError: the folder holds anything else, or cannot be written.
        TransientStorageError: storage does not answer.
    """
    local = Path(store.root).resolve() if isinstance(store, LocalStore) else None
    present = {item.key for item in store.list()} if local is None or local.exists() else set()
    if strangers := present - {CONFIG_FILE, WEIGHTS_FILE}:
        raise ConfigError("output", store.root, f"is not empty (it holds {min(strangers)}); give a new folder")
    with _saved(checkpoint, store, beside=local) as folder:
        if local is not None and not present:
            folder.rename(local)
            return
        for name in (WEIGHTS_FILE, CONFIG_FILE):  # without the second the folder is no checkpoint
            content = (folder / name).read_bytes()
            if not store.put_if_absent(name, content) and store.read(name) != content:
                raise ConfigError("output", store.root, f"holds another checkpoint ({name} differs); give a new folder")


@contextlib.contextmanager
def _saved(checkpoint: Checkpoint, store: Store, *, beside: Path | None) -> Iterator[Path]:
    """The checkpoint in a folder of its own, on the file system of ``beside``, deleted on leaving."""
    try:
        if beside is not None:
            beside.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=None if beside is None else beside.parent) as folder:
            checkpoint.save(Path(folder) / "model")
            yield Path(folder) / "model"
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("output", store.root, f"cannot be written ({reason}); give a folder that can") from error


def _read_classes(given: str) -> ClassTable:
    """A built-in table by its name, or the table in a file."""
    if "/" not in given and not given.endswith(".json"):
        return class_table(given)
    with to_local(given, field="classes") as file:
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError("classes", given, f"is no JSON file ({error}); give a classes.json") from error
    return ClassTable.from_json(content)
