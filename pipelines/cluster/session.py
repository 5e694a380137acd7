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
from ray.exceptions import RayError

from pipelines.cluster.failures import in_plain_words
from pipelines.cluster.machine import machine_cpus
from pipelines.process.redaction import first_line, redacted
from pspnet_core.errors import ConfigError, Terminated, printable

log = logging.getLogger(__name__)
KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""A variable for the environment of a Ray that is about to start. Where a node has more processes than CPUs, Ray ends
those that are idle for a second. So a node with few CPUs would start processes anew for each chunk that is read or
written, at a second or two of CPU time each."""

LONGEST_FOLDER = 28
"""Bytes of the folder below which Ray may put its sockets, whose paths the system bounds."""
SHORT_FOLDER = "/tmp"

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

    It listens on loopback, asks for a token that no file holds, and keeps its files in a private folder, which goes
    with it unless an error may need its logs.

    Args:
        options: for ``ray.init``.

    Raises:
        ConfigError: there is no folder for it.
    """
    for variable in (KEEP_IDLE, *LOOPBACK.items()):
        os.environ.setdefault(*variable)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # stays, as Ray remembers it
    # In a runtime environment the hook would cost the processes that Ray has ready, and so seconds.
    os.environ.setdefault(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR, HOOK)
    # Ray warns of its asking for a token.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    folder = make_folder()
    with _loopback():
        # Not the folder itself, which Ray would open to everybody.
        _init(address="local", include_dashboard=False, _temp_dir=os.path.join(folder, "r"), **options)
    failed = False
    try:
        yield
    except (ConfigError, Terminated):
        raise
    except Exception:
        failed = True
        raise
    finally:
        ray.shutdown()
        if failed:
            log.info("Ray's logs are in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # processes that end may still write their last lines


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
        remedy = f"cannot connect ({first_line(error)}); start that cluster, or unset it"
        raise ConfigError("RAY_ADDRESS", address, remedy) from error


def _init(**options: Any) -> None:
    """``ray.init`` that shows lines of workers as our log does its own, and leaves our handler of SIGTERM in force."""
    global_worker_stdstream_dispatcher.remove_handler(_escape.__name__)
    global_worker_stdstream_dispatcher.add_handler(_escape.__name__, _escape)  # before the one that prints them
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(logging_level=logging.WARNING, **options)
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


def make_folder() -> str:
    """A new private folder for a Ray; not below a ``TMPDIR`` that is too long for it, as batch systems have them.

    Raises:
        ConfigError: no folder of at most ``LONGEST_FOLDER`` bytes can be written.
    """
    given = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(given) or tempfile.gettempdir()
    if given == "TMPDIR" and len(os.fsencode(folder)) > LONGEST_FOLDER:
        folder = SHORT_FOLDER
    remedy = f"set RAY_TMPDIR to a folder of at most {LONGEST_FOLDER} bytes that can be written"
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(given, folder, f"too long for Ray's sockets; {remedy}")
    try:
        return tempfile.mkdtemp(prefix="ray-", dir=folder)
    except OSError as error:
        raise ConfigError(given, os.environ.get(given, ""), f"Ray needs a folder ({error}); {remedy}") from error
