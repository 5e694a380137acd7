"""The Ray session of a job: which cluster it connects to, and how it leaves."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import ray

from pspnet_core.errors import ConfigError

KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""A variable for the environment of a Ray that is about to start. Where a node has more processes than CPUs, Ray ends
those that are idle for a second. So a node with few CPUs would start processes anew for each chunk that is read or
written, at a second or two of CPU time each."""

LONGEST_FOLDER = 39
"""Bytes of the folder below which Ray may put its sockets, whose paths the system bounds."""
SHORT_FOLDER = "/tmp"


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names or that runs on this machine, else start one in the process.

    Leaves on the way out, unless the caller was connected before. A handler of SIGTERM stays in force, which Ray would
    replace by its own.

    Raises:
        ConfigError: when there is no such cluster, or it refuses the connection; or for want of a folder.
    """
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault(*KEEP_IDLE)
    choose_folder()
    try:
        ray.init(logging_level=logging.WARNING)
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "RAY_ADDRESS", address, f"cannot connect ({reason}); start that cluster, or unset it"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def choose_folder() -> None:
    """Give Ray a shorter folder than a ``TMPDIR`` that is too long for it, as those of batch systems may be.

    Raises:
        ConfigError: there is none.
    """
    given = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(given, "")
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return
    if given == "RAY_TMPDIR" or not os.access(SHORT_FOLDER, os.W_OK):
        raise ConfigError(
            given, folder, f"too long for Ray; set RAY_TMPDIR to a folder of {LONGEST_FOLDER} bytes or less"
        )
    os.environ["RAY_TMPDIR"] = SHORT_FOLDER
