"""A session of Ray: one of our own is for this user alone, and goes without a trace."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError

from pipelines.cluster import session
from pipelines.cluster.session import KEEP_IDLE, LONGEST_FOLDER, LOOPBACK
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
    node = ray._private.worker._global_node
    sockets = Path(node.get_temp_dir_path()).parent
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (folder, sockets)]
    spills = node._fallback_directory == str(folder) and sockets.parent == Path("/tmp")
    (raylet,) = [process.environ() for process in processes if process.name() == "raylet"]
left = [str(path) for path in (*Path(os.environ["RAY_TMPDIR"]).iterdir(), *Path(os.environ["HOME"]).iterdir())]
left += [str(sockets)] if sockets.exists() else []
kept = {name: raylet.get(name) for name in (KEEP_IDLE[0], *LOOPBACK)}
token = [raylet["RAY_AUTH_MODE"], os.environ["RAY_AUTH_MODE"], os.environ.get("RAY_AUTH_TOKEN")]
print(json.dumps({
    "handled": handled, "listening": listening, "modes": modes, "spills": spills, "kept": kept, "token": token,
    "left": left,
}))
"""


def child(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as this one may be connected to Ray already."""
    without = (KEEP_IDLE[0], *LOOPBACK, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    environment = {name: value for name, value in os.environ.items() if name not in without} | variables
    return subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True)


def test_a_ray_of_our_own_is_for_this_user_alone(tmp_path: Path) -> None:
    """Ray by itself listens on all interfaces, opens its folders to all users, and leaves a token that all can read."""
    (tmp_path / "home").mkdir()
    job = child(
        OWN_RAY,
        RAY_ADDRESS="local",
        RAY_AUTH_MODE="disabled",
        HOME=str(tmp_path / "home"),
        RAY_TMPDIR=str(tmp_path / ("x" * LONGEST_FOLDER)),  # too long for sockets, and not there yet
        A_SECRET="0123456789abcdef",
    )
    assert job.returncode == 0, job.stderr
    *_, last = job.stdout.splitlines()
    found = json.loads(last)
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["listening"]}
    assert {address.removeprefix("::ffff:") for _, address in found["listening"]} == {"127.0.0.1"}
    assert found["modes"] == [0o700, 0o700]
    assert found["spills"]  # the sockets alone need a short path
    assert found["token"] == ["token", "disabled", None]
    assert found["left"] == []
    assert found["handled"] == ["SIGTERM"]
    assert found["kept"] == LOOPBACK | dict([KEEP_IDLE])
    assert r"printed \x1b[31m***" in job.stdout
    assert r'WARNING a.jpg\n{"forged": 1} \x1b[31m***' in job.stderr  # a worker's log, as the driver shows it


NOT_STARTED = """
import os, sys
from pathlib import Path
from pipelines.cluster import session
from pspnet_core.errors import ConfigError

def start(error):
    def refuse(**_):
        raise error
    return refuse

def begin():
    with session.own_ray(object_store_memory=1):
        pass

for error in [None, RuntimeError("no raylet\\nlogs"), Exception("timed out"), OSError(28, "full"), SystemExit(143)]:
    if error:
        session._init = start(error)
    try:
        begin()
    except (ConfigError, SystemExit) as caught:
        print(caught)
    assert not [*Path(os.environ["RAY_TMPDIR"]).iterdir()], error
"""


def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="o-") as short:
        job = child(NOT_STARTED, RAY_ADDRESS="local", RAY_TMPDIR=short)
    assert job.returncode == 0, job.stderr
    memory, raylet, time, disk, ended = job.stdout.splitlines()
    reasons = ["Attempting to cap object store memory", "no raylet", "timed out", "[Errno 28] full"]
    for line, reason in zip([memory, raylet, time, disk], reasons, strict=True):
        assert line.startswith(f"RAY_ADDRESS=local: no Ray starts here ({reason}")
        assert line.endswith(
            "; give the machine more memory, enlarge /dev/shm, or set RAY_TMPDIR to a folder with room"
        )
    assert ended == "143"


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("length", [LONGEST_FOLDER, LONGEST_FOLDER + 1])
def test_ray_gets_a_folder_that_is_short_enough(variable: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What batch systems give for temporary files may be too long for the names of sockets, or not there yet."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv(session.SPILLING, raising=False)
    with tempfile.TemporaryDirectory(prefix="o-", dir="/tmp") as scratch:
        place = scratch + "/" + "x" * (length - len(scratch) - 1)
        monkeypatch.setenv(variable, place)
        with session._folders() as (folder, spilling):
            is_long = length > LONGEST_FOLDER
            assert Path(folder).parent == Path("/tmp" if is_long else place)
            assert [Path(each).parent for each in (spilling,) if each] == [Path(place)] * is_long
        assert not os.path.exists(folder)
        assert os.listdir(place) == []


def test_a_folder_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    line = r"^RAY_TMPDIR=/dev/null/x: Ray needs a folder \(.*Not a directory.*\); set RAY_TMPDIR to one of at most 28 "
    with pytest.raises(ConfigError, match=line), session._folders():
        pass


CLUSTERS: list[tuple[str, Exception, str]] = [
    ("h:6379", ConnectionError("no answer\nadvice"), "cannot connect (no answer); start that cluster, or unset it"),
    ("", ConnectionError("gone"), "cannot connect (gone); set it to local, or `ray stop` the one on this machine"),
    (
        "h:6379",
        AuthenticationError("wrong"),
        "the cluster refuses the token: set RAY_AUTH_TOKEN to that of the cluster",
    ),
    ("h:6379", RuntimeError("Unauthenticated"), "Unauthenticated; it asks for a token: set RAY_AUTH_MODE=token, and "),
    (
        "h:6379",
        RuntimeError("Version mismatch:\n  Ray: 1"),
        "Version mismatch: Ray: 1; install the cluster's versions of",
    ),
]


@pytest.mark.parametrize(("address", "error", "line"), CLUSTERS)
def test_a_cluster_that_refuses_says_why(
    address: str, error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught, session._refused():
        raise error
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: {line}")


def test_ray_client_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(
        ConfigError, match=r"^RAY_ADDRESS=ray://head:10001: submit the job with `ray job submit`, or give "
    ):
        session._names_cluster()


def test_a_cluster_address_that_is_none_is_reported() -> None:
    job = child("from pipelines.cluster.session import ray_session\nwith ray_session(): pass", RAY_ADDRESS="nonsense")
    assert job.returncode == 1
    assert "ConfigError: RAY_ADDRESS=nonsense: cannot connect (" in job.stderr
