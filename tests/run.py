"""What ``make test`` and ``make test-all`` run: the tests, another command beside them, and a look at what is left.

    python -m tests.run [--all] [--beside COMMAND] [arguments of pytest]

First the units by two workers, then, one after another, the tests that kill things on clusters of several nodes: a
machine that is busy with other tests would look to Ray like one that has died. Everything is below a temporary folder
of its own, which is taken away; a process that outlives the tests, or a file that they leave beside their folders,
fails the run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.paths import ROOT

UNITS = ["--ignore=tests/cluster", "-n2", "--dist=loadgroup", "--no-loadscope-reorder"]
KILLS = ["tests/cluster/test_kills.py", "--timeout=900"]
CLUSTER = ["tests/cluster", "--timeout=900"]

GRACE_S = 60.0
"""Seconds within which what the tests have ended must be gone."""
EXPECTED = ("pytest-of-", "lint", "ray", "pymp-", "torchinductor_", ".ses", "listing-")
"""What pytest, this script, Ray and its dashboard, torch's compiler, ONNX Runtime and a driver that is killed while it
lists keep in the temporary folder."""
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run it all; the exit code is 0 when everything has passed and nothing is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="all tests on clusters, not just one kill of each kind")
    parser.add_argument("--beside", default="true", metavar="COMMAND", help="runs meanwhile; its output comes last")
    options, arguments = parser.parse_known_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        with beside(options.beside, Path(folder, "lint")) as other:
            phases = [_pytest([*phase, *arguments]) for phase in (UNITS, CLUSTER if options.all else KILLS)]
        left = [*end_processes(), *files_left(Path(folder))]
    for line in left:
        print(f"left behind: {line}")
    empty = pytest.ExitCode.NO_TESTS_COLLECTED  # what ARGS chooses may all be in one phase
    codes = {code for code in phases if code != empty} or {empty}
    return int(max(codes)) or int(other.returncode != 0 or bool(left))


def adopt_orphans() -> None:
    """Have what loses its parent become a child of this process, so that it is found. Linux alone can do this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def beside(command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command meanwhile, and print what it has said once both are done."""
    with log.open("wb") as output:
        process = subprocess.Popen(shlex.split(command), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    with process:
        yield process
    print(f"{command}: {'failed' if process.returncode else 'passed'}\n{log.read_text()}", flush=True)


def _pytest(arguments: list[str]) -> int:
    """Run pytest. Ctrl-C, and SIGTERM to this process, end it in good order."""
    process = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal tells pytest too
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    return process.wait()


def end_processes(grace_s: float = GRACE_S) -> list[str]:
    """End the processes that are still there after a while, and tell them with the ports that they listen on."""
    told = []
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=grace_s)
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            ports = [each.laddr.port for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
            told.append(f"process {process.pid} with ports {ports}: {shlex.join(process.cmdline())}")
            process.kill()
    psutil.wait_procs(left)
    return told


def files_left(folder: Path) -> Iterator[str]:
    """What lies in the temporary folder besides what pytest and Ray keep there."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(EXPECTED):
            yield f"file {path.name}"


if __name__ == "__main__":
    sys.exit(main())
