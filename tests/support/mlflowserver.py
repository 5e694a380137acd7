"""A real ``mlflow server`` on loopback: SQLite behind it, its artifacts proxied to a bucket of the test S3 server.

It can be stopped and started again on the same port with the same content, for tests of outages.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.servers import started, wait_until_healthy

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluation jobs, which nobody here asks for
}


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
            wait_until_healthy(self.process, f"{self.uri}/health", self.log)
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
            *("--artifacts-destination", self.artifacts, "--allowed-hosts", allowed_hosts()),
        ]


def allowed_hosts() -> str:
    """What the command in ``docs/mlflow.md`` allows."""
    (hosts,) = re.findall("--allowed-hosts '(.+)'", (ROOT / "docs" / "mlflow.md").read_text())
    return str(hosts)


@contextlib.contextmanager
def running_mlflow_server(folder: Path, *, artifacts: str, environment: Mapping[str, str]) -> Iterator[MlflowServer]:
    """A server on a free port, stopped on leaving.

    Raises:
        ServerError: it is not healthy after ``START_SECONDS``.
    """

    def start() -> MlflowServer:
        server = MlflowServer(folder=folder, port=_free_port(), artifacts=artifacts, environment=environment)
        server.start()
        return server

    server = started(start)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    """A port that nobody listens on, and none that the system hands out: the server wants it back after an outage."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
