"""A config as a tree of dataclasses, each beside what it configures, and as the flat names that its users give.

All leaves of a tree share one namespace: they are a job's flags, the keys of a flat YAML file and the parameters of a
run. A leaf ``kind`` goes by the name of its part: ``config.loss.kind`` is ``--loss``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from pspnet_core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
KIND = "kind"


class Leaf(NamedTuple):
    """One value of a config: its type, its field, the dataclass that has it, and its place below the root."""

    type: Any
    field: dataclasses.Field[Any]
    owner: type[DataclassInstance]
    path: str

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
            inside = leaves(below[field.name], field.name)
            found |= {name: leaf._replace(path=f"{field.name}.{leaf.path}") for name, leaf in inside.items()}
        else:
            name = part if part and field.name == KIND else field.name
            found[name] = Leaf(hints[field.name], field, config_class, field.name)
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
    given: dict[str, Any] = {name: _build(each, values, name) for name, each in parts(config_class).items()}
    for name, leaf in leaves(config_class, part).items():
        if leaf.owner is config_class and name in values:
            given[leaf.field.name] = values[name]
    return config_class(**given)


def flatten(config: DataclassInstance) -> dict[str, Any]:
    """The leaves of a tree: flat name to value. The inverse of ``build``."""
    return {name: operator.attrgetter(leaf.path)(config) for name, leaf in leaves(type(config)).items()}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each entry of ``one`` that is another in ``other``."""
    return ((name, value, other[name]) for name, value in one.items() if value != other[name])
