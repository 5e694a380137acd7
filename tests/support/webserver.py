"""A web server on loopback, as a test wants it to answer."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ray._common.tls_utils import generate_self_signed_tls_certs


def untrusted() -> ssl.SSLContext:
    """For a server whose certificate no client can verify."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = generate_self_signed_tls_certs()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pem").write_text(key + certificate)
        context.load_cert_chain(Path(folder, "pem"))
    return context


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers whatever it is asked with an empty JSON object."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(
    handler: Callable[..., http.server.BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """A server on loopback, with TLS if so wanted; yields its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
