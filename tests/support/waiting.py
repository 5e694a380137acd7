"""Waiting for what another process, or thread, is to do."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 600
"""Seconds within which anything that is waited for must happen, on a busy machine too."""


def until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    """Wait for a condition; of a job that is to bring it about, as long as it runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        said = log.read_text()[-3000:] if log else ""
        assert process is None or process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
