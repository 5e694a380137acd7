"""Hostile and damaged files of weights: nothing runs, little memory and time are taken, and one line is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from tests.support.checkpoint_poisons import MARKER, POISONS, SECONDS, make


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[int, str]]:
    """Exit code and standard error of converting each, one after another in a process of little memory."""
    folder = tmp_path_factory.mktemp("poisons")
    files = [str(make(name, folder)) for name in POISONS]
    child = [sys.executable, "-m", "tests.support.checkpoint_poisons", *files]
    ended = subprocess.run(child, stdout=subprocess.PIPE, text=True)
    lines = ended.stdout.splitlines()
    if len(lines) < len(POISONS):
        name = list(POISONS)[len(lines)]
        pytest.fail(f"{name!r} ended the process ({ended.returncode}), which has {SECONDS} s for each")
    assert not [*folder.rglob(MARKER)]
    return {name: tuple(json.loads(line)) for name, line in zip(POISONS, lines, strict=True)}


@pytest.mark.parametrize("name", POISONS)
def test_a_poison_is_told_or_dropped(name: str, played: Mapping[str, tuple[int, str]]) -> None:
    code, told = played[name]
    assert "MemoryError" not in told
    if POISONS[name].told:
        assert code == 2, told
        assert re.fullmatch(f"error: .*{POISONS[name].told}.{{0,200}}\n", told), told
    else:
        assert (code, told) == (0, "")
