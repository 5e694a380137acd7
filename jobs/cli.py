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
import json
import logging
import math
import os
import re
import signal
import sys
import types
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, get_args

import docstring_parser
import yaml

from pipelines.process.config_tree import KIND, build, leaves, parts
from pipelines.process.environment import check_environment
from pipelines.process.logs import log_to_stderr
from pipelines.process.redaction import redacted
from pspnet_core.errors import ConfigError, PspnetError, Terminated, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
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
        check_environment()
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
        print("error:", redacted(one_line(str(error))), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception:
        log.exception("the program failed")
        return 1
    return code


def parse_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Turn flags, and the YAML files that ``--config`` names, into a config.

    Raises:
        ConfigError: an unknown, missing or wrongly typed field, or a config file that cannot be read.
        SystemExit: after ``--help``.
    """
    known = leaves(config_class)
    flags = list(_read_flags(config_class, argv))
    values: dict[str, Any] = {}
    for _, path in (flag for flag in flags if flag[0] == "config"):
        values |= _read_file(path, config_class)
    values |= {name: text for name, text in flags if name != "config"}
    for name, leaf in known.items():
        if leaf.required and name not in values:
            raise ConfigError(name, "", f"required; give {_flag(name)}")
    return build(config_class, {name: _convert(name, value, known[name].type) for name, value in values.items()})


def json_line(result: Mapping[str, object]) -> str:
    """Write a result as JSON without line breaks: tensors, arrays and their scalars become lists and numbers,
    NaN and infinities ``null``, and anything else that JSON does not know (paths, dates) its text."""
    return json.dumps(_plain(result), allow_nan=False)


def _plain(value: Any) -> object:
    """A value in the types of JSON, without importing the libraries that it may come from."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _read_flags(config_class: type[DataclassInstance], argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each flag: ``--name=text``, ``--name text``, or ``--name`` alone for ``true``.

    argparse only writes the help, because it takes a value such as ``-1e-3`` for a flag.
    """
    known = {"config": str} | {name: leaf.type for name, leaf in leaves(config_class).items()}
    tokens = deque(argv)
    while tokens:
        flag, equals, text = tokens.popleft().partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag in ("-h", "--help"):
            _help_parser(config_class).parse_args(["--help"])
        if not flag.startswith("--"):
            raise ConfigError("argument", flag + equals + text, "values belong to flags; --help lists them")
        alone = not equals and (not tokens or tokens[0].startswith("--"))
        text = text if equals or alone else tokens.popleft()
        if name not in known:
            raise ConfigError(flag, text, f"unknown flag; {_closest(name, known)}")
        if alone and bool not in _alternatives(known[name]):
            raise ConfigError(flag, "", f"needs a value: {_describe(known[name])}")
        yield name, "true" if alone else text


def _help_parser(config_class: type[DataclassInstance]) -> ArgumentParser:
    """Write each flag's ``--help`` from its field's docstring, its type and its default."""
    known = leaves(config_class)
    read = {
        owner: docstring_parser.parse_from_object(owner)
        for owner in {config_class} | {leaf.owner for leaf in known.values()}
    }
    parser = ArgumentParser(description=read[config_class].short_description, usage="%(prog)s [--config FILE] [flags]")
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    for name, leaf in known.items():
        docs = [each.description or "" for each in read[leaf.owner].params if each.arg_name == leaf.field.name]
        default = "" if leaf.field.default is None else f"(default: {_shown(leaf.field.default)})"
        text = " ".join([*docs, "(required)" if leaf.required else default])
        parser.add_argument(_flag(name), metavar=_metavar(leaf.type), help=text.replace("%", "%%"))
    return parser


class _TextLoader(yaml.SafeLoader):
    """Leaves every scalar but null as text: YAML would read the workers ``1:4`` as 64 and a date as an object."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and the kind are PyYAML's)
        first: [("tag:yaml.org,2002:null", re.compile("(~|null)?$"))] for first in ("~", "n", "")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, of which YAML would take the later."""
        keys = [key.value for key, _ in node.value]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{key} stands twice; leave one of them out")
        return super().construct_mapping(node, deep)


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
    values: dict[str, Any] = {}
    for name, value in _entries(content or {}, config_class, path):
        if name in values:
            raise ConfigError(name, _text(value), f"stands twice in {path}; leave one of them out")
        values[name] = value
    return values


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


_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_CONVERTERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: _TRUTHS[text.lower()],
}
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


def _convert(name: str, given: Any, hint: Any) -> Any:
    """The value of a text, or of a list of texts, in a field of this type."""
    kind, *null = _alternatives(hint)
    if null and given in (None, "null"):
        return None
    items = get_args(kind)  # of a tuple
    try:
        if not items and given is not None:  # a list in the place of a text is JSON, as for --input
            return _CONVERTERS[kind](_text(given))
        texts = given if isinstance(given, list) else _listed(_scalar(given))
        kinds = items[:1] * len(texts) if ... in items else items
        return tuple(_CONVERTERS[item](_scalar(text)) for item, text in zip(kinds, texts, strict=True))
    except (ValueError, KeyError) as error:
        raise ConfigError(name, _text(given), f"must be {_describe(hint)}") from error


def _scalar(value: Any) -> str:
    """The text of one item; ValueError for nothing, a list or a mapping."""
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _listed(text: str) -> list[str]:
    """The items of a comma-separated list, which may stand in brackets; ValueError for an empty item."""
    inside = text.removeprefix("[").removesuffix("]") if text.endswith("]") else text
    items = [item.strip() for item in inside.split(",")] if inside.strip() else []
    if not all(items):
        raise ValueError("an empty item")
    return items


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _describe(hint: Any) -> str:
    """What a value of this type looks like, for a person."""
    kind, *null = _alternatives(hint)
    items = get_args(kind)  # of a tuple
    count = "" if ... in items else f"{len(items)} values, "
    text = f"a comma-separated list ({count}each {_NAMES[items[0]]})" if items else _NAMES[kind]
    return f"{text} or null" if null else text


def _shown(default: Any) -> str:
    """A default as a flag would take it."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(hint: Any) -> str:
    """A type as ``--help`` shows it."""
    kind, *_ = _alternatives(hint)
    return "LIST" if get_args(kind) else str(kind.__name__).upper()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, None the last of them; the type itself where it is none."""
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
    stdout.flush()
    if stdout is not sys.__stdout__:
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout
        return
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield stdout


def _log_to_stderr() -> None:
    """Show what this project logs from INFO on, and warnings of everything else."""
    log_to_stderr()
    for room in ("jobs", "pipelines", "pspnet_core"):
        logging.getLogger(room).setLevel(logging.INFO)
