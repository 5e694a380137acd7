"""A session of Ray: one of our own is for this user alone, and goes without a trace."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipelines.cluster.session import KEEP_IDLE, LONGEST_FOLDER, LOOPBACK, make_folder
from pspnet_core.errors import ConfigError

OWN_RAY = """
import json, logging, os, psutil, ray, signal, stat, threading
from pathlib import Path
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from pipelines.cluster.session import KEEP_IDLE, LOOPBACK, ray_session
from pipelines.process.logs import log_to_stderr

log_to_stderr()
handled = []
signal.signal(signal.SIGTERM, lambda *_: handled.append("SIGTERM"))
with ray_session():
    os.kill(os.getpid(), signal.SIGTERM)

    @ray.remote
    class Worker:
        def work(self):
            logging.getLogger("pipelines.test").warning("a.jpg\\n{\\"forged\\": 1} \\x1b[31m" + os.environ["A_SECRET"])
            print("printed \\x1b[31m" + os.environ["A_SECRET"], flush=True)

    shown = threading.Semaphore(0)  # once for each of the worker's streams
    dispatcher.add_handler("shown", lambda batch: "***" in "".join(batch["lines"]) and shown.release())
    worker = Worker.remote()
    ray.get(worker.work.remote())
    assert shown.acquire(timeout=60) and shown.acquire(timeout=60)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        (process.name(), each.laddr.ip)
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    (folder,) = Path(os.environ["RAY_TMPDIR"]).iterdir()
    mode = stat.S_IMODE(folder.stat().st_mode)
    (raylet,) = [process.environ() for process in processes if process.name() == "raylet"]
left = [str(path) for path in (*Path(os.environ["RAY_TMPDIR"]).iterdir(), *Path(os.environ["HOME"]).iterdir())]
kept = {name: raylet.get(name) for name in (KEEP_IDLE[0], *LOOPBACK)}
print(json.dumps({"handled": handled, "listening": listening, "mode": mode, "kept": kept, "left": left}))
"""


def child(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as this one may be connected to Ray already."""
    without = (KEEP_IDLE[0], *LOOPBACK, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    environment = {name: value for name, value in os.environ.items() if name not in without} | variables
    return subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True)


def test_a_ray_of_our_own_is_for_this_user_alone(tmp_path: Path) -> None:
    """Ray by itself listens on all interfaces, opens its folders to all users, and leaves a token that all can read."""
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(prefix="o-") as short:
        job = child(
            OWN_RAY, RAY_ADDRESS="local", HOME=str(tmp_path / "home"), RAY_TMPDIR=short, A_SECRET="0123456789abcdef"
        )
    assert job.returncode == 0, job.stderr
    *_, last = job.stdout.splitlines()
    found = json.loads(last)
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["listening"]}
    assert {address.removeprefix("::ffff:") for _, address in found["listening"]} == {"127.0.0.1"}
    assert found["mode"] == 0o700
    assert found["left"] == []
    assert found["handled"] == ["SIGTERM"]
    assert found["kept"] == LOOPBACK | dict([KEEP_IDLE])
    assert r"printed \x1b[31m***" in job.stdout
    assert r'WARNING a.jpg\n{"forged": 1} \x1b[31m***' in job.stderr  # a worker's log, as the driver shows it


def test_ray_gets_a_folder_that_is_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What batch systems give for temporary files may be too long for the names of sockets."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * LONGEST_FOLDER)))
    Path(os.environ["TMPDIR"]).mkdir()
    folder = make_folder()
    os.rmdir(folder)
    assert folder.startswith("/tmp/ray-")


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("x" * (LONGEST_FOLDER + 1), "too long for Ray's sockets; set RAY_TMPDIR to a folder of at most 28 bytes"),
        ("/nowhere", r"Ray needs a folder \(.*No such file or directory.*\); set RAY_TMPDIR to a folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(folder: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ConfigError, match=rf"^RAY_TMPDIR={folder}: {line}"):
        make_folder()


def test_a_cluster_address_that_is_none_is_reported() -> None:
    job = child("from pipelines.cluster.session import ray_session\nwith ray_session(): pass", RAY_ADDRESS="nonsense")
    assert job.returncode == 1
    assert "ConfigError: RAY_ADDRESS=nonsense: cannot connect (" in job.stderr
