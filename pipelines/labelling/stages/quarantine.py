"""The quarantine finds images that kill the process that decodes them, by decoding one at a time in a child process.

A broken codec, or too little memory, ends a process without an exception that names the image. So after a chunk has
ended a process, each of its images is decoded here first, in a child that does nothing else; some children work side by
side. A child may also be killed for the memory that other processes use, so an image is to blame only when it kills two
children, the second of them alone.

The child is this module run as a program: images come on its standard input, each with its length and its time limit
in front; a byte goes out when it is ready, and one for each image that is decoded, or refused. What codecs print goes
to standard error. The limits of memory and of time (of CPU: others may keep it waiting) are the child's own, and hold
even when its parent is gone.
"""

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.cluster.machine import machine_memory
from pipelines.labelling.stages import watchdog
from pipelines.process.environment import child_environment
from pspnet_core.errors import ImageError, PspnetError
from pspnet_core.images.decoding import decode_image
from pspnet_core.threads import SharedLock, map_ahead

MOST_MEMORY = 6 * 2**30
"""Bytes of data that the child may hold: the largest image by default takes 2 GiB while it is decoded."""
START_S = 300.0
"""Seconds that a child may take to start."""
LATE_S = 1800.0
"""Seconds that images of one chunk may have, together, which then come too late."""
HURRIED_S = 20.0
"""Seconds that each of the others may take from then on: several times what the largest sound image takes."""

_HEADER = struct.Struct("<QQd")  # largest image in pixels, bytes that follow, seconds that decoding may take
_READY = b"!"
_SURVIVED = b"."
_LATE = signal.SIGPROF.name
_SILENT = 10
"""Times an image's seconds after which a child that says nothing hangs."""


class QuarantineFailed(PspnetError):
    """The child cannot be started, which is no image's fault."""


def survivors(
    images: Iterable[tuple[int, bytes | ImageError]], *, max_pixels: int, threads: int
) -> Iterator[tuple[int, bytes | ImageError]]:
    """Pass images on with their indices, in order; those that kill two children become ``Crashed`` errors, and those
    that take too long ``TimedOut`` ones.

    Args:
        images: encoded images; errors are passed on as they are.
        max_pixels: largest image, in pixels.
        threads: children side by side, as far as memory allows.

    Raises:
        QuarantineFailed: no process can be started.
    """
    threads = max(1, min(threads, machine_memory() // MOST_MEMORY))
    with _Children(max_pixels) as children, ThreadPoolExecutor(threads) as pool:
        yield from map_ahead(pool, lambda item: (item[0], children.judge(item[1])), images, depth=2 * threads)


class _Children(contextlib.AbstractContextManager["_Children"]):
    """The children that decode a chunk's images, each of them one at a time."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.started: list[_Child] = []
        self.idle: list[_Child] = []
        self.room = SharedLock()
        self.late_s = 0.0

    def __exit__(self, *_: object) -> None:
        for child in self.started:
            child.end()

    def judge(self, image: bytes | ImageError) -> bytes | ImageError:
        """The image, unless it is to blame for what decoding it does; called in threads."""
        if isinstance(image, ImageError):
            return image
        with self.room.shared():
            error = self._error_of(image)
        if error and error.kind == "Crashed":
            with self.room.alone():
                error = self._error_of(image)
        return error or image

    def _error_of(self, image: bytes) -> ImageError | None:
        """What decoding an image does to a child."""
        child = self._child()
        seconds = watchdog.DECODING_S if self.late_s < LATE_S else min(watchdog.DECODING_S, HURRIED_S)
        end = child.decode(image, self.max_pixels, seconds)
        if not end:
            self.idle.append(child)
            return None
        if end == _LATE:
            self.late_s += seconds
            return ImageError("TimedOut", f"decoding it takes longer than {seconds:g} s")
        return ImageError("Crashed", f"decoding it ends the process ({end})")

    def _child(self) -> "_Child":
        """One that is idle, or a new one; one that is killed while it starts, for others' memory, gets a successor."""
        with contextlib.suppress(IndexError):
            return self.idle.pop()
        child = self._start()
        if not child.is_ready():
            child = self._start()
            if not child.is_ready():
                raise QuarantineFailed(f"a process to try images in cannot be started: {child.end()}")
        return child

    def _start(self) -> "_Child":
        self.started.append(_Child())
        return self.started[-1]


class _Child:
    """A process that decodes images and may die of it.

    Raises:
        QuarantineFailed: the system starts none.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pipelines.labelling.stages.quarantine"]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
            )
        except OSError as error:
            raise QuarantineFailed(f"a process to try images in cannot be started: {error}") from error
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def is_ready(self) -> bool:
        """Whether it can take images; waits for it."""
        return self._answers(_READY, START_S)

    def decode(self, image: bytes, max_pixels: int, seconds: float) -> str:
        """Have one image decoded; returns what ends the process, or nothing where it survives."""
        try:
            self.stdin.write(_HEADER.pack(max_pixels, len(image), seconds) + image)
            self.stdin.flush()
            survived = self._answers(_SURVIVED, _SILENT * seconds)
        except BrokenPipeError:
            survived = False
        return "" if survived else self.end()

    def _answers(self, word: bytes, seconds: float) -> bool:
        """Whether it says this, so soon."""
        return bool(select.select([self.stdout], [], [], seconds)[0]) and self.stdout.read(1) == word

    def end(self) -> str:
        """End the process, if it has not ended, and say how it did."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
        code = self.process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main() -> None:
    """The child: decode what comes until there is no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    answers.write(_READY)
    with contextlib.suppress(OSError):  # where there is such a thing: when memory ends, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    while header := sys.stdin.buffer.read(_HEADER.size):
        max_pixels, size, seconds = _HEADER.unpack(header)
        image = sys.stdin.buffer.read(size)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process, unless it is taken back
        with contextlib.suppress(ImageError):  # which the actor will meet again, and report
            decode_image(image, max_pixels=max_pixels)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_SURVIVED)


if __name__ == "__main__":
    main()
