"""What every job shares: a config dataclass becomes flags, and the result one JSON line.

A job is ``sys.exit(main(Config, run))``. What its caller can rely on:

* Every leaf of the config's tree is a flag; ``--config FILE.yaml`` gives values that the flags override, flat or
  nested by component.
* Standard output holds one JSON object, on its last line. Everything else goes to standard error.
* Exit code 0: done. 1: the job failed. 2: a bad flag or config, with one line
  ``error: field=value: remedy``. 130: interrupted. 143: an orderly end after SIGTERM; the JSON line holds
  the result so far.

The scripts find the project without touching ``sys.path``: ``make setup`` installs it in place with its
dependencies, and ``ray job submit --working-dir`` puts its folder on ``PYTHONPATH``.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import traceback
import types
from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar, Union, get_args, get_origin

import docstring_parser
import yaml
from docstring_parser import Docstring
from pydantic import TypeAdapter, ValidationError

from pipelines.process.config_tree import KIND, Leaf, build, leaves, parts
from pspnet_core.errors import ConfigError, PspnetError, Terminated

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

CONFIG_HELP = "YAML file with a value for any of the flags below; a flag given as well overrides it."


def main(
    config_class: type[ConfigT],
    run: Callable[[ConfigT], Mapping[str, object]],
    argv: Sequence[str] | None = None,
) -> int:
    """Build the config from flags, run the job, print its result as one JSON line; return the exit code.

    Args:
        config_class: a keyword-only dataclass. Its docstring and its fields' docs are the ``--help``; its
            ``__post_init__`` may raise :class:`ConfigError`.
        run: the job. All output of its own, its threads and its child processes goes to standard error.
        argv: the flags; those of the process by default.
    """
    os.environ.setdefault("NO_COLOR", "1")  # output is kept in logs and read by programs
    _log_to_stderr()
    try:
        config = parse_config(config_class, sys.argv[1:] if argv is None else argv)
        with _reserved_stdout() as stdout:
            try:
                result, code = run(config), 0
            except Terminated as end:
                result, code = end.result, 128 + signal.SIGTERM
            print(json_line(result), file=stdout, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PspnetError as error:
        cause = _origin(error)
        print("error:", " ".join(str(cause).split()), file=sys.stderr)
        return 2 if isinstance(cause, ConfigError) else 1
    except Exception:
        traceback.print_exc()
        return 1
    return code


def parse_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Turn flags, and the YAML files that ``--config`` names, into a config.

    Raises:
        ConfigError: an unknown, missing or wrongly typed field, or a config file that cannot be read.
        SystemExit: after ``--help``.
    """
    known = leaves(config_class)
    given = _read_flags(config_class, argv)
    files = [_read_file(path, config_class) for path in given.pop("config", [])]
    values = dict(ChainMap(given, *reversed(files)))
    for name, leaf in known.items():
        if leaf.required and name not in values:
            raise ConfigError(name, "", f"required; give {_flag(name)}")
    return build(config_class, {name: _convert(name, value, known[name].type) for name, value in values.items()})


def json_line(result: Mapping[str, object]) -> str:
    """Write a result as JSON without line breaks: tensors, arrays and their scalars become lists and numbers,
    NaN and infinities ``null``, and anything else that JSON does not know (paths, dates) its text."""
    return json.dumps(_plain(result), allow_nan=False, default=str)


def _read_flags(config_class: type[DataclassInstance], argv: Sequence[str]) -> dict[str, Any]:
    """Field name to the text that its flag gives, and ``config`` to the list of files."""
    known = leaves(config_class)
    parser = _build_parser(config_class)
    try:
        given, rest = parser.parse_known_args(_joined([_dashed(token) for token in argv]))
    except ArgumentError as error:  # a flag without its value: argparse checks no types here
        name = (error.argument_name or "").lstrip("-").replace("-", "_")
        remedy = f"needs a value: {_describe(known[name].type)}" if name in known else error.message
        raise ConfigError(error.argument_name or "flags", "", remedy) from error
    if rest:
        flag, _, text = rest[0].partition("=")
        if not flag.startswith("--"):
            raise ConfigError("argument", rest[0], "values belong to flags; --help lists them")
        raise ConfigError(flag, text, f"unknown flag; {_closest(flag[2:], ['config', *known])}")
    return vars(given)


def _build_parser(config_class: type[DataclassInstance]) -> ArgumentParser:
    """A parser that takes every flag as text; what a text means is for the field's type to say."""
    summary = (inspect.getdoc(config_class) or "").split("\n\n")[0]
    parser = ArgumentParser(
        description=summary,
        usage="%(prog)s [--config FILE] [flags]",
        argument_default=SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", action="append", help=CONFIG_HELP)
    for name, leaf in leaves(config_class).items():
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if bool in _alternatives(leaf.type) else {}
        parser.add_argument(_flag(name), metavar=_metavar(leaf.type), help=_help(leaf), **alone)
    return parser


def _help(leaf: Leaf) -> str:
    """What the docstrings say of a field, and its default."""
    docs = {each.arg_name: each.description for each in _docstring(leaf.owner).params}
    default = "" if leaf.field.default is None else f" (default: {leaf.field.default})"
    return ((docs.get(leaf.field.name) or "") + (" (required)" if leaf.required else default)).replace("%", "%%")


@functools.cache
def _docstring(owner: type[DataclassInstance]) -> Docstring:
    return docstring_parser.parse_from_object(owner)


class _TextLoader(yaml.SafeLoader):
    """Leaves every scalar but null as text: YAML would read the workers ``1:4`` as 64 and a date as an object."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and the kind are PyYAML's)
        first: [("tag:yaml.org,2002:null", re.compile("(~|null)?$"))] for first in ("~", "n", "")
    }


def _read_file(path: str, config_class: type[DataclassInstance]) -> dict[str, Any]:
    """Flat name to text, or list of texts, of a YAML file that is flat or nested by component."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _TextLoader)
        json.dumps(content)  # which refuses what holds itself
    except OSError as error:
        raise ConfigError("config", path, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError("config", path, f"is not YAML ({error})") from error
    if not isinstance(content, dict | None):
        raise ConfigError("config", path, "must hold lines of the form 'field: value'")
    return dict(_entries(content or {}, config_class, path))


def _entries(
    content: Mapping[str, Any], config_class: type[DataclassInstance], path: str, part: str = ""
) -> Iterator[tuple[str, Any]]:
    known, below = leaves(config_class, part), parts(config_class)
    for key, value in content.items():
        name = part if part and key == KIND else f"{key}".replace("-", "_")
        if isinstance(value, dict) and name in below:
            yield from _entries(value, below[name], path, name)
        elif name in known:
            yield name, value
        else:
            where = f"{path} under {part}" if part else path
            raise ConfigError(f"{key}", _text(value), f"unknown field in {where}; {_closest(name, known)}")


def _convert(name: str, given: Any, hint: Any) -> Any:
    """The value of a text, or of a list of texts, in a field of this type."""
    value = given if _is_list(hint) else _text(given)
    try:
        if value in (None, "null") and types.NoneType in _alternatives(hint):
            return None
        if _is_list(hint) and isinstance(value, str):
            value = yaml.load(value if value.startswith("[") else f"[{value}]", yaml.BaseLoader)
        return TypeAdapter(hint).validate_python(value)
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(name, _text(given), f"must be {_describe(hint)}") from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _describe(hint: Any) -> str:
    """What a value of this type looks like, for a person."""
    return " or ".join(map(_describe_one, _alternatives(hint)))


def _describe_one(option: Any) -> str:
    items = get_args(option)
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, items))
    if _is_list(option):
        count = f"{len(items)} values, " if get_origin(option) is tuple and ... not in items else ""
        return f"a comma-separated list ({count}each {_describe(items[0])})"
    return _NAMES.get(option, str(option))


_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "null"}


def _metavar(hint: Any) -> str:
    """A type as ``--help`` shows it."""
    first = _alternatives(hint)[0]
    if get_origin(first) is Literal:
        return "{" + ",".join(map(str, get_args(first))) + "}"
    return "LIST" if _is_list(first) else str(first.__name__).upper()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return any(get_origin(option) in (tuple, list, Sequence) for option in _alternatives(hint))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(token: str) -> str:
    """``--retry_errors=x`` as ``--retry-errors=x``: both spellings are understood."""
    flag, equals, text = token.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + text


def _joined(tokens: Sequence[str]) -> list[str]:
    """The tokens with each flag's value joined to it by ``=``: argparse takes ``-1e-3`` for a flag otherwise."""
    joined: list[str] = []
    for token in tokens:
        last = joined[-1] if joined else ""
        if last.startswith("--") and "=" not in last and not token.startswith("--"):
            joined[-1] = f"{last}={token}"
        else:
            joined.append(token)
    return joined


def _closest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"did you mean {_flag(matches[0])}?" if matches else "--help lists them all"


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    """Yield standard output for the JSON line; all other output goes to standard error.

    Descriptor 1 itself is turned, so that C libraries and child processes are covered, and it stays so: a
    thread that forwards the logs of remote workers may print until the process ends, and the JSON line must
    still be last. A caller in the same process that replaced ``sys.stdout`` gets it back as it was.
    """
    stdout = sys.stdout
    replaced = stdout is not sys.__stdout__
    stdout.flush()
    if replaced:
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout
        return
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield stdout


def _log_to_stderr() -> None:
    """Show what this project logs from INFO on, and warnings of everything else."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for room in ("jobs", "pipelines", "pspnet_core"):
        logging.getLogger(room).setLevel(logging.INFO)


def _origin(error: BaseException) -> BaseException:
    """Unwrap an error that was raised in another process.

    Ray raises such an error as an instance of both its class and the original's, whose text is the worker's
    whole traceback; the original is its ``cause``.
    """
    cause = getattr(error, "cause", None)
    return _origin(cause) if isinstance(cause, PspnetError) else error


def _plain(value: object) -> object:
    """The same value in the types of JSON, without importing the libraries that it may come from."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    to_list = getattr(value, "tolist", None)  # numpy arrays and scalars, torch tensors
    return _plain(to_list()) if callable(to_list) else value
