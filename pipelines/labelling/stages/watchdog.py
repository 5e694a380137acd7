"""The watchdog ends its process where an image's decoding, or the network, takes longer than it may.

Neither can be stopped from outside: a codec may never end, a driver of a GPU never answer. Both do without the
interpreter's lock, so that a thread beside them can watch. The chunk's next attempt finds another process, and the
rules of ``coordinator`` find the image.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from pipelines.process.background import ticking
from pspnet_core.errors import ImageError

log = logging.getLogger(__name__)
T = TypeVar("T")

DECODING_S = 120.0
"""Seconds that decoding one image may take."""
PASS_S = 600.0
"""Seconds that the network may take to begin with, or to end, a forward pass, besides those for its pixels."""
PASS_S_PER_PIXEL = 5e-4
"""Some hundred times what a core takes for a pixel of PSPNet-50's input."""
MOST_S = 3600.0
"""So many more seconds at most: all attempts at a chunk together take less than ``LONGEST_SILENCE_S``."""
LOOKS = 24
"""How often a process looks at what it does in as many seconds as it waits for the fastest."""


@runtime_checkable
class Passing(Protocol):
    """A predictor that tells of its forward passes; ``pspnet_core.Segmenter`` is one.

    Attributes:
        on_pass: called as each begins, in any thread, with the pixels of its input.
    """

    on_pass: Callable[[int], None]


class Watchdog:
    """What is being done with a chunk's images, and since when.

    Args:
        name: what an image is called, by its index.
        end: ends the process for a reason; called once, by the thread that watches.
        slack: how many times ``DECODING_S`` an image may take.
    """

    def __init__(self, name: Callable[[int], str], end: Callable[[ImageError], None], *, slack: float) -> None:
        self.name, self.end, self.slack = name, end, slack
        self._decoding: dict[int, float] = {}
        self._asked, self._until = False, 0.0  # whether the network is waited for, and until when

    @contextlib.contextmanager
    def running(self) -> Iterator["Watchdog"]:
        """Watch in this context."""
        with ticking(min(DECODING_S, PASS_S) / LOOKS, self._look):
            yield self

    @contextlib.contextmanager
    def decoding(self, index: int) -> Iterator[None]:
        """Count an image as being decoded within the context; entered in any thread."""
        self._decoding[index] = time.monotonic()
        try:
            yield
        finally:
            del self._decoding[index]

    def outcomes(self, outcomes: Iterable[T]) -> Iterator[T]:
        """What the network says, which is waited for."""
        try:
            self._ask()
            for outcome in outcomes:
                self._asked = False
                yield outcome
                self._ask()
        finally:
            self._asked = False

    def images(self, images: Iterable[T]) -> Iterator[T]:
        """What the network asks for; until it has them it is not waited for."""
        self._asked = False
        for image in images:
            self._ask()
            yield image
            self._asked = False
        self._ask()

    def on_pass(self, pixels: int) -> None:
        """The network begins a forward pass, or to make masks of so many pixels."""
        more = min(MOST_S, PASS_S_PER_PIXEL * pixels)
        self._until = max(self._until, time.monotonic() + PASS_S + more)

    def _ask(self) -> None:
        self.on_pass(0)
        self._asked = True

    def _look(self) -> None:
        now, longest = time.monotonic(), self.slack * DECODING_S
        for index, began in self._decoding.copy().items():
            if now - began > longest:
                self.end(ImageError("TimedOut", f"decoding {self.name(index)} takes longer than {longest:g} s"))
        if self._asked and now > self._until:
            self.end(ImageError("TimedOut", f"the network has done nothing for {PASS_S:g} s"))


def end_process(reason: str) -> None:
    """End this process by SIGKILL, because it cannot go on; the chunk's next attempt finds another one."""
    log.error("%s: this process ends", reason)
    os.kill(os.getpid(), signal.SIGKILL)
