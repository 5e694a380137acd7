"""Damaged files beside good ones, labelled by a job: what is planted, and what has to be left afterwards.

A round is drawn from a seed and its number. ``tests/fuzz.py`` plays many in processes of their own, and
``tests/pipelines/labelling/test_fuzz.py`` some within the tests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pspnet_core.errors import KINDS
from pspnet_core.images.run_lengths import decode
from tests.support import mutations
from tests.support.buckets import parquet, tar
from tests.support.mutations import mutated
from tests.support.poisons import photo

CONTAINERS = ("webdataset", "parquet", "manifest")
A_ROUND = {"images": 500, **dict.fromkeys(CONTAINERS, 40)}
"""Damaged files of one round, by source."""
MAX_PIXELS = 2**20
"""Damaged headers claim large images, and what is fuzzed is not how long the network takes for these."""
MOST_OTHER = 0.01
"""Share of a mask's pixels that may be others in another batch."""

GOOD = {f"good-{number}.jpg": photo(number) for number in range(5)}
"""The good neighbours, or members of a good neighbour."""
OTHERS = {f"other-{number}.jpg": photo(10 + number) for number in range(5)}
"""What is in the files that are damaged."""

Label = Callable[[Mapping[str, object]], tuple[dict[str, Any], int]]
"""Labels, by flags; returns the result line, and the most bytes of a process."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Damaged files beside good ones, the same for the same seed and number."""

    number: int
    seed: int
    source: str
    count: int

    def plant(self, folder: Path) -> list[str]:
        """Write all files; returns the keys of the good ones."""
        chance = Random(f"{self.seed}-{self.number}")
        good = PLANTERS[self.source](folder)
        seeds = _seeds(self.source, folder)
        for number in range(self.count):
            suffix, data = chance.choice(seeds)
            (folder / f"damaged-{number:03}{suffix}").write_bytes(mutated(data, suffix, chance))
        return good


def _write(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return list(files)


def _good_archive(folder: Path) -> list[str]:
    _write(folder, {"good.tar": tar(list(GOOD.items()))})
    return [f"good.tar/{name}" for name in GOOD]


def _good_table(folder: Path) -> list[str]:
    _write(folder, {"good.parquet": parquet(pa.table({"image": list(GOOD.values()), "key": list(GOOD)}))})
    return [f"good.parquet/{name}" for name in GOOD]


def _good_manifest(folder: Path) -> list[str]:
    _write(folder / "good", GOOD)
    _write(folder / "others", OTHERS)
    uris = [str(folder / "good" / name) for name in GOOD]
    _write(folder, {"good.txt": "\n".join(uris).encode()})
    return uris


PLANTERS: dict[str, Callable[[Path], list[str]]] = {
    "images": lambda folder: _write(folder, GOOD),
    "webdataset": _good_archive,
    "parquet": _good_table,
    "manifest": _good_manifest,
}
"""By source: writes the good files, and returns their keys."""


def _seeds(source: str, folder: Path) -> list[tuple[str, bytes]]:
    """Suffix and content of what is damaged."""
    if source == "images":
        return mutations.image_seeds()
    if source == "webdataset":
        return mutations.archive_seeds(OTHERS)
    if source == "parquet":
        return mutations.parquet_seeds(OTHERS)
    uris = [*(str(folder / "others" / name) for name in OTHERS), "others/other-0.jpg", "others/none.jpg"]
    return mutations.manifest_seeds(uris, len(OTHERS["other-0.jpg"]))


@dataclass(kw_only=True)
class Found:
    """What has become of the damaged files.

    Attributes:
        kinds: how many rows there are, by kind of error; ``ok`` for those with a mask.
        failed: of the errors that nobody foresaw, by their message, the keys.
        damaged: how many containers were left out.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    failed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    damaged: int = 0
    most: int = 0


def play(played: Round, folder: Path, model: Path, label: Label, found: Found) -> None:
    """Label a round, check what is left, and count it; raises AssertionError."""
    chance = Random(f"{played.seed}-{played.number}-flags")
    good = played.plant(folder / "in")
    flags = {"input": folder / "in", "output": folder / "out", "model": model, "source": played.source}
    flags |= {"chunk": chance.choice([16, 64, 256]), "max-pixels": MAX_PIXELS, "date": "2026-01-31"}
    result, most = label(flags)
    found.most = max(found.most, most)
    found.damaged += result["damaged"]
    rows = _rows(result["labels"])
    assert len({(row["uri"], row["etag"]) for row in rows}) == len(rows), "rows that are there twice"
    assert len(rows) == result["labelled"] + result["errors"], "rows that are not counted"
    if played.source == "images":
        names = {path.name for path in (folder / "in").iterdir()}
        assert {row["key"] for row in rows} == names, "images without a row"
    _check_good(rows, good)
    _count(rows, found)
    again, _ = label(flags)
    assert (again["labelled"], again["errors"]) == (0, 0), f"the second run does something: {again}"


def _rows(labels: str) -> list[dict[str, Any]]:
    columns = "uri, key, etag, status, error, mask_classes, mask_lengths, width, height"
    table = duckdb.read_parquet(labels).project(columns).to_arrow_table()
    assert table is not None
    return [*table.to_pylist()]


def _check_good(rows: Sequence[Mapping[str, Any]], good: Sequence[str]) -> None:
    labelled = {row["key"]: row for row in rows if row["status"] == "ok"}
    missing = [key for key in good if key not in labelled]
    assert not missing, f"good images without a mask: {missing}"
    for key in good:
        name = key.rpartition("/")[2]
        expected = _MASKS.setdefault(name, _mask(labelled[key]))
        other = np.count_nonzero(_mask(labelled[key]) != expected)
        assert other <= MOST_OTHER * expected.size, f"{key} has another mask: {other} pixels"


_MASKS: dict[str, Any] = {}
"""The masks of the good images, as the first round had them."""


def _mask(row: Mapping[str, Any]) -> Any:
    return decode(np.array(row["mask_classes"]), np.array(row["mask_lengths"]), row["height"], row["width"])


def _count(rows: Sequence[Mapping[str, Any]], found: Found) -> None:
    for row in rows:
        kind, _, message = (row["error"] or "ok").partition(": ")
        assert kind in (*KINDS, "ok"), f"{row['key']} has a kind that nobody knows: {row['error']}"
        found.kinds[kind] += 1
        if kind == "Failed":
            found.failed[message[:120]].append(row["key"])


def rounds_of(images: int, containers: int, seed: int) -> Iterator[Round]:
    """Rounds of so many damaged files; a third of the containers is of each format."""
    number = 0
    shares = {source: (containers + 2 - index) // 3 for index, source in enumerate(CONTAINERS)}
    for source, total in {"images": images, **shares}.items():
        for first in range(0, total, A_ROUND[source]):
            yield Round(number=number, seed=seed, source=source, count=min(A_ROUND[source], total - first))
            number += 1
