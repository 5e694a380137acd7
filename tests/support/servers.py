"""What real servers on loopback have in common: free ports, a wait until they are healthy, and the end of their log."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
START_SECONDS = 120
START_ATTEMPTS = 3  # a port found free may be taken by somebody else before the server binds it


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


def started(start: Callable[[], T]) -> T:
    """Start a server, some times if need be.

    Raises:
        ServerError: of the last attempt.
    """
    for _ in range(START_ATTEMPTS - 1):
        with contextlib.suppress(ServerError):
            return start()
    return start()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server that has been started answers.

    Raises:
        ServerError: it has ended, or does not answer within ``START_SECONDS``.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"it ended with code {process.returncode}:\n{_tail(log)}")
        with contextlib.suppress(OSError, http.client.HTTPException):  # urllib's errors are OSErrors too
            return request(url)
        time.sleep(0.1)
    raise ServerError(f"{url} does not answer after {START_SECONDS} s:\n{_tail(log)}")


def request(url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> None:
    """Ask for something whose answer is of no interest, as long as it is a good one."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to loopback
    with direct.open(urllib.request.Request(url, method=method, headers=dict(headers or {})), timeout=10) as answer:
        answer.read()


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
