"""Rounds of files that are damaged at random among good ones, through the whole job in processes of its own.

    python -m tests.fuzz --images 10000 --containers 2000 --seed 7
    python -m tests.fuzz --images 10000 --containers 2000 --seed 7 --rounds 3,21

Each round puts damaged images, or damaged archives, Parquet files or manifests, beside good ones and labels them
twice. All that is listed must get one row, of a kind that is known or with a mask; the good ones theirs; the second run
nothing to do; and no process may take ``MOST_BYTES`` more than it needs for good images, nor a round longer than
``LONGEST_S``. The files of a round that has failed, and those whose rows say ``Failed``, are kept. The exit code is 1
when a round has failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.chaos.arena import environment
from tests.poison import LONGEST_S, MOST_BYTES, run_label_job, save_model
from tests.run import adopt_orphans, end_processes
from tests.support.fuzzing import Found, Label, Round, play, rounds_of
from tests.support.paths import ROOT


def _play_and_tell(played: Round, folder: Path, label: Label, found: Found, kept: Path) -> bool:
    """Whether a round has passed; what is to be looked at is kept."""
    what, started = f"{played.number}: {played.count} x {played.source}", time.monotonic()
    before, here = dict(found.failed), folder / "round"
    try:
        play(played, here, folder / "model", label, found)
        assert time.monotonic() - started < LONGEST_S, "too long"
        print(f"passed {what}; {time.monotonic() - started:.0f} s", flush=True)
        passed = True
    except Exception:
        traceback.print_exc()
        print(f"FAILED {what} --seed {played.seed}: see {kept / str(played.number)}", flush=True)
        shutil.copytree(here / "in", kept / str(played.number), dirs_exist_ok=True)
        passed = False
    for message, keys in found.failed.items():
        path = here / "in" / keys[0].partition("/")[0]
        if message not in before and path.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept / f"{played.number}-{path.name}")
    shutil.rmtree(here)
    return passed


def main() -> int:
    """Play all rounds; prints each one's end, then the sums."""
    parser = argparse.ArgumentParser(description="Label files that are damaged at random, and check what it leaves.")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--containers", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="draws the damage")
    parser.add_argument("--rounds", default="", help="numbers of those to play, to repeat them; all by default")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "fuzz"), help="where files are kept")
    options = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    adopt_orphans()
    chosen = {int(number) for number in options.rounds.split(",") if number}
    rounds = list(rounds_of(options.images, options.containers, options.seed))
    rounds = [each for each in rounds if not chosen or each.number in chosen]
    found, started = Found(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, environment({"PYTHONPATH": str(ROOT)}):
        folder = Path(name)
        save_model(folder / "model")

        def label(flags: Mapping[str, object]) -> tuple[dict[str, Any], int]:
            return run_label_job({**flags, "local": "true"}, folder / "log")

        good_alone = Round(number=-1, seed=0, source="images", count=0)
        play(good_alone, folder / "usual", folder / "model", label, usual := Found())
        passed = sum(_play_and_tell(each, folder, label, found, options.keep) for each in rounds)
    end_processes(0)
    for message, keys in sorted(found.failed.items()):
        print(f"Failed: {message}: {len(keys)}, such as {keys[0]}")
    more = found.most - usual.most
    print(f"rows: {dict(found.kinds.most_common())}; {found.damaged} containers left out")
    print(f"most memory {found.most / 2**20:.0f} MiB, {more / 2**20:.0f} more than for good images alone")
    print(f"{passed} of {len(rounds)} rounds passed in {time.monotonic() - started:.0f} s")
    return int(passed != len(rounds) or more > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
