"""Read a pickle as data: nothing that it names is imported, nothing that it calls is called.

A pickle is a program for a machine with a stack. This machine makes numbers, texts, lists, tuples and dicts by itself.
Where a pickle would call something, it keeps a ``Made``: a note of what would have been called, and with what. A file
can therefore be large, and do nothing else: beyond the file's own bytes a step takes little memory, and the number of
steps is limited.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

MOST_STEPS = 2_000_000
"""Weights and optimiser of a ResNet-152 take 150,000; the worst two millions take half a gigabyte."""
LONGEST_NAME = 100
"""Characters of a module's name, and of a name in it: a step joins two texts that may stand in the file once."""
LONGEST_KEY = 1000
"""Characters of a key: a step compares two keys."""
_MOST_KEY = 2**32
_ALONE = "where it was made, save its state_dict() alone"

Key = str | bytes | int | None


class UnsupportedError(ValueError):
    """What a sound file may hold and is not read here, and the remedy."""

    def __init__(self, what: str, remedy: str = _ALONE) -> None:
        super().__init__(f"{what}; {remedy}")


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names, as ``torch._utils._rebuild_tensor_v2``."""

    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Something outside of the pickle, by an id that its writer has chosen (a *persistent id*)."""

    id: Any = field(repr=False)


@dataclass(slots=True, eq=False)
class Made:
    """What would have been made by a call.

    Attributes:
        path: what would have been called.
        arguments: with what.
        entries: what would have been put into it by ``made[key] = value``; None where nothing would.
        state: what would have been given to its ``__setstate__``.
    """

    path: str
    arguments: tuple[Any, ...] = field(default=(), repr=False)
    entries: dict[Key, Any] | None = field(default=None, repr=False)
    state: Any = field(default=None, repr=False)


class Pickle(NamedTuple):
    """The object in a pickle, and all references of the pickle."""

    content: Any
    references: list[Reference]


def read_pickle(file: IO[bytes]) -> Pickle:
    """Read one pickle of any protocol from where the file stands, to the pickle's end and no further.

    Raises:
        UnsupportedError: it has too many steps.
        Exception: of almost any kind, for bytes that are no pickle.
    """
    machine = _Machine()
    for code, argument, _ in pickletools.genops(file):
        machine.count(1)
        if code.name == "STOP":
            break
        _STEPS[code.name](machine, argument)
    return Pickle(machine.stack.pop(), machine.references)


def mapping(value: object) -> Mapping[Key, Any] | None:
    """The entries of a dict, or of an object that stands for one, such as an OrderedDict; else None."""
    entries = value.entries if isinstance(value, Made) else value
    return entries if isinstance(entries, dict) else None


def _keyed(pairs: Iterable[Any]) -> dict[Key, Any]:
    """A dict of those pairs whose key is cheap."""
    return {key: value for key, value in pairs if _is_cheap(key)}


def _is_cheap(key: object) -> bool:
    """Whether a key takes no time to hash and to compare, and as many as one likes do not collide.

    Tuples of tuples take for ever, long numbers and texts long; other numbers can be chosen to have one hash.
    """
    if isinstance(key, int):
        return -_MOST_KEY < key < _MOST_KEY
    return key is None or (isinstance(key, str | bytes) and len(key) <= LONGEST_KEY)


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


class _Machine:
    """The stack, of which the part above the last mark is ``stack``, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.references: list[Reference] = []
        self.left = MOST_STEPS

    def count(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise UnsupportedError(f"a pickle of more than {MOST_STEPS} steps")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def group(self, length: int) -> None:
        """The topmost items as a tuple."""
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def memorise(self, index: int) -> None:
        if not _is_cheap(index):
            raise ValueError("no place in the memo")
        self.memo[index] = self.stack[-1]

    def name(self, path: str) -> None:
        self.push(Name(path.replace(" ", ".")))

    def join(self, name: object, module: object) -> None:
        texts = [text for text in (module, name) if isinstance(text, str) and len(text) <= LONGEST_NAME]
        self.name(".".join(texts) if len(texts) == 2 else "")

    def call(self, arguments: object, called: object) -> None:
        path = called.path if isinstance(called, Name) else ""
        made = Made(path, arguments if isinstance(arguments, tuple) else ())
        if path == "collections.OrderedDict":
            made.entries = self.entries(*made.arguments[:1])
        self.push(made)

    def entries(self, pairs: object = ()) -> dict[Key, Any]:
        """What an OrderedDict is made of, which is how Python 2 writes its entries."""
        if not isinstance(pairs, list | tuple):
            return {}
        self.count(len(pairs))  # one list may be given to many
        return _keyed(pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2)

    def call_named(self, named: object, arguments: object, called: object) -> None:
        """As ``call``; arguments by name are not kept."""
        self.call(arguments, called)

    def build(self, state: object) -> None:
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def refer(self, id: object) -> None:
        self.references.append(Reference(id))
        self.push(self.references[-1])

    def extend(self, items: list[Any]) -> None:
        """Put items into a list; an object like one does not keep them."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Put items, keys and values in turn, into a dict or an object like one."""
        target, entries = self.stack[-1], _keyed(_pairs(items))
        if isinstance(target, Made):
            target.entries = {} if target.entries is None else target.entries
            target.entries.update(entries)
        elif isinstance(target, dict):
            target.update(entries)


_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
# By the names that pickletools documents. Nothing is hashed but keys, so that a set is a list; what refers to other
# machines (EXT1, NEXT_BUFFER...) is left out.
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_VALUES.split(), lambda m, value: m.push(value)),
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.group(1),
    "TUPLE2": lambda m, _: m.group(2),
    "TUPLE3": lambda m, _: m.group(3),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "EMPTY_SET": lambda m, _: m.push([]),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": lambda m, _: m.push(_keyed(_pairs(m.pop_mark()))),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.pop_mark()),
    "MARK": lambda m, _: m.mark(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "POP": lambda m, _: m.drop(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, index: m.memorise(index)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "MEMOIZE": lambda m, _: m.memorise(len(m.memo)),
    "GLOBAL": lambda m, path: m.name(path),
    "STACK_GLOBAL": lambda m, _: m.join(m.pop(), m.pop()),
    "REDUCE": lambda m, _: m.call(m.pop(), m.pop()),
    "NEWOBJ": lambda m, _: m.call(m.pop(), m.pop()),
    "NEWOBJ_EX": lambda m, _: m.call_named(m.pop(), m.pop(), m.pop()),
    "BUILD": lambda m, _: m.build(m.pop()),
    "PERSID": lambda m, id: m.refer(id),
    "BINPERSID": lambda m, _: m.refer(m.pop()),
}
