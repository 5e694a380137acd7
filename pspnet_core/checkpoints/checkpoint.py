"""A trained model as a folder: ``model.json`` and ``weights.safetensors``. No pickle, nothing to execute.

``model.json`` holds the name, the network's config (with mean and standard deviation of preprocessing), the class table
and the inference settings. The fingerprint covers all of it but the name and the class table, and the weights.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

FORMAT = 2
CONFIG_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True, eq=False)  # by identity: tensors have no truth value to compare by
class Checkpoint:
    """A trained model with its classes and inference settings.

    Attributes:
        name: starts with a letter, then small letters, digits, ``-`` and ``_``: it becomes part of a partition value.
        config: the network.
        classes: what its outputs mean; ``len(classes) == config.classes``.
        settings: how images become network inputs.
        weights: the network's state dict, float32 on the CPU.
    """

    name: str
    config: PSPNetConfig
    classes: ClassTable
    settings: InferenceSettings = field(default_factory=InferenceSettings)
    weights: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.classes) != self.config.classes:
            raise ConfigError(
                "classes",
                len(self.classes),
                f"the network has {self.config.classes} outputs; give as many names",
            )

    @classmethod
    def from_model(
        cls, model: PSPNet, *, name: str, classes: ClassTable, settings: InferenceSettings | None = None
    ) -> "Checkpoint":
        """Copy a model as it is now; later changes of the model do not touch the checkpoint."""
        return cls(
            name=name,
            config=model.config,
            classes=classes,
            settings=settings or InferenceSettings(),
            weights=cpu_state_dict(model),
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not the cached network, which repeats the weights and may have been moved to a GPU."""
        return {key: value for key, value in self.__dict__.items() if key != "model"}

    @cached_property
    def model(self) -> PSPNet:
        """The network in evaluation mode, on the CPU."""
        with torch.device("meta"):  # which draws no initial weights
            model = PSPNet(self.config)
        dtypes = {name: value.dtype for name, value in model.state_dict().items()}
        copies = {
            name: value.to(dtypes.get(name, value.dtype), copy=True, memory_format=torch.contiguous_format)
            for name, value in self.weights.items()
        }
        model.load_state_dict(copies, assign=True)
        return model.eval()

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of the SHA-256 of weights, config, preprocessing and inference settings."""
        chosen = {"config": _chosen(self.config), "inference": _chosen(self.settings)}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True, separators=(",", ":")).encode())
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # As bytes, since NumPy has no bfloat16.
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    @property
    def partition(self) -> str:
        """``<name>-<fingerprint>``: the value of ``model=`` in the label table."""
        return f"{self.name}-{self.fingerprint}"

    def with_settings(self, **overrides: Any) -> "Checkpoint":
        """The same model with some inference settings changed; None leaves a setting as it is."""
        given = {key: value for key, value in overrides.items() if value is not None}
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **given))

    def files(self) -> dict[str, bytes]:
        """Names and bytes of the two files; the one that holds the fingerprint comes last."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "config": dataclasses.asdict(self.config),
            "classes": self.classes.to_json(),
            "inference": dataclasses.asdict(self.settings),
        }
        return {
            WEIGHTS_FILE: safetensors.torch.save({name: value.contiguous() for name, value in self.weights.items()}),
            CONFIG_FILE: (json.dumps(content, indent=1) + "\n").encode(),
        }

    def save(self, folder: Path) -> None:
        """Write the two files into ``folder``, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_bytes(data)
            unfinished.replace(folder / name)


def cpu_state_dict(model: PSPNet) -> dict[str, Tensor]:
    """Copy the model's state dict as it is now to the CPU."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}


def save_checkpoint(
    model: PSPNet,
    folder: Path | str,
    *,
    name: str,
    classes: ClassTable | Sequence[str],
    settings: InferenceSettings | None = None,
) -> Checkpoint:
    """Write a model as a checkpoint folder, which ``load_checkpoint`` reads.

    Args:
        model: in any mode, on any device; it stays as it is.
        folder: made if need be; an older checkpoint in it is replaced.
        name: starts with a letter, then small letters, digits, ``-`` and ``_``, at most 64.
        classes: as many as the network has outputs; names alone get made-up colours.
        settings: how images become network inputs; by default each as it is, whole, once.

    Returns:
        The checkpoint that was written.

    Raises:
        ConfigError: for a bad name, or another number of classes.
    """
    table = classes if isinstance(classes, ClassTable) else ClassTable.from_json({"names": list(classes)})
    checkpoint = Checkpoint.from_model(model, name=name, classes=table, settings=settings)
    checkpoint.save(Path(folder))
    return checkpoint


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        ConfigError: when the folder is no checkpoint, or one of another format, or damaged.
    """
    content, weights = _read(Path(folder))
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ConfigError("model", folder, f"checkpoint format {found}; this version reads {FORMAT}")
    try:
        checkpoint = Checkpoint(
            name=content["name"],
            config=PSPNetConfig(**_tuples(content["config"])),
            classes=ClassTable.from_json(content["classes"]),
            settings=InferenceSettings(**_tuples(content["inference"])),
            weights=weights,
        )
        _check_weights(checkpoint)
        if content["fingerprint"] != checkpoint.fingerprint:
            raise ValueError(f"its content is {checkpoint.fingerprint}, not {content['fingerprint']}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Whatever is wrong in a file that save() wrote, the remedy is the same.
        raise _damaged(folder, error) from error
    return checkpoint


def _read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return content, safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = WEIGHTS_FILE if (folder / CONFIG_FILE).is_file() else CONFIG_FILE
        raise ConfigError("model", folder, f"no {missing} there; give a folder that train.py wrote") from error
    except OSError as error:
        raise ConfigError("model", folder, f"cannot be read ({error}); check its permissions") from error
    except (SafetensorError, RecursionError, ValueError) as error:  # neither UTF-8 nor JSON, or a list in lists
        raise _damaged(folder, error) from error


def _check_weights(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the weights have the names and shapes of the network's, which costs no memory."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in PSPNet(checkpoint.config).state_dict().items()}
    found = {name: value.shape for name, value in checkpoint.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            shapes = f"{_shape(found.get(name))} in the file, {_shape(expected.get(name))} in the network"
            raise ConfigError("weights", name, shapes)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def _damaged(folder: Path | str, error: Exception) -> ConfigError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else error
    return ConfigError("model", folder, f"damaged checkpoint ({reason}); copy it again")


def check_name(name: str) -> str:
    """``name``, or ConfigError when it cannot be part of a partition value."""
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "start with a letter; use a-z, 0-9, - and _, at most 64")
    return name


def _chosen(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults: a new field does not change the fingerprints of older models."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := _numbers(getattr(config, field.name))) != _numbers(field.default)
    }


def _numbers(value: Any) -> Any:
    """``value`` with whole floats as integers: 1 and 1.0 are the same setting, hence the same fingerprint."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
