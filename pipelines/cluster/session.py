"""The Ray session of a job: which cluster it connects to, or how it starts one of its own, and how it leaves."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # not in its stubs
from ray.exceptions import RayError

from pipelines.cluster.failures import in_plain_words, refusal
from pipelines.cluster.machine import machine_cpus
from pipelines.process.redaction import first_line, redacted
from pspnet_core.errors import ConfigError, PspnetError, Terminated, printable

log = logging.getLogger(__name__)
KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""A variable for the environment of a Ray that is about to start. Where a node has more processes than CPUs, Ray ends
those that are idle for a second. So a node with few CPUs would start processes anew for each chunk that is read or
written, at a second or two of CPU time each."""

LONGEST_FOLDER = 28
"""Bytes of the folder below which Ray may put its sockets, whose paths the system bounds."""
SHORT_FOLDER = "/tmp"
SPILLING = "RAY_object_spilling_directory"
"""Ray's variable for where objects go that memory has no room for."""

LOOPBACK = {name: "lo0" if sys.platform == "darwin" else "lo" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
"""Variables for the environment of a Ray of one machine: where training's workers talk to each other."""

HOOK = "pipelines.process.logs.log_to_stderr"
"""How each of the job's worker processes begins: what it logs is for people, too."""


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names or that runs on this machine, else start one in the process.

    Leaves on the way out, unless the caller was connected before.

    Raises:
        ConfigError: when there is no such cluster, or it refuses the connection; or for want of a folder.
        ClusterFailed: in place of an error of Ray's in the context; an error of ours from a worker comes as itself.
    """
    with in_plain_words():
        if ray.is_initialized():
            yield
        elif _names_cluster():
            with _connected():
                yield
        else:
            with own_ray(num_cpus=machine_cpus()):
                yield


@contextlib.contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """Start a Ray for this process alone, and end it on leaving.

    It listens on loopback, asks for a token that no file holds, whatever the environment says of tokens, and keeps its
    files in private folders, which go with it unless an error may need its logs.

    Args:
        options: for ``ray.init``.

    Raises:
        ConfigError: there is no folder for it, or it cannot start on this machine.
    """
    for variable in (KEEP_IDLE, *LOOPBACK.items()):
        os.environ.setdefault(*variable)
    # In a runtime environment the hook would cost the processes that Ray has ready, and so seconds.
    os.environ.setdefault(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR, HOOK)
    with _own_token(), _folders() as (folder, spilling):
        try:
            with _starting(), _loopback():
                # Not the folder itself, which Ray would open to everybody.
                _init(
                    address="local",
                    include_dashboard=False,
                    _temp_dir=os.path.join(folder, "r"),
                    object_spilling_directory=spilling,
                    **options,
                )
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    with _refused():
        _init(runtime_env={"worker_process_setup_hook": HOOK})
    try:
        yield
    finally:
        ray.shutdown()


def _names_cluster() -> bool:
    """Whether Ray would connect to a cluster instead of starting one."""
    given = os.environ.get("RAY_ADDRESS", "")
    if "://" in given:  # Ray Client, through which neither training's nor labelling's driver works
        remedy = "submit the job with `ray job submit`, or give HOST:6379 on a machine of the cluster (docs/cluster.md)"
        raise ConfigError("RAY_ADDRESS", redacted(given), remedy)
    with _refused():
        address: Any = None  # as of ray.init
        return services.canonicalize_bootstrap_address(address) is not None


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """A ConfigError for a cluster that cannot be found or used."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        remedy = (
            "start that cluster, or unset it" if address else "set it to local, or `ray stop` the one on this machine"
        )
        remedy = refusal(error) or f"cannot connect ({first_line(error)}); {remedy}"
        raise ConfigError("RAY_ADDRESS", redacted(address), remedy) from error


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """A ConfigError for a machine on which Ray does not start: it raises errors of all kinds."""
    try:
        yield
    except PspnetError:
        raise
    except Exception as error:
        remedy = "give the machine more memory, enlarge /dev/shm, or set RAY_TMPDIR to a folder with room"
        address = os.environ.get("RAY_ADDRESS", "")
        raise ConfigError("RAY_ADDRESS", address, f"no Ray starts here ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Have a Ray that is started ask for a token that only this process and its children know."""
    # Ray warns of its asking for a token.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    _read_token_anew()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_token_anew()


def _read_token_anew() -> None:
    """Ray remembers what the environment said of tokens."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _init(**options: Any) -> None:
    """``ray.init`` that shows lines of workers as our log does its own, and leaves our handler of SIGTERM in force."""
    global_worker_stdstream_dispatcher.remove_handler(_escape.__name__)
    global_worker_stdstream_dispatcher.add_handler(_escape.__name__, _escape)  # before the one that prints them
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.WARNING, **options)
    finally:
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)


def _escape(batch: dict[str, Any]) -> None:
    """Make what a worker, or a library in it, has printed fit for the driver's log."""
    batch["lines"] = [printable(redacted(line)) for line in batch["lines"]]


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Have a Ray that is started listen on loopback only.

    It takes no address of loopback by itself, but has a switch for macOS and Windows, where firewalls would ask.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _folders() -> Iterator[tuple[str, str | None]]:
    """Private folders for a Ray: its own, and one for objects that it spills where those shall not lie in that.

    Batch systems give folders for temporary files that are too long for sockets. So only the sockets and logs go
    elsewhere then, as ``/tmp`` may be small. An error that may need the logs keeps them.

    Raises:
        ConfigError: no folder can be made.
    """
    given = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    place = os.path.abspath(os.environ.get(given) or tempfile.gettempdir())
    is_long = len(os.fsencode(place)) > LONGEST_FOLDER
    made: list[str] = []
    kept = None
    try:
        for parent in [place, SHORT_FOLDER] if is_long else [place]:
            made.append(_make_folder(parent, given))
        yield made[-1], os.environ.get(SPILLING, made[0]) if is_long else None
    except (ConfigError, Terminated):
        raise
    except Exception:
        kept = made[-1]
        log.info("Ray's logs are in %s", kept)
        raise
    finally:
        for folder in made:
            if folder != kept:
                shutil.rmtree(folder, ignore_errors=True)  # processes that end may still write their last lines


def _make_folder(parent: str, given: str) -> str:
    try:
        os.makedirs(parent, mode=0o700, exist_ok=True)  # a batch system may leave that to its jobs
        return tempfile.mkdtemp(prefix="ray-", dir=parent)
    except OSError as error:
        remedy = f"set RAY_TMPDIR to one of at most {LONGEST_FOLDER} bytes that can be written"
        raise ConfigError(given, os.environ.get(given, ""), f"Ray needs a folder ({error}); {remedy}") from error
