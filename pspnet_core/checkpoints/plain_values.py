"""What a pickle holds besides tensors, as numbers, texts, lists and dicts; NumPy's numbers and arrays among them."""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pspnet_core.checkpoints.pickles import Key, Made, mapping

log = logging.getLogger(__name__)

MOST_ENTRIES = 500_000
"""Of all containers and arrays together: one container may stand in many places, and so may one text."""
TEXT = 16
"""Characters that count as much as an entry."""
MOST_AXES = 4
"""Of an array: each makes a list of every number."""
DEPTH = 32


def plain(entries: Mapping[Key, object]) -> dict[Key, Any]:
    """Entries of a pickle as plain values, with None in place of what is none; those that are too large are left out.

    Raises:
        Exception: of almost any kind, when an array is damaged.
    """
    found, large, left = dict[Key, Any](), list[Key](), MOST_ENTRIES
    for key, value in entries.items():
        converter = _Plain(left // 2)  # so that one that is too large leaves something to the others
        try:
            found[key] = converter.convert(value)
        except _TooLargeError:
            large.append(key)
        left -= left // 2 - max(converter.left, 0)
    if large:
        names = ", ".join(str(key)[:100] for key in large[:6])
        log.warning("of the metadata %d are too large and not read: %s", len(large), names)
    return found


class _TooLargeError(Exception):
    """A value has more entries than it may."""


class _Plain:
    def __init__(self, most: int) -> None:
        self.left = most

    def convert(self, value: object, depth: int = 0) -> Any:
        if isinstance(value, str):
            self._count(len(value) // TEXT)
            return value
        if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
            return value
        if depth == DEPTH:
            return None
        if isinstance(value, list | tuple):
            self._count(len(value))
            return [self.convert(entry, depth + 1) for entry in value]
        if isinstance(value, Made) and value.path in _NUMPY:
            return self._array(*_NUMPY[value.path](value))
        entries = mapping(value)
        return None if entries is None else self._entries(entries, depth)

    def _entries(self, entries: Mapping[Key, object], depth: int) -> dict[Any, Any]:
        self._count(len(entries))
        return {self.convert(key, DEPTH): self.convert(entry, depth + 1) for key, entry in entries.items()}

    def _array(self, kind: Made, data: object, shape: tuple[int, ...], order: Any) -> Any:
        """Numbers or texts; never objects."""
        code = kind.arguments[0]
        if not re.fullmatch(r"[biuf][1248]|U\d{1,4}", code) or len(shape) > MOST_AXES:
            return None
        array = np.frombuffer(_bytes(data), np.dtype(code).newbyteorder(kind.state[1])).reshape(shape, order=order)
        self._count(array.size * (1 + array.itemsize // TEXT))
        return array.tolist() if array.size else []  # of a billion rows of no columns, too

    def _count(self, entries: int) -> None:
        self.left -= entries
        if self.left < 0:
            raise _TooLargeError


def _scalar(made: Made) -> tuple[Any, ...]:
    return *made.arguments, (), "C"


def _reconstruct(made: Made) -> tuple[Any, ...]:
    _, shape, kind, by_columns, data = made.state
    return kind, data, shape, "F" if by_columns else "C"


def _from_buffer(made: Made) -> tuple[Any, ...]:
    data, kind, shape, order = made.arguments
    return kind, data, shape, order


def _bytes(value: Any) -> bytes:
    """Bytes, which a pickle of protocol 2 holds as text."""
    text = (*value.arguments, "")[0] if isinstance(value, Made) else value
    return text.encode("latin-1") if isinstance(text, str) else bytes(memoryview(text))


_CALLS = {
    "multiarray.scalar": _scalar,
    "multiarray._reconstruct": _reconstruct,
    "numeric._frombuffer": _from_buffer,
}
_NUMPY: dict[str, Callable[[Made], tuple[Any, ...]]] = {
    f"numpy.{core}.{name}": read for core in ("core", "_core") for name, read in _CALLS.items()
}
"""What NumPy's pickles call -> type, bytes, shape and order."""
