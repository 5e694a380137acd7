"""Hostile and damaged files of weights: nothing runs, little memory is taken, and one line is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from tests.support.checkpoint_poisons import MARKER, POISONS, make


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[int, str]]:
    """Exit code and standard error of converting each, one after another in a process of little memory."""
    folder = tmp_path_factory.mktemp("poisons")
    files = [str(make(name, folder)) for name in POISONS]
    child = [sys.executable, "-m", "tests.support.checkpoint_poisons", *files]
    lines = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert not [*folder.rglob(MARKER)]
    return {name: tuple(json.loads(line)) for name, line in zip(POISONS, lines, strict=True)}


@pytest.mark.parametrize("name", POISONS)
def test_a_poison_is_told_or_dropped(name: str, played: Mapping[str, tuple[int, str]]) -> None:
    code, told = played[name]
    if POISONS[name].told:
        assert code == 2, told
        assert re.fullmatch(f"error: .*{POISONS[name].told}.{{0,200}}\n", told), told
    else:
        assert (code, told) == (0, "")
