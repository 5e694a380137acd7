"""Read mmsegmentation's metadata: class names, colours and the text of the training config.

0.x keeps ``meta["CLASSES"]``, ``meta["PALETTE"]`` and ``meta["config"]``; 1.x keeps ``meta["dataset_meta"]`` with the
first two, in small letters as a rule, and ``meta["cfg"]``. The text is Python (``name = dict(key=value, ...)``); it is
searched, never run.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from pspnet_core.errors import ConfigError

log = logging.getLogger(__name__)

# (strides, dilations) of the four stages -> our fields.
_STAGES: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, Any]] = {
    ((1, 2, 1, 1), (1, 1, 2, 4)): {"output_stride": 8},
    ((1, 2, 2, 1), (1, 1, 1, 2)): {"output_stride": 16},
    ((1, 2, 2, 2), (1, 1, 1, 1)): {"output_stride": 32},
    ((1, 2, 2, 2), (1, 1, 2, 4)): {"output_stride": 32, "dilations": (2, 4)},  # its d32 models
}
_FOREIGN = {
    r"style['\"]?\s*[=:]\s*['\"]caffe": "a network whose 1x1 convolutions stride is not known here",
    r"multi_grid['\"]?\s*[=:]\s*[\[(]": "a network with a dilation for each block is not known here",
    r"to_rgb['\"]?\s*[=:]\s*False": "a network for BGR images is not known here",
}


def settings_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``PSPNetConfig`` that the training config tells; where it is silent, those of the base configs.

    Raises:
        ConfigError: it is the config of a network that ours cannot be.
    """
    text = str(meta.get("config") or meta.get("cfg") or "")
    if not text:
        log.warning("no config in the metadata: align_corners false assumed; see --align")
    for pattern, reason in _FOREIGN.items():
        if match := re.search(pattern, text):
            raise ConfigError("source", match[0], reason)
    model = _section(text, "model") or text
    head = _section(model, "decode_head") or model
    images = _section(text, "img_norm_cfg") or _section(text, "data_preprocessor")
    dropout = _value(head, "dropout_ratio", _NUMBER)
    found = {"bins": _numbers(head, "pool_scales"), "mean": _numbers(images, "mean"), "std": _numbers(images, "std")}
    return {
        "align_corners": _value(head, "align_corners", _TRUTH) == "True",
        "dropout": 0.1 if dropout is None else _number(dropout),
        **_dilation(_section(model, "backbone")),
        **{field: value for field, value in found.items() if value is not None},
    }


def per_class(meta: Mapping[str, Any], key: str) -> list[Any] | None:
    """What the metadata says of each class, or None: ``classes``, the names; ``palette``, the colours, 0 to 255."""
    inner = meta.get("dataset_meta")
    places = (inner, meta) if isinstance(inner, Mapping) else (meta,)
    found = (place.get(spelling) for place in places for spelling in (key, key.upper()))
    return next((list(value) for value in found if _is_list(value) and all(map(_PER_CLASS[key], value))), None)


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _is_color(value: object) -> bool:
    return _is_list(value) and len(value) == 3 and all(type(each) is int and 0 <= each <= 255 for each in value)


_PER_CLASS: dict[str, Callable[[object], bool]] = {
    "classes": lambda name: isinstance(name, str),
    "palette": _is_color,
}


def _dilation(backbone: str) -> dict[str, Any]:
    strides, dilations = _numbers(backbone, "strides"), _numbers(backbone, "dilations")
    contracted = _value(backbone, "contract_dilation", _TRUTH)
    if strides is None and dilations is None:
        return {"dilation": "full" if contracted == "False" else "contracted"}
    # Fields left out have mmsegmentation's default for a ResNet.
    pattern = strides or (1, 2, 2, 2), dilations or (1, 1, 1, 1)
    if pattern not in _STAGES:
        known = "; ".join(f"{stride}, {dilation}" for stride, dilation in _STAGES)
        raise ConfigError("strides, dilations", f"{pattern[0]}, {pattern[1]}", f"not known here; known: {known}")
    return _STAGES[pattern] | {"dilation": "contracted" if contracted == "True" else "full"}


def _section(text: str, name: str) -> str:
    """What stands between the brackets of ``name=dict(...)`` or ``'name': {...}``; empty where there is none."""
    start = re.search(rf"\b{name}['\"]?\s*[=:]\s*(?:dict\(|\{{)", text)
    if start is None:
        return ""
    depth = 1
    for end in range(start.end(), len(text)):
        depth += (text[end] in "([{") - (text[end] in ")]}")
        if depth == 0:
            return text[start.end() : end]
    return text[start.end() :]


_TRUTH = r"True|False"
_NUMBER = r"[\d.][\d.e+-]*"
_LIST = r"[(\[][\d\s.,e+-]*[)\]]"


def _value(text: str, key: str, pattern: str) -> str | None:
    """What stands after ``key=`` and has this pattern; None where nothing does."""
    found = re.search(rf"\b{key}['\"]?\s*[=:]\s*({pattern})", text)
    return None if found is None else found[1]


def _numbers(text: str, key: str) -> tuple[float, ...] | None:
    """The list or tuple after ``key=``."""
    found = _value(text, key, _LIST)
    return None if found is None else tuple(map(_number, re.findall(r"[^\s,()\[\]]+", found)))


def _number(text: str) -> float:
    """A number, whole where it is written so."""
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError("source", text[:100], "is no number, in the config of its metadata") from error
    return int(value) if value.is_integer() else value
