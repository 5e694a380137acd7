"""Images that kill the process that decodes them: each is told from its neighbours, and no run loops for ever."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipelines.labelling.stages import quarantine, watchdog
from pipelines.labelling.stages.quarantine import QuarantineFailed, survivors
from pspnet_core.errors import ImageError
from tests.support.labeljob import encoded, scene
from tests.support.paths import ROOT

GOOD = encoded(scene(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the switches of ``tests/cluster/chaos/sabotage`` lie; the quarantine's children are under its influence."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests/cluster/chaos/sabotage'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CHAOS_FOLDER", str(tmp_path))
    return tmp_path


def outcome(images: list[bytes | ImageError]) -> list[bytes | str]:
    found = dict(survivors(enumerate(images), max_pixels=10**6, threads=2))
    assert sorted(found) == list(range(len(images)))
    return [str(image) if isinstance(image, ImageError) else image for _, image in sorted(found.items())]


def test_what_kills_no_process_passes_unchanged_and_in_order() -> None:
    images: list[bytes | ImageError] = [
        GOOD,
        ImageError("Missing", "it is gone"),
        b"no image",  # refused by the decoder; the actor will say so
        b"",
        encoded(scene(1, 640, 480), "BMP"),  # more than a pipe holds
        encoded(scene(2)),
    ]
    assert outcome(images) == ["Missing: it is gone" if isinstance(each, ImageError) else each for each in images]


def test_nothing_is_started_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert outcome([ImageError("Missing", "it is gone")]) == ["Missing: it is gone"]


def test_what_a_codec_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it has no more memory than the child may hold."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from PIL import Image\n"
        "def opened(file, *_, **__):\n"
        "    os.write(1, b'.' * 9)\n"
        "    bytearray(2**40) if file.read(6) == b'MEMORY' else os.abort()\n"
        "Image.open = opened\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    crashed = "Crashed: decoding it ends the process (SIGABRT)"
    assert outcome([b"MEMORY", b"ABORT.", b"MEMORY"]) == [b"MEMORY", crashed, b"MEMORY"]


def test_images_that_kill_are_told_from_their_neighbours(folder: Path) -> None:
    (folder / "killers").touch()
    other = encoded(scene(1))
    ends = [f"Crashed: decoding it ends the process ({signal})" for signal in ("SIGSEGV", "SIGKILL")]
    assert outcome([GOOD, b"SEGFAULT..", b"NOMEMORY..", other]) == [GOOD, *ends, other]


def test_one_death_proves_nothing(folder: Path) -> None:
    """A child may be killed for others' use of memory, or die with its node: the image gets another one."""
    (folder / "once").touch()
    images = [GOOD, encoded(scene(1))]
    assert outcome([*images]) == images
    assert not (folder / "once").exists()


def test_images_that_never_end_and_what_they_leave_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried once each, side by side, and once they have had enough time together the others are hurried."""
    (folder / "killers").touch()
    assert outcome([GOOD]) == [GOOD]  # however slow the machine, and the child's start
    monkeypatch.setattr(watchdog, "DECODING_S", 2.0)
    monkeypatch.setattr(quarantine, "LATE_S", 2.0)
    monkeypatch.setattr(quarantine, "HURRIED_S", 1.0)
    endless = b"ENDLESS!..."
    late, hurried = (f"TimedOut: decoding it takes longer than {seconds} s" for seconds in (2, 1))
    assert outcome([endless, endless, GOOD, endless, endless]) == [late, late, GOOD, hurried, hurried]


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python"])
def test_a_child_that_cannot_start_is_no_fault_of_an_image(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(QuarantineFailed, match="cannot be started"):
        outcome([GOOD])


def test_the_child_finds_the_code_where_its_parent_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray adds to a worker's ``sys.path`` what no variable tells its children."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert outcome([GOOD]) == [GOOD]
