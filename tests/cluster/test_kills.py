"""One kill of each kind, labelling and training: what they leave is what an undisturbed run leaves, byte for byte."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from tests.cluster.chaos.arena import Arena
from tests.cluster.chaos.checks import check_undisturbed
from tests.cluster.chaos.faults import FAULTS, Round
from tests.cluster.conftest import SEED, STEPS, check_same, training_of
from tests.support.trainjob import Trained, result
from tests.support.waiting import until

KILLS = ["reader-killed", "actor-killed-in-a-chunk", "node-killed", "writer-killed", "driver-killed"]


def test_the_undisturbed_run_is_what_it_should_be(arena: Arena) -> None:
    check_undisturbed(arena)


def test_whoever_is_killed_the_labels_are_the_same(arena: Arena) -> None:
    Round(arena, SEED, soon=2).play([FAULTS[name] for name in KILLS])


def test_a_worker_is_killed_and_the_weights_are_the_same(
    arena: Arena, scenes: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    job, log = training_of(arena, scenes, tmp_path), tmp_path / "log"
    chance = random.Random(SEED)
    step = chance.randrange(2, STEPS - 6)
    with job.running(log) as process:
        until(lambda: job.step() >= step, process, log)
        os.kill(chance.choice(arena.processes("TrainWorker")).pid, signal.SIGKILL)
        found = result(process, log)
    check_same(job, found, undisturbed)
