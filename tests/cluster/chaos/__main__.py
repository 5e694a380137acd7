"""Rounds of every fault at random moments, as many as wanted, and the tally.

    python -m tests.cluster.chaos --rounds 20 --seed 7

A round goes through all faults, or those that are named, in an order of its own; each disturbs a run of its own, and
is followed by all checks. The exit code is 1 when any of them has failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.cluster.chaos.arena import Arena, open_arena
from tests.cluster.chaos.checks import check_undisturbed
from tests.cluster.chaos.faults import FAULTS, Round
from tests.support.s3server import running_s3_server


def main() -> int:
    """Parse the few flags, build the arena and play."""
    parser = argparse.ArgumentParser(description="Disturb labelling at random, and check what it leaves.")
    parser.add_argument("faults", nargs="*", help=f"any of {', '.join(FAULTS)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault is played")
    parser.add_argument("--seed", type=int, default=0, help="draws when things happen")
    options = parser.parse_args()
    unknown = [name for name in options.faults if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]}; choose among {', '.join(FAULTS)}")
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        running_s3_server(Path(folder) / "s3") as server,
        open_arena(Path(folder), server, workers=2) as arena,
    ):
        check_undisturbed(arena)
        return tally(arena, options.faults or list(FAULTS), options.rounds, options.seed)


def tally(arena: Arena, names: list[str], rounds: int, seed: int) -> int:
    """Play all rounds; prints each one's end, then the sums. Returns the exit code."""
    passed: Counter[str] = Counter()
    for number in range(rounds):
        order = random.Random(f"{seed}-{number}").sample(names, len(names))
        for name in order:
            started, round_seed = time.monotonic(), seed + number
            try:
                Round(arena, round_seed).play([FAULTS[name]])
            except Exception:
                traceback.print_exc()
                verdict = "FAILED"
            else:
                passed[name] += 1
                verdict = "passed"
            print(f"{verdict} {name} --seed {round_seed} in {time.monotonic() - started:.0f} s", flush=True)
    print(*(f"{passed[name]:4} of {rounds} passed: {name}" for name in names), sep="\n")
    return 0 if passed.total() == rounds * len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
