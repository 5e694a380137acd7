"""Rounds of poisons drawn at random among good images, through the whole job in processes of its own.

    python -m tests.poison --rounds 20 --seed 7

Each round draws a format, a place (local disk or a bucket), some of that format's poisons and a size of chunks, labels
them twice, and checks what ``test_poisons.py`` checks; also that no process takes ``MOST_BYTES`` more than it
needs for good images, nor a round longer than ``LONGEST_S``. The exit code is 1 when a round has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import save_checkpoint
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.cluster.chaos.arena import environment
from tests.conftest import s3_settings
from tests.run import adopt_orphans, end_processes
from tests.support.faultproxy import FaultProxy
from tests.support.paths import ROOT
from tests.support.poisons import POISONS, Ground, check, plant, poisons_of, web_server
from tests.support.s3server import S3Server, running_s3_server

BUCKET = "poison"
MOST_BYTES = 2 * 2**30
LONGEST_S = 600.0


class Place:
    """Where rounds are played: a folder, a bucket behind a proxy, a web server and a model."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultProxy, web: str) -> None:
        self.folder, self.proxy, self.web = folder, proxy, web
        server.create_bucket(BUCKET)
        save_model(folder / "model")
        self.usual = self._usual_bytes()

    def _usual_bytes(self) -> int:
        """Most bytes of a process that labels good images only."""
        ground = Ground(store=open_store(str(self.folder / "good"), field="input"), server=self.web)
        plant(ground, "images", {})
        return self.label(ground, "images", "good-labels", 5)[1]

    def label(self, ground: Ground, source: str, output: str, chunk: int) -> tuple[dict[str, Any], int]:
        """The result line of a run, and the most bytes of one of its processes."""
        flags = {"input": ground.input, "output": self.folder / output, "model": self.folder / "model"}
        flags |= {"source": source, "chunk": chunk, "local": "true", "allow": ",".join(ground.allow)}
        return run_label_job(flags, self.folder / "log")

    def play(self, number: int, chance: random.Random) -> str:
        """One round; returns what it was."""
        source, on_disk = chance.choice(list(POISONS)), chance.random() < 0.5
        known = poisons_of(source, on_disk=on_disk)
        names = chance.sample(list(known), chance.randint(1, len(known)))
        what = f"{source} on {'disk' if on_disk else 'S3'}: {', '.join(names)}"
        root = str(self.folder / f"in-{number}") if on_disk else f"s3://{BUCKET}/in-{number}"
        ground = Ground(store=open_store(root, field="input"), server=self.web, proxy=None if on_disk else self.proxy)
        try:
            left = plant(ground, source, {name: known[name] for name in names})
            chunk, started = chance.choice([1, 3, 20, 256]), time.monotonic()
            result, most = self.label(ground, source, f"out-{number}", chunk)
            check(result, left)
            again, _ = self.label(ground, source, f"out-{number}", chunk)
            assert (again["labelled"], again["errors"]) == (0, 0), again
            assert most - self.usual < MOST_BYTES, f"a process took {most / 2**20:.0f} MiB"
            assert time.monotonic() - started < LONGEST_S, "too long"
        except Exception as error:
            raise AssertionError(what) from error
        finally:
            self.proxy.clear()
            subprocess.run(["rm", "-rf", str(self.folder / f"in-{number}")], check=True)
        return f"{what}; {most / 2**20:.0f} MiB, {time.monotonic() - started:.0f} s"


def save_model(folder: Path) -> None:
    """A small checkpoint for the scene classes."""
    torch.manual_seed(0)
    network = PSPNet(PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", output_stride=32))
    save_checkpoint(network, folder, name="scenes", classes=SCENE_CLASSES)


def run_label_job(flags: Mapping[str, object], log: Path) -> tuple[dict[str, Any], int]:
    """The result line of a run in processes of its own, and the most bytes of one of them; raises where it fails."""
    command = [sys.executable, str(ROOT / "jobs/label.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        most = _watched(process)
        said = process.stdout.read() if process.stdout else b""
    assert process.returncode == 0, f"exit code {process.returncode}\n{log.read_text(errors='replace')[-3000:]}"
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result, most


def _watched(process: subprocess.Popen[bytes]) -> int:
    """The most bytes that the process, or one that it has started, holds until it ends."""
    most, own, started = 0, psutil.Process(process.pid), time.monotonic()
    while process.poll() is None:
        if time.monotonic() - started > LONGEST_S:
            process.kill()  # its exit code then says so
        try:
            most = max(most, *(each.memory_info().rss for each in (own, *own.children(recursive=True))))
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
        time.sleep(0.02)  # between looks
    return most


@contextmanager
def opened() -> Iterator[Place]:
    """A place, of which nothing is left afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="poison-") as folder,
        running_s3_server(Path(folder, "s3")) as server,
        FaultProxy(server.endpoint) as proxy,
        web_server() as web,
        environment({**s3_settings(server), "AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": str(ROOT)}),
    ):
        yield Place(Path(folder), server, proxy, web)


def main() -> int:
    """Play all rounds; prints each one's end, then the sum."""
    parser = argparse.ArgumentParser(description="Label poisons drawn at random, and check what it leaves.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, to repeat one")
    parser.add_argument("--seed", type=int, default=0, help="draws the poisons")
    options = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    adopt_orphans()
    passed = 0
    with opened() as place:
        for number in range(options.first, options.first + options.rounds):
            try:
                print(f"passed {number}: {place.play(number, random.Random(f'{options.seed}-{number}'))}", flush=True)
                passed += 1
            except Exception:
                traceback.print_exc()
                print(f"FAILED {number} --seed {options.seed}", flush=True)
    end_processes(0)
    print(f"{passed} of {options.rounds} rounds passed")
    return int(passed != options.rounds)


if __name__ == "__main__":
    sys.exit(main())
