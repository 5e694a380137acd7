"""Kills the process that decodes certain images, or holds it up, as a fault in a codec or the end of memory would.

Lies on ``PYTHONPATH`` of the processes under test, so that every Python among them imports it at its start. What it
does is said by files in the folder ``CHAOS_FOLDER``:

* ``killers``: while it is there, files that begin with one of ``DEADLY`` kill the process that opens them;
* ``endless``: while it is there, such files hold up the process that opens them for ever; how long it may take with
  an image is reduced to ``NEAR_S`` there, so that a test need not wait for the end of its patience;
* ``once``: the next process that opens any image takes the file away, and dies.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

DEADLY = {b"SEGFAULT": signal.SIGSEGV, b"NOMEMORY": signal.SIGKILL}
ENDLESS = b"ENDLESS!"
NEAR_S = 1.0

_open = Image.open
_folder = Path(os.environ["CHAOS_FOLDER"])


def _sabotaged(fp: Any, *arguments: Any, **options: Any) -> Image.Image:
    head = fp.read(8)
    fp.seek(0)
    if (_folder / "killers").exists():
        if head in DEADLY:
            _die(DEADLY[head])
        while head == ENDLESS:
            _work()
    if (_folder / "endless").exists() and head in DEADLY:
        _hang()
    if _take(_folder / "once"):
        _die(signal.SIGKILL)
    return _open(fp, *arguments, **options)


def _take(path: Path) -> bool:
    """Whether it was this process that took the file away."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _hang() -> None:
    watchdog: Any = sys.modules.get("pipelines.labelling.stages.watchdog")
    if watchdog:  # a model's actor, which watches itself
        watchdog.DECODING_S = NEAR_S
    if signal.getitimer(signal.ITIMER_PROF)[0]:  # a child that only decodes
        signal.setitimer(signal.ITIMER_PROF, NEAR_S)
    while True:
        _work()


def _work() -> None:
    """Be busy for a moment: the limit is one of CPU time."""
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        pass


def _die(number: signal.Signals) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)
    while True:  # another thread may have to write a stack first
        time.sleep(1)


Image.open = _sabotaged  # type: ignore[assignment]
