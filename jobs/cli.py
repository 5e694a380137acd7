"""What every job shares: a config dataclass becomes flags, and the result one JSON line.

A job is ``sys.exit(main(Config, run))``. The contract with whoever starts it:

* Every field of the dataclass is a flag; ``--config FILE.yaml`` gives values that the flags override.
* Standard output holds one JSON object, on its last line. Everything else goes to standard error.
* Exit code 0: done. 1: the job failed. 2: a bad flag or config, told in one line
  ``error: field=value: remedy``. 130: interrupted. 143: SIGTERM came, what was under way is done, and the JSON
  line tells how far it went.

The scripts find the project without touching ``sys.path``: whoever installs the dependencies installs it too
(``make setup`` does so in place), and ``ray job submit --working-dir`` puts its folder on ``PYTHONPATH``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
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
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

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
        run: the job. Whatever it, its threads or its child processes print goes to standard error.
        argv: the flags; those of the process by default.
    """
    os.environ.setdefault("NO_COLOR", "1")  # output is kept in logs and read by programs
    _log_to_stderr()
    try:
        config = parse_config(config_class, sys.argv[1:] if argv is None else argv)
        with _reserved_stdout() as stdout:
            result, code = _outcome(run, config)
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


def _outcome(run: Callable[[ConfigT], Mapping[str, object]], config: ConfigT) -> tuple[Mapping[str, object], int]:
    """A job's result and exit code."""
    try:
        return run(config), 0
    except Terminated as end:
        return end.result, 128 + signal.SIGTERM


def parse_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Turn flags, and the YAML file that ``--config`` names, into a config.

    Raises:
        ConfigError: an unknown, missing or wrongly typed field, or a config file that cannot be read.
        SystemExit: after ``--help``.
    """
    hints = get_type_hints(config_class)
    parser = _build_parser(config_class)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    values = _merge(argv, hints)
    for field in dataclasses.fields(config_class):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(field.name, "", f"required; give {_flag(field.name)}")
    try:
        parsed = parser.parse_args([f"--{name}={text}" for name, text in values.items()])
    except ArgumentError as error:
        raise _explained(error, values, hints) from error
    return config_class(**{field.name: parsed[field.name] for field in dataclasses.fields(config_class)})


def json_line(result: Mapping[str, object]) -> str:
    """Write a result as JSON without line breaks: tensors, arrays and their scalars become lists and numbers,
    NaN and infinities ``null``, and anything else that JSON does not know (paths, dates) its text."""
    return json.dumps(_plain(result), allow_nan=False, default=str)


class _Parser(ArgumentParser):
    """Shows ``--retry-errors`` for the field ``retry_errors``; both spellings are understood."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), super().format_help(*args, **kwargs))


def _build_parser(config_class: type[DataclassInstance]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    summary = (inspect.getdoc(config_class) or "").split("\n\n")[0]
    parser = _Parser(exit_on_error=False, print_config=None, description=summary)
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _merge(argv: Sequence[str], hints: Mapping[str, Any]) -> dict[str, str]:
    """Field name to its text: from the config files first, then from the flags, wherever they stand."""
    from_files: dict[str, str] = {}
    from_flags: dict[str, str] = {}
    tokens = list(argv)
    while tokens:
        name, text = _next_flag(tokens, hints)
        if name == "config":
            from_files |= _read_config(text, hints)
        else:
            from_flags[name] = text
    return from_files | from_flags


def _next_flag(tokens: list[str], hints: Mapping[str, Any]) -> tuple[str, str]:
    """Take one flag and its value off the front of ``tokens``."""
    token = tokens.pop(0)
    flag, equals, text = token.partition("=")
    if not flag.startswith("--"):
        raise ConfigError("argument", token, "values belong to flags; --help lists them")
    name = flag[2:].replace("-", "_")
    if name != "config" and name not in hints:
        raise ConfigError(flag, text, f"unknown flag; {_closest(name, ['config', *hints])}")
    hint = hints.get(name, str)
    if not equals:
        if tokens and not tokens[0].startswith("--"):
            text = tokens.pop(0)
        elif bool in _alternatives(hint):
            text = "true"
        else:
            raise ConfigError(_flag(name), "", f"needs a value: {_describe(hint)}")
    if _is_list(hint) and not text.startswith("[") and text != "null":
        text = f"[{text}]"
    return name, text


class _TextLoader(yaml.SafeLoader):
    """Leaves scalars as they are written, except null: a field's own type says what they mean.

    YAML would read the workers ``1:4`` as the number 64 (in base 60) and a date as an object.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and the kind are PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read_config(path: str, hints: Mapping[str, Any]) -> dict[str, str]:
    """Field name to its text, as a flag would give it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _TextLoader)
    except OSError as error:
        raise ConfigError("config", path, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", path, f"is not YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("config", path, "must hold lines of the form 'field: value'")
    texts = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ConfigError(str(key), value, f"unknown field in {path}; {_closest(name, hints)}")
        texts[name] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _explained(error: ArgumentError, values: Mapping[str, str], hints: Mapping[str, Any]) -> ConfigError:
    """Tell a type error of the parser in one line."""
    named = re.search(r'(?:Parser key|argument) "?(?:--)?(\w+)', str(error))
    name = named[1] if named else ""
    if name in values:
        return ConfigError(name, values[name], f"must be {_describe(hints[name])}")
    return ConfigError("flags", " ".join(f"{_flag(k)}={v}" for k, v in values.items()), str(error))


def _describe(hint: Any) -> str:
    """What a value of this type looks like, for a person."""
    names: dict[Any, str] = {
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        types.NoneType: "null",
    }
    parts = []
    for option in _alternatives(hint):
        if get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(option))))
        elif _is_list(option):
            items = get_args(option)
            count = f"{len(items)} values, " if get_origin(option) is tuple and ... not in items else ""
            parts.append(f"a comma-separated list ({count}each {_describe(items[0])})")
        else:
            parts.append(names.get(option, str(option)))
    return " or ".join(parts)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return any(get_origin(option) in (tuple, list, Sequence) for option in _alternatives(hint))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _closest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {_flag(matches[0])}?" if matches else "--help lists them all"


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    """Yield standard output for the JSON line; everybody else's goes to standard error.

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
    """The same value in the types of JSON, as far as it can be told without knowing the libraries."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    to_list = getattr(value, "tolist", None)  # numpy arrays and scalars, torch tensors
    return _plain(to_list()) if callable(to_list) else value
