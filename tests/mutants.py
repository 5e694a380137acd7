"""Break the code on purpose, one line at a time, and count how often a module's own tests notice.

    python -m tests.mutants --seed 0 --each 13 label_table masks

Cosmic Ray lists the mutants of the areas in ``mutants.yaml``; a seeded draw takes some lines of each area and one
mutant of each line. They are tried in a copy of the checkout. Mutants that survive are printed with their difference,
for somebody to look at: either a test is missing, or the mutant does the same as the code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem

from tests.run import adopt_orphans, end_processes
from tests.support.paths import ROOT

POINTLESS = re.compile(r"ReplaceBinaryOperator_BitOr_|Operator_(Is|IsNot|Eq|NotEq)_(Is|IsNot|Eq|NotEq)$")
"""Operators left out: ``|`` is mostly met in types, and ``==`` for ``is`` mostly changes nothing."""
PATIENCE_S = 60.0
"""Seconds that the tests of a mutant may take, beside three times what they take without it."""


@dataclass(frozen=True, kw_only=True)
class Area:
    """Modules (files, or folders of files) and the tests that are to notice what is wrong with them."""

    name: str
    modules: Sequence[str]
    tests: Sequence[str]

    def mutants(self, each: int, seed: int) -> list[WorkItem]:
        """Draw ``each`` lines, and one mutant of each line."""
        by_line: dict[tuple[int, int], list[WorkItem]] = defaultdict(list)
        for number, file in enumerate(self._files()):
            for item in _mutants_of(file):
                by_line[number, item.mutations[0].start_pos[0]].append(item)
        chance = random.Random(f"{self.name}-{seed}")
        lines = chance.sample(sorted(by_line), min(each, len(by_line)))
        return [chance.choice(sorted(by_line[line], key=_order)) for line in sorted(lines)]

    def _files(self) -> Iterator[Path]:
        for module in map(Path, self.modules):
            yield from sorted(module.glob("*.py")) if module.is_dir() else [module]

    def command(self, seconds: float) -> str:
        """Run the tests until one fails; a test that hangs for so long fails too, and cleans up behind it."""
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={seconds:.0f}", "--timeout-method=signal"]
        return shlex.join([sys.executable, "-m", "pytest", *options, *self.tests])

    def usual_seconds(self) -> float:
        """How long its tests take when nothing is broken."""
        started = time.monotonic()
        outcome, output = run_tests(self.command(3600), 3600)
        if outcome is not TestOutcome.SURVIVED:
            raise SystemExit(f"{self.name}: its tests fail without a mutant\n{output}")
        return time.monotonic() - started


def _mutants_of(file: Path) -> list[WorkItem]:
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/mutants.sqlite") as found:
        init([file], found, {})
        return [item for item in found.work_items if not POINTLESS.search(item.mutations[0].operator_name)]


def _order(item: WorkItem) -> tuple[str, int]:
    return item.mutations[0].operator_name, item.mutations[0].occurrence


def main() -> int:
    """Try the mutants of all areas, or of those that are named; prints the tally and what survived."""
    areas = {
        name: Area(name=name, **area)
        for name, area in yaml.safe_load((ROOT / "tests/mutants.yaml").read_text()).items()
    }
    parser = argparse.ArgumentParser(description="Break the code on purpose, and count how often the tests notice.")
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"any of {', '.join(areas)}; all of them by default")
    parser.add_argument("--each", type=int, default=13, help="mutants of each area")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    options = parser.parse_args()
    unknown = [name for name in options.areas if name not in areas]
    if unknown:
        parser.error(f"no area {unknown[0]}; choose among {', '.join(areas)}")
    adopt_orphans()  # of tests that were ended for their time
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, contextlib.ExitStack() as at_end:
        at_end.callback(end_processes, 0)
        copy_checkout(Path(folder, "code"))
        os.chdir(Path(folder, "code"))
        os.environ |= {"PYTHONPATH": os.getcwd(), "TMPDIR": folder, "RAY_ADDRESS": "local"}
        tallies = {name: try_all(areas[name], options.each, options.seed) for name in options.areas or areas}
    for name, tally in tallies.items():
        print(f"{name:12} {tally['killed']:4} killed {tally['survived']:4} survived")
    total = sum(tallies.values(), Counter())
    print(f"{'all':12} {total['killed']:4} killed {total['survived']:4} survived")
    return 0


def copy_checkout(copy: Path) -> None:
    """Copy the files that git knows, or would take in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # one that is deleted is still known
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def try_all(area: Area, each: int, seed: int) -> Counter[str]:
    """Try the mutants of an area; prints each as it comes. Returns how many were killed and survived."""
    tally: Counter[str] = Counter()
    seconds = 3 * area.usual_seconds() + PATIENCE_S
    for item in area.mutants(each, seed):
        (mutation,) = item.mutations
        result = mutate_and_test(item.mutations, area.command(seconds), seconds + PATIENCE_S)
        if result.test_outcome not in (TestOutcome.KILLED, TestOutcome.SURVIVED):
            raise SystemExit(f"{_place(mutation)} could not be tried\n{result.output}")
        tally[result.test_outcome.value] += 1
        print(f"{result.test_outcome.value:8} {_place(mutation)}", flush=True)
        if result.test_outcome is TestOutcome.SURVIVED:
            print(result.diff, flush=True)
    return tally


def _place(mutation: MutationSpec) -> str:
    return f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}"


if __name__ == "__main__":
    sys.exit(main())
