"""The quarantine finds images that kill the process that decodes them, by decoding one at a time in a child process.

A broken codec, or too little memory, ends a process without an exception that names the image. So after a chunk has
ended a process, each of its images is decoded here first, in a child that does nothing else. A child may also be killed
for the memory that other processes use, so an image is to blame only when it kills two children.

The child is this module run as a program: images come on its standard input, each with its length and its time limit
in front; a byte goes out when it is ready, and one for each image that is decoded, or refused. What codecs print goes
to standard error. The limits of time and memory are the child's own, and hold even when its parent is gone.

Decoding that never ends would never bring an image here. So a process that decodes watches itself (``DecodeWatch``),
and ends when it takes too long with one.
"""

import contextlib
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipelines.process.background import ticking
from pipelines.process.environment import child_environment
from pspnet_core.errors import ImageError, PspnetError
from pspnet_core.images.decoding import decode_image

log = logging.getLogger(__name__)
LONGEST_S = 120.0
"""Seconds that one image may take to decode, in the child or beside others."""
MOST_MEMORY = 6 * 2**30
"""Bytes of data that the child may hold: the largest image by default takes 2 GiB while it is decoded."""
LOOKS = 24
"""How often a process looks at what it decodes in as many seconds."""

_HEADER = struct.Struct("<QQd")  # largest image in pixels, bytes that follow, seconds that decoding may take
_READY = b"!"
_SURVIVED = b"."
_LATE = signal.SIGALRM.name
_TOO_LONG = "takes longer than"


class QuarantineFailed(PspnetError):
    """The child cannot be started, which is no image's fault."""


class DecodeWatch:
    """Which of a chunk's images are being decoded, and since when; one that takes too long ends the process.

    Codecs do without the interpreter's lock, so that a thread beside them can watch.

    Args:
        name: what an image is called, by its index.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self.name = name
        self.began: dict[int, float] = {}

    @contextlib.contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Count an image as being decoded within the context; entered in any thread."""
        self.began[index] = time.monotonic()
        try:
            yield
        finally:
            del self.began[index]

    @contextlib.contextmanager
    def running(self) -> Iterator["DecodeWatch"]:
        """Watch all images that are decoded in this context."""
        with ticking(LONGEST_S / LOOKS, self._look):
            yield self

    def _look(self) -> None:
        now = time.monotonic()
        for index, began in self.began.copy().items():
            if now - began > LONGEST_S:
                end_process(f"decoding {self.name(index)} takes longer than {LONGEST_S:g} s")  # no codec can be stopped


def end_process(reason: str) -> None:
    """End this process by SIGKILL, because it cannot go on; the chunk's next attempt finds another one."""
    log.error("%s: this process ends", reason)
    os.kill(os.getpid(), signal.SIGKILL)


def survivors(
    images: Iterable[tuple[int, bytes | ImageError]], *, max_pixels: int
) -> Iterator[tuple[int, bytes | ImageError]]:
    """Pass images on with their indices; those that kill two children become ``Crashed`` errors, or ``TimedOut`` ones.

    Args:
        images: encoded images; errors are passed on as they are.
        max_pixels: largest image, in pixels.

    Raises:
        QuarantineFailed: no process can be started.
    """
    with contextlib.ExitStack() as children:
        child: _Child | None = None
        for index, image in images:
            if isinstance(image, ImageError):
                yield index, image
                continue
            child = child or children.enter_context(_started())
            death = child.decode(image, max_pixels)
            if death:
                child = children.enter_context(_started())
                death = child.decode(image, max_pixels)
            if death:
                child = None
                yield (
                    index,
                    ImageError("TimedOut" if death.startswith(_TOO_LONG) else "Crashed", f"decoding it {death}"),
                )
            else:
                yield index, image


def _started() -> "_Child":
    """A child; one that is killed while it starts, for the memory of others, gets a successor."""
    try:
        return _Child()
    except QuarantineFailed:
        return _Child()


class _Child(contextlib.AbstractContextManager["_Child"]):
    """A process that decodes images and may die of it.

    Raises:
        QuarantineFailed: it ends before the first image.
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
        if self.stdout.read(1) != _READY:
            self.__exit__()
            raise QuarantineFailed(f"a process to try images in cannot be started: {self._end()}")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def decode(self, image: bytes, max_pixels: int) -> str:
        """Have one image decoded; returns what that does to the process, or nothing where it survives."""
        try:
            self.stdin.write(_HEADER.pack(max_pixels, len(image), LONGEST_S) + image)
            self.stdin.flush()
            survived = self.stdout.read(1) == _SURVIVED
        except BrokenPipeError:
            survived = False
        if survived:
            return ""
        end = self._end()
        return f"{_TOO_LONG} {LONGEST_S:g} s" if end == _LATE else f"ends the process ({end})"

    def _end(self) -> str:
        code = self.process.wait()
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
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process, unless it is taken back
        with contextlib.suppress(ImageError):  # which the actor will meet again, and report
            decode_image(image, max_pixels=max_pixels)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(_SURVIVED)


if __name__ == "__main__":
    main()
