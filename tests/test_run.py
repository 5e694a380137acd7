"""What ``make test`` does beside the tests: whatever they leave behind is found, told and ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.run import beside, files_left
from tests.support.paths import ROOT

LISTENS = """
import os, socket, time
server = socket.create_server(("127.0.0.1", 0))
print(os.getpid(), server.getsockname()[1], flush=True)
time.sleep(600)
"""
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LISTENS!r}], start_new_session=True)"
LEAVES = f"""
import subprocess, sys
from tests import run
run.adopt_orphans()
subprocess.run([sys.executable, "-c", {PARENT!r}], check=True)
sys.stdin.readline()
print(*run.end_processes(1), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to another process than init")
def test_a_process_that_outlives_its_parent_is_found_with_its_port_and_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEAVES], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        orphan, port = map(int, process.stdout.readline().split())
        told, _ = process.communicate("\n")
    assert told.startswith(f"process {orphan} with ports [{port}]: ")
    assert not psutil.pid_exists(orphan)


def test_files_beside_those_of_pytest_and_ray_are_found(tmp_path: Path) -> None:
    for name in ("pytest-of-me", "ray", "download-x"):
        (tmp_path / name).mkdir()
    assert list(files_left(tmp_path)) == ["file download-x"]


def test_a_command_beside_is_waited_for_and_its_output_comes_in_one_piece(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with beside(f"{sys.executable} -c 'print(1); raise SystemExit(3)'", tmp_path / "log") as process:
        print("meanwhile")
    assert process.returncode == 3
    meanwhile, verdict, output = capsys.readouterr().out.splitlines()[:3]
    assert (meanwhile, output) == ("meanwhile", "1")
    assert verdict.endswith(": failed")


def test_workers_know_the_groups(request: pytest.FixtureRequest) -> None:
    """Else each worker would start its own Ray; xdist adds a group's name to the names of its tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@tests/test_run.py")
