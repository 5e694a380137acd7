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


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names or that runs on this machine, else start one in the process.

    Leaves on the way out, unless the caller was connected before. A handler of SIGTERM stays in force, which Ray would
    replace by its own.

    Raises:
        ConfigError: when there is no such cluster, or it refuses the connection.
    """
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault(*KEEP_IDLE)
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
