"""A short run of chaos: several faults to each run of the plan, checked as ``make chaos`` does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.chaos.arena import Arena, open_arena
from tests.cluster.chaos.checks import check_undisturbed
from tests.cluster.chaos.faults import FAULTS, Round
from tests.support.s3server import S3Server


@pytest.fixture(scope="module")
def arena(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with open_arena(tmp_path_factory.mktemp("arena"), s3_server, workers=1) as arena:
        yield arena


def test_the_yardstick(arena: Arena) -> None:
    check_undisturbed(arena)


@pytest.mark.parametrize(
    "names",
    [
        ["reader-killed", "actor-killed-in-a-chunk", "node-killed", "writer-killed"],
        ["driver-killed", "driver-frozen"],
        ["resets", "slow-downs", "truncations", "lost-answers", "killers"],
    ],
    ids=["workers", "drivers", "storage"],
)
def test_whatever_happens_the_labels_are_the_same(arena: Arena, names: list[str]) -> None:
    Round(arena, seed=0, soon=2).play([FAULTS[name] for name in names])
