"""Machines as containers and batch systems make them, each a row of ``MACHINES``.

Where the system allows it (user namespaces) a job finds a root that it cannot write, 64 MB of ``/dev/shm`` and a user
without an entry in ``/etc/passwd``. In any case it starts in ``/`` with no standard input and files for nobody else.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT

USER = "54321"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
NAMELESS = f"unshare --user --map-user={USER} --map-group={USER}"
READ_ONLY = f"""
mount --bind "$0" "$0" && mount -o remount,bind,ro / && mount -t tmpfs -o size=64m shm /dev/shm && exec {NAMELESS} "$@"
"""
START = 'umask 077; cd /; exec "$@" <&-'
INHERITED = (
    "RAY_AUTH",
    "MPL",
    "XDG",
    "LC_",
    "LANG",
    "PYTHON",
    "TERM",
    "USER",
    "LOGNAME",
    "HOME",
    "TMPDIR",
    "RAY_TMPDIR",
)
"""Variables that a machine has only where its row says so."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One row.

    Attributes:
        variables: its environment; ``{scratch}`` is the one folder that can be written.
        flags: of the job, besides what it labels.
        code: the job's exit code.
        says: a pattern that standard error holds.
        alone: whether it makes no sense without a root that cannot be written.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ("--local",)
    code: int = 0
    says: str = ""
    alone: bool = False


BEHIND_A_PROXY = dict.fromkeys(["http_proxy", "https_proxy", "ALL_PROXY"], "http://127.0.0.1:9")
MACHINES: dict[str, Machine] = {
    # Nothing that one of these breaks is hidden by another.
    "a container with Ray": Machine(
        variables={"TMPDIR": "{scratch}/" + "x" * 40, "RAY_TMPDIR": "{short}", "LC_ALL": "C", **BEHIND_A_PROXY},
        flags=("--local", "false", "--workers", "1"),
    ),
    "a home that cannot be written": Machine(
        variables={"TMPDIR": "{scratch}", "HOME": "/usr", "LC_ALL": "tr_TR.UTF-8", **BEHIND_A_PROXY},
        flags=("--local", "--track", "true"),
        says=rf"there is no home folder that can be written: .* in \S+/pspnet-{USER}/\.pspnet; set HOME",
        alone=True,
    ),
    "names that are not read as UTF-8": Machine(
        variables={"TMPDIR": "{scratch}", "HOME": "/", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        code=2,
        says=r"\Aerror: PYTHONUTF8=0: names of files would be read as ascii, not as UTF-8; set it to 1\n\Z",
    ),
    "no temporary folder": Machine(
        variables={"TMPDIR": "/usr"},
        code=2,
        says=r"\Aerror: TMPDIR=/usr: no temporary folder can be written; set it to one that can\n\Z",
        alone=True,
    ),
}


@functools.cache
def has_namespaces() -> bool:
    """Whether this user may make a namespace with a root that cannot be written."""
    try:
        return (
            subprocess.run([*NAMESPACE, "bash", "-c", READ_ONLY, "/tmp", "true"], capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False


def label_on(
    machine: Machine, scratch: Path, short: Path, flags: Mapping[str, object]
) -> subprocess.CompletedProcess[str]:
    """Start ``jobs/label.py`` on a machine; ``scratch``, and ``short`` below it or elsewhere, can be written there."""
    places = {"scratch": str(scratch), "short": str(short)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    given = {name: value.format(**places) for name, value in machine.variables.items()}
    command = ["bash", "-c", START, "bash", sys.executable, str(ROOT / "jobs" / "label.py"), *machine.flags]
    command += [f"--{name}={value}" for name, value in flags.items()]
    wrapped = [*NAMESPACE, "bash", "-c", READ_ONLY, str(scratch), *command] if has_namespaces() else command
    environment = kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | given
    return subprocess.run(wrapped, env=environment, capture_output=True, text=True, encoding="utf-8")
