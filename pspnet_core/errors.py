"""The errors that this package raises on purpose.

::

    PspnetError                 anything raised on purpose
    ├── ConfigError             a user's mistake: one line with the field, the value and the remedy
    ├── Terminated              SIGTERM was obeyed: started work is finished
    └── ImageError              what is wrong with one image: a kind (one word) and a message
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


class PspnetError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(PspnetError, ValueError):
    """A user's mistake, told in one line: ``field=value: remedy``.

    Attributes:
        field: the name of the flag or config field, as the user wrote it.
        value: the value that was refused.
        remedy: what to do instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        # The parts are handed on unchanged, so that the error survives pickling between processes.
        super().__init__(field, value, remedy)
        self.field = field
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return one_line(f"{self.field}={self.value}: {self.remedy}")


def check(passed: bool, field: str, value: object, remedy: str) -> None:
    """Raise a ConfigError for a value that has not passed its test."""
    if not passed:
        raise ConfigError(field, value, remedy)


def check_choice(field: str, value: object, choices: Collection[object]) -> None:
    """Raise a ConfigError for a value that is none of the choices, which the error lists."""
    check(value in choices, field, value, f"choose one of {', '.join(map(str, choices))}")


def check_positive(**values: float) -> None:
    """Raise a ConfigError for the first value that is not positive and finite; a name is its flag's."""
    for name, value in values.items():
        check(0 < value < math.inf, name, value, "give a positive number")


def check_not_negative(**values: float) -> None:
    """Raise a ConfigError for the first value that is negative or not finite."""
    for name, value in values.items():
        check(0 <= value < math.inf, name, value, "give a number of at least 0")


def check_below_1(**values: float) -> None:
    """Raise a ConfigError for the first value that is not in [0, 1)."""
    for name, value in values.items():
        check(0 <= value < 1, name, value, "give a number of at least 0 and below 1")


class Terminated(PspnetError):
    """SIGTERM was obeyed: the process has finished the work that it had started.

    Attributes:
        result: the job's result so far.
    """

    def __init__(self, result: Mapping[str, object]) -> None:
        super().__init__("terminated")
        self.result = result


_OF_FILES = ("Empty", "Unreadable", "Truncated", "TooLarge", "Changed", "Missing", "Denied")
_OF_RUNNING = ("NotFinite", "Crashed", "TimedOut")
KINDS = (*_OF_FILES, *_OF_RUNNING, "Failed")
"""Kinds of errors of images; ``Failed`` is what fits none of the others."""


class ImageError(PspnetError):
    """What is wrong with one image or mask; ``str()`` gives ``Kind: message`` in one line.

    Attributes:
        kind: one of ``KINDS``, or ``NotAMask`` of a mask.
        message: for people.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return one_line(f"{self.kind}: {self.message}")


def as_image_error(error: Exception) -> ImageError:
    """An error that one image has caused, as its own: ``Failed: <type>: <message>`` where nobody foresaw it."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, MemoryError):
        return ImageError("TooLarge", f"out of memory {error}".rstrip())
    return ImageError("Failed", f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """Text from outside as one line of printable characters: blanks are folded, all others are spelt as Python does.

    Names and messages of codecs may hold line breaks, terminal sequences and halves of surrogate pairs.
    """
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Text with all characters that are not printable spelt as Python does; tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\t" else each.encode("unicode_escape").decode() for each in text
    )
