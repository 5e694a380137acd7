"""A real ``mlflow server`` on loopback: SQLite behind it, its artifacts proxied to a bucket of the test S3 server.

It can be stopped and started again on the same port with the same content, for tests of outages.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 120
START_ATTEMPTS = 3  # a port found free may be taken by somebody else before the server binds it
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluation jobs, which nobody here asks for
}


class MlflowServerError(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


@dataclass(kw_only=True)
class MlflowServer:
    """A server that may be stopped and started.

    Attributes:
        folder: holds its database and its log.
        port: on 127.0.0.1.
        artifacts: ``s3://BUCKET`` that it keeps files in.
        environment: variables that lead it to the bucket; no client of the server needs them.
    """

    folder: Path
    port: int
    artifacts: str
    environment: Mapping[str, str] = field(repr=False)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What clients take for ``MLFLOW_TRACKING_URI``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """Its log file, which has a line for each request."""
        return self.folder / "mlflow.log"

    def start(self) -> None:
        """Start it and wait until it is healthy; nothing happens if it runs already."""
        if self.process is not None:
            return
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env={**self.environment, **QUIET},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it has children, which end with its process group
            )
        try:
            self._wait_until_healthy(self.process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and all its children at once; nothing happens if it does not run."""
        if self.process is None:
            return
        process, self.process = self.process, None
        # An orderly end takes seconds; SQLite bears this one.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", self.artifacts),
        ]

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise MlflowServerError(f"mlflow ended with code {process.returncode}:\n{self._tail()}")
            if self._answers():
                return
            time.sleep(0.1)
        raise MlflowServerError(f"mlflow is not healthy after {START_SECONDS} s:\n{self._tail()}")

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to loopback
        try:
            with direct.open(f"{self.uri}/health", timeout=10) as answer:
                return bool(answer.read() == b"OK")
        except (OSError, http.client.HTTPException):  # urllib's errors are OSErrors too
            return False

    def _tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def running_mlflow_server(folder: Path, *, artifacts: str, environment: Mapping[str, str]) -> Iterator[MlflowServer]:
    """A server on a free port, stopped on leaving.

    Raises:
        MlflowServerError: it is not healthy after ``START_SECONDS``.
    """
    server = _started(folder, artifacts, environment)
    try:
        yield server
    finally:
        server.stop()


def _started(folder: Path, artifacts: str, environment: Mapping[str, str]) -> MlflowServer:
    for attempt in range(1, START_ATTEMPTS + 1):
        server = MlflowServer(folder=folder, port=_free_port(), artifacts=artifacts, environment=environment)
        try:
            server.start()
            return server
        except MlflowServerError:
            if attempt == START_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _free_port() -> int:
    """A port that nobody listens on, and none that the system hands out: the server wants it back after an outage."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
