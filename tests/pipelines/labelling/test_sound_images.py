"""Each sort of file in ``tests/support/sound_images.py``, through the whole job and through the quarantine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.labelling.job import label
from pipelines.labelling.stages.quarantine import survivors
from tests.support.labeljob import make_config, rows
from tests.support.sound_images import SOUND, Sound

pytestmark = [pytest.mark.usefixtures("stages_here"), pytest.mark.filterwarnings("ignore")]


def _expected(sound: Sound) -> tuple[str, tuple[int, ...] | None]:
    """Kind, and height and width, of a file's row."""
    return sound.kind, None if sound.pixels is None else sound.pixels.shape[:2]


def test_the_job_labels_what_viewers_show(tmp_path: Path, scene_model: Path) -> None:
    sounds = {f"{name.replace(' ', '-')}.jpg": make() for name, make in SOUND.items()}
    (tmp_path / "bucket").mkdir()
    for name, sound in sounds.items():
        (tmp_path / "bucket" / name).write_bytes(sound.data)
    found = {}
    for row in rows(label(make_config(tmp_path, scene_model, chunk=64))):
        kind = (row["error"] or "").partition(":")[0]
        found[row["key"]] = kind, None if kind else (row["height"], row["width"])
    assert found == {name: _expected(sound) for name, sound in sounds.items()}


def test_the_quarantine_passes_all_of_them() -> None:
    images = [make().data for make in SOUND.values()]
    assert list(survivors(enumerate(images), max_pixels=10**6, threads=2)) == list(enumerate(images))
