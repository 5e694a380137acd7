"""Progress on a terminal and off it, and what ticks beside the work."""

import fcntl
import json
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest

from pipelines.process.background import ticking
from pipelines.process.progress import Progress


class Lines(StringIO):
    """A stream whose event is set when a line has come."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def flush(self) -> None:
        self.came.set()

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


def test_the_rate_is_that_of_the_last_lines_and_at_the_end_of_the_whole_run() -> None:
    now, stream = 100.0, Lines()
    with Progress(1000, "labelling", stream=stream, clock=lambda: now, every=1e6) as progress:
        now += 10  # a model is loaded: nothing moves
        assert progress.state(ended=False)["eta_seconds"] is None
        for _ in range(12):
            progress._tick()
        now += 5
        progress.advance(200)
        progress.advance(100, errors=3)
        state = progress.state(ended=False)
        assert (state["images"], state["of"], state["errors"], state["chunks"]) == (300, 1000, 3, 2)
        assert (state["images_per_second"], state["eta_seconds"]) == (60.0, 12)
    *_, last = stream.parsed
    assert last["ended"]
    assert (last["images"], last["images_per_second"], last["eta_seconds"]) == (300, 20.0, 35)
    assert last["progress"] == "labelling"


@pytest.mark.parametrize(("total", "left"), [(None, None), (100, 0), (150, 1)])
def test_the_time_left(total: int | None, left: int | None) -> None:
    now, stream = 100.0, Lines()
    with Progress(total, "listing", stream=stream, clock=lambda: now, every=1e6) as progress:
        now += 2
        progress.advance(100)
        assert progress.state(ended=False)["eta_seconds"] == left
    (last,) = stream.parsed
    assert (last["images"], last["of"], last["images_per_second"], last["eta_seconds"]) == (100, total, 50.0, left)


def test_lines_come_while_nothing_moves() -> None:
    stream = Lines()
    with Progress(5, "labelling", stream=stream, every=0.001):
        assert stream.came.wait(60)
    first, last = stream.parsed[0], stream.parsed[-1]
    assert (first["images"], first["ended"]) == (0, False)
    assert (last["images"], last["ended"]) == (0, True)


def test_the_last_line_comes_after_an_error_too() -> None:
    stream = Lines()
    with pytest.raises(ValueError, match="broken"), Progress(5, "labelling", stream=stream) as progress:
        progress.advance(3)
        raise ValueError("broken")
    assert [(line["images"], line["ended"]) for line in stream.parsed] == [(3, True)]


def test_a_reader_that_went_away_does_not_end_the_work() -> None:
    class Gone(Lines):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(5, "labelling", stream=Gone()) as progress:
        progress.advance(5)
    assert progress.done == 5


def shown_on_a_terminal(total: int | None, work: Callable[[Progress], None]) -> str:
    """What is to be seen of some work."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = b""
    with os.fdopen(theirs, "w") as terminal:
        with Progress(total, "labelling", stream=terminal) as progress:
            work(progress)
        terminal.write("\0")  # what was written may come in several parts
        terminal.flush()
        while not shown.endswith(b"\0"):
            shown += os.read(ours, 65536)
    os.close(ours)
    return shown.decode()


def test_a_bar_on_a_terminal() -> None:
    def work(progress: Progress) -> None:
        progress.advance(4)
        progress.advance(6, errors=2)

    shown = shown_on_a_terminal(10, work)
    assert "labelling: 100%" in shown
    assert "10/10" in shown
    assert "errors=2" in shown
    assert "{" not in shown


def test_a_count_on_a_terminal() -> None:
    assert "labelling: 4image" in shown_on_a_terminal(None, lambda progress: progress.advance(4))


def test_ticks_end_with_the_context() -> None:
    ticks = 0
    enough = threading.Event()

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            enough.set()

    with ticking(0.001, tick):
        assert enough.wait(60)
    assert ticks >= 3
    assert "ticking" not in {thread.name for thread in threading.enumerate()}


def test_what_a_tick_raises_comes_out() -> None:
    called = threading.Event()

    def tick() -> None:
        called.set()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), ticking(0.001, tick):
        assert called.wait(60)
