"""Each poison of ``tests/support/poisons.py`` among good neighbours: one row or one omission each, and no more."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.process.retrying import Retries
from pipelines.sources import base
from pipelines.storage import open_store
from tests.support.poisons import POISONS, Ground, check, plant, poisons_of, web_server

pytestmark = pytest.mark.usefixtures("stages_here")
QUICK = Retries(attempts=2, first_wait=0, longest_wait=0, jitter=0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server; images are waited for as good as not at all."""
    base._store.cache_clear()
    monkeypatch.setattr(base, "open_store", functools.partial(open_store, retries=QUICK))
    with web_server() as url:
        yield url
    base._store.cache_clear()


@pytest.mark.parametrize("source", POISONS)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_poisons_among_good_neighbours(
    source: str, place: str, server: str, tmp_path: Path, scene_model: Path, request: pytest.FixtureRequest
) -> None:
    on_disk = place == "disk"
    # Some folders are deeper than pytest's own cleaning bears.
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", str(tmp_path / "bucket")], check=True))
    root = str(tmp_path / "bucket") if on_disk else f"{request.getfixturevalue('s3_bucket')}/bucket"
    proxy = None if on_disk else request.getfixturevalue("s3_proxy")
    ground = Ground(store=open_store(root, field="input"), server=server, proxy=proxy)
    left = plant(ground, source, poisons_of(source, on_disk=on_disk))
    flags = {"output": str(tmp_path / "labels"), "model": str(scene_model), "source": source, "chunk": 200}
    run = functools.partial(night, input=ground.input, allow=tuple(ground.allow), **flags)
    result = run()
    check(result, left)
    again = run()
    assert (again["labelled"], again["errors"], again["skipped"]) == (0, 0, len(left.rows))


def night(**flags: Any) -> dict[str, Any]:
    """One run of labelling."""
    return label(LabelConfig(**flags, date="2026-01-31", local=True))
