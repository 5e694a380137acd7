"""A config as a tree of dataclasses, each beside what it configures, and as the flat names that its users give.

All leaves of a tree share one namespace: they are a job's flags, the keys of a flat YAML file and the parameters of a
run. A leaf ``kind`` goes by the name of its part: ``config.loss.kind`` is ``--loss``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from pspnet_core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
KIND = "kind"


class Leaf(NamedTuple):
    """One value of a config: its type, its field, and the dataclass that has it."""

    type: Any
    field: dataclasses.Field[Any]
    owner: type[DataclassInstance]

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING


def parts(config_class: type[DataclassInstance]) -> dict[str, type[DataclassInstance]]:
    """The dataclasses right below this one, by their names."""
    hints = get_type_hints(config_class)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}  # type: ignore[misc]


def leaves(config_class: type[DataclassInstance], part: str = "") -> dict[str, Leaf]:
    """The leaves of a tree by their flat names, in the order of the fields; ``part`` is what its owner calls it."""
    hints, below = get_type_hints(config_class), parts(config_class)
    found: dict[str, Leaf] = {}
    for field in dataclasses.fields(config_class):
        if field.name in below:
            found |= leaves(below[field.name], field.name)
        else:
            found[_flat_name(field.name, part)] = Leaf(hints[field.name], field, config_class)
    return found


def build(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A tree out of values by flat name; what is not among them has its default.

    Raises:
        ConfigError: an unknown name, or as the dataclasses do.
    """
    for name in values.keys() - leaves(config_class).keys():
        raise ConfigError(name, values[name], f"unknown; {config_class.__name__} has no such field")
    return _build(config_class, values)


def _build(config_class: type[ConfigT], values: Mapping[str, Any], part: str = "") -> ConfigT:
    below = parts(config_class)
    given: dict[str, Any] = {name: _build(each, values, name) for name, each in below.items()}
    for field in dataclasses.fields(config_class):
        name = _flat_name(field.name, part)
        if field.name not in below and name in values:
            given[field.name] = values[name]
    return config_class(**given)


def flatten(config: DataclassInstance, part: str = "") -> dict[str, Any]:
    """The leaves of a tree: flat name to value. The inverse of ``build``."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= flatten(value, field.name)
        else:
            flat[_flat_name(field.name, part)] = value
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each entry of ``one`` that is another in ``other``."""
    return ((name, value, other[name]) for name, value in one.items() if value != other[name])


def _flat_name(name: str, part: str) -> str:
    return part if name == KIND and part else name
