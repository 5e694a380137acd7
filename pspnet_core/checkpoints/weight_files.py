"""Read files of weights that other programs wrote: tensors by name, and metadata. Nothing is executed.

Safetensors files hold tensors and nothing else, and may be sharded: an index (``*.index.json``) names the files beside
it. Any other file is one of ``torch.save``, see ``torch_files``. The walk: the part of the file that holds weights ->
its tensors -> their names without the prefixes of wrappers.
"""

import contextlib
import json
import logging
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from pspnet_core.checkpoints.pickles import Key, Made, UnsupportedError, mapping
from pspnet_core.checkpoints.plain_values import plain
from pspnet_core.checkpoints.torch_files import open_torch_file
from pspnet_core.errors import ConfigError
from pspnet_core.paths import inside

log = logging.getLogger(__name__)
INDEX = ".index.json"
"""How the name of an index ends."""
LARGEST_INDEX = 2**24
"""In bytes."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict")
"""Keys of averaged weights (EMA): timm's, torchvision's, and a common one."""
WRAPPERS = (*AVERAGES, "state_dict", "model", "model_state_dict")
"""Keys under which training programs keep weights, in the order of preference."""

LONGEST_REASON = 200
TensorsOf = Callable[[Mapping[Any, Any]], dict[str, Any]]
"""Tensors among entries, or what tells of them, by name; each has a ``shape``."""
# DataParallel, Lightning and torch.compile, the last of which may have wrapped a part alone.
_PREFIXES = re.compile(r"^(?:module\.|model\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")


class WeightFile(NamedTuple):
    """What a file holds.

    Attributes:
        weights: name -> tensor on the CPU; the names without the prefixes of wrappers such as DataParallel.
        meta: what mmsegmentation and its relatives store beside the weights, as plain values; empty elsewhere.
    """

    weights: dict[str, Tensor]
    meta: Mapping[Any, Any]


def read_weight_file(file: Path, *, source: str | None = None, key: str | None = None) -> WeightFile:
    """Read a state dict: ``.safetensors``, an index of such files, or what ``torch.save`` wrote; wrapped or plain.

    Args:
        file: on local disk.
        source: what errors call it; its path by default.
        key: which part of the file to take; by default the first of ``WRAPPERS`` that it has.

    Raises:
        ConfigError: the file cannot be read, is damaged, or holds no weights.
    """
    source = source or str(file)
    read = _read_shards if file.name.endswith(INDEX) else _read
    found = read(file, source, key)
    weights = {_PREFIXES.sub("", name): value for name, value in found.weights.items()}
    if len(weights) < len(found.weights):
        raise ConfigError("source", source, "holds several networks under different prefixes; save one of them alone")
    if any(name.startswith("ema_") for name in weights):
        log.info("the weights named ema_... are a second copy, which mmcv keeps; not taken")
    return WeightFile(weights, found.meta)


def first_keys(names: Mapping[Any, object]) -> str:
    """The first names of a file, for error messages."""
    return ", ".join(str(name)[:100] for name in list(names)[:6]) or "none"


def shards_of(index: Path, *, source: str) -> dict[str, str]:
    """The weights that an index lists: name -> name of the file, beside the index, that holds it.

    Raises:
        ConfigError: it is no index, or names files elsewhere.
    """
    try:
        with index.open("rb") as file:
            shards = json.loads(file.read(LARGEST_INDEX))["weight_map"]
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError("its weight_map is no map of names")
        for shard in shards.values():
            inside(index.parent, shard)
    except OSError as error:
        raise ConfigError("source", source, f"cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError("source", source, f"is no index of weights ({error}); download it again") from error
    return shards


def _read_shards(index: Path, source: str, key: str | None) -> WeightFile:
    shards = shards_of(index, source=source)
    files = {
        shard: _read(inside(index.parent, shard), f"{source}: {shard}", key).weights for shard in {*shards.values()}
    }
    for name, shard in shards.items():
        if name not in files[shard]:
            raise ConfigError("source", source, f"{shard} does not have its {name}; download both again")
    return WeightFile({name: files[shard][name] for name, shard in shards.items()}, {})


def _read(file: Path, source: str, key: str | None) -> WeightFile:
    with _told(source):
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError("source", source, "cannot be read (no plain file); give a file of weights")
        if file.suffix == ".safetensors":
            return WeightFile(_part(safetensors.torch.load_file(file), source, key, dict), {})
        with open_torch_file(file) as opened:
            specs = _part(opened.content, source, key, opened.tensors_of)
            meta = mapping((mapping(opened.content) or {}).get("meta"))
            return WeightFile(opened.load(specs), plain(meta or {}))


@contextlib.contextmanager
def _told(source: str) -> Iterator[None]:
    """Whatever goes wrong in a file, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("source", source, f"cannot be read ({error.strerror}); give a file of weights") from error
    except UnsupportedError as error:
        raise ConfigError("source", source, f"holds {error}") from error
    except Exception as error:
        # Bytes that are no such file raise errors of many types.
        reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
        raise ConfigError(
            "source", source, f"is no file of weights, or a damaged one ({reason}); download it again"
        ) from error


def _part(content: object, source: str, key: str | None, tensors_of: TensorsOf) -> dict[str, Any]:
    """The weights: the tensors of the innermost part that has any."""
    entries = mapping(content)
    if entries is None:
        made = isinstance(content, Made) and f"an object of {content.path[:100] or 'a class'}"
        whole = f"holds {made or 'no weights by name'}"
        remedy = "where it was made, save its state_dict() alone"
        raise ConfigError("source", source, f"{whole}; its first keys: none; {remedy}")
    if key is not None:
        keys, entries = first_keys(entries), mapping(entries.get(key))
        if entries is None:
            raise ConfigError("key", key, f"{source} has no part of that name; its first keys: {keys}")
    found = _innermost(entries, tensors_of, set())
    if found is None:
        raise ConfigError("source", source, f"holds no weights by name; its first keys: {first_keys(entries)}")
    for choice in found.choices:
        log.info("the weights under %s are taken, of %s; see --key of convert", choice[0], ", ".join(choice))
    return found.tensors


class _Found(NamedTuple):
    """Tensors by name, and the parts between which there was a choice on the way to them, the taken one first."""

    tensors: dict[str, Any]
    choices: list[list[str]]


def _innermost(entries: Mapping[Any, Any], tensors_of: TensorsOf, seen: set[int]) -> _Found | None:
    """The weights among entries or in parts of them; None where there are none, or where these have been seen."""
    if id(entries) in seen:  # a dict may hold itself
        return None
    seen.add(id(entries))
    parts = {name: part for name in _wrappers(entries) if (part := mapping(entries.get(name))) is not None}
    inner = {name: _innermost(part, tensors_of, seen) for name, part in parts.items()}
    found = {name: part for name, part in inner.items() if part is not None}
    if found:
        first = next(iter(found.values()))
        return _Found(first.tensors, [list(found)] * (len(found) > 1) + first.choices)
    tensors = tensors_of(entries)
    # Settings and counters are numbers; a part has at least a tensor with an axis.
    return _Found(tensors, []) if any(tensor.shape for tensor in tensors.values()) else None


def _wrappers(entries: Mapping[Key, Any]) -> tuple[str, ...]:
    """``WRAPPERS`` in the order of preference, of which a program may have its own."""
    # mmengine, which keeps a message hub in training and its version always, swaps: its state_dict is the average.
    swapped = "message_hub" in entries or "mmengine_version" in (mapping(entries.get("meta")) or {})
    return ("state_dict", *WRAPPERS) if swapped else WRAPPERS
