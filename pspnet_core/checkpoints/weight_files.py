"""Read files of weights that other programs wrote: tensors by name, and metadata. Nothing is executed.

Safetensors files hold tensors and nothing else. Any other file is read by ``torch.load(weights_only=True)``, which
builds tensors, numbers, text and containers of them, and refuses every other class.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pspnet_core.errors import ConfigError

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training programs keep the weights."""

_PREFIXES = re.compile(r"^(?:module\.|model\.|_orig_mod\.)+")  # DataParallel, Lightning, torch.compile


class WeightFile(NamedTuple):
    """What a file holds.

    Attributes:
        weights: name -> tensor on the CPU; the names without the prefixes of wrappers such as DataParallel.
        meta: what mmsegmentation and its relatives store beside the weights; empty elsewhere.
    """

    weights: dict[str, Tensor]
    meta: Mapping[str, Any]


def read_weight_file(file: Path, *, source: str | None = None) -> WeightFile:
    """Read a state dict: ``.safetensors`` or, by any other suffix, what ``torch.save`` wrote; wrapped or plain.

    Args:
        file: on local disk.
        source: what errors call it; its path by default.

    Raises:
        ConfigError: the file cannot be read, is damaged, holds other classes than weights need, or no weights.
    """
    source = source or str(file)
    content = _load(file, source)
    found = _unwrap(content)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError("source", source, f"holds no weights by name; its first keys: {first_keys(found)}")
    weights = {_PREFIXES.sub("", name): value for name, value in tensors.items()}
    if len(weights) < len(tensors):
        raise ConfigError("source", source, "holds several networks under different prefixes; save one of them alone")
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return WeightFile(weights, meta if isinstance(meta, Mapping) else {})


def first_keys(names: Mapping[str, object]) -> str:
    """The first names of a file, for error messages."""
    return ", ".join(str(name) for name in list(names)[:6]) or "none"


def _load(file: Path, source: str) -> object:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of here, it raises as well
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError("source", source, f"cannot be read ({error.strerror}); give a file of weights") from error
    except SafetensorError as error:
        raise ConfigError("source", source, f"is no safetensors file ({error}); download it again") from error
    except Exception as error:
        # Bytes that are no pickle raise errors of many types.
        refused = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if refused is None:
            raise ConfigError("source", source, "is no file of weights, or a damaged one; download it again") from error
        remedy = 'where it was made, save the weights alone: torch.save({"state_dict": model.state_dict()}, file)'
        raise ConfigError("source", source, f"holds an object of {refused[1]}, which is not read; {remedy}") from error


def _unwrap(content: object) -> Mapping[str, object]:
    """The innermost mapping of weights."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return {}
