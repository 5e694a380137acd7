"""Chaos in short: the faults that ``test_kills.py`` leaves, some to each run of the plan, checked as ``make chaos``."""

from __future__ import annotations

import pytest

from tests.cluster.chaos.arena import Arena
from tests.cluster.chaos.faults import FAULTS, Round
from tests.cluster.conftest import SEED
from tests.cluster.test_kills import KILLS

RUNS = [
    ["actor-killed", "coordinator-killed", "driver-terminated"],
    ["driver-frozen"],
    ["second-driver", "driver-killed"],
    ["resets", "slow-downs", "truncations", "lost-answers", "killers"],
    ["endless", "second-driver-waits"],
    ["overwritten", "hung"],
    ["output-away"],
    ["retry-killed"],
]
TOO_LONG = {"outage", "driver-frozen-past-its-lease"}
"""Wait as long as a job waits for its storage, or as a lease lives; ``make chaos`` plays them."""


@pytest.mark.parametrize("names", RUNS, ids="+".join)
def test_whatever_happens_the_labels_are_the_same(arena: Arena, names: list[str]) -> None:
    Round(arena, SEED, soon=2).play([FAULTS[name] for name in names])


def test_all_faults_are_played() -> None:
    assert {name for names in (KILLS, *RUNS, TOO_LONG) for name in names} == set(FAULTS)
