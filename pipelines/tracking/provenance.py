"""Where a run comes from: who and what started it, which code, on which machine."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from pipelines.process.environment import variables
from pspnet_core import __version__

PACKAGES = ("torch", "numpy", "pillow", "ray", "pyarrow", "mlflow")
_ROOMS = ("jobs", "pipelines", "pspnet_core")


def environment() -> dict[str, Any]:
    """Interpreter, machine, devices and packages of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def code_version() -> dict[str, str]:
    """Tags that say which code this is: version and contents of the packages and, in a git checkout, its commit."""
    root, git = Path(__file__).resolve().parents[2], shutil.which("git")
    tags = {"code.version": __version__, "code.sha256": _contents(root)}
    if git is None or not (root / ".git").exists():
        return tags
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables() | {"GIT_OPTIONAL_LOCKS": "0"}
    )
    if said.returncode:  # such as a checkout of another user, which git refuses to read
        return tags
    commit = said.stdout.strip()
    tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    tags["code.modified"] = str(commit.endswith("-dirty")).lower()
    return tags


def _contents(root: Path) -> str:
    """SHA-256 over names and contents of all modules, because a job that Ray uploads has no commit to name."""
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
