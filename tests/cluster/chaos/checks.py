"""What must hold after a round, whatever happened in it: ``docs/guarantees.md``, checked against an undisturbed run."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.storage import Store
from pspnet_core.images import run_lengths
from tests.cluster.chaos.arena import KILLERS, Arena, Job, contents
from tests.support.labelfiles import substance

PARTITION = r"model=scenes-[0-9a-f]+"
DOCUMENTED = re.compile(
    "|".join(
        [
            rf"masks/{PARTITION}/dt=2026-01-31/\d{{6}}-\d{{6}}\.parquet",
            rf"class_stats/{PARTITION}/dt=2026-01-31/[^/]+\.parquet",
            rf"classes/{PARTITION}/classes\.parquet",
            rf"plans/{PARTITION}/\d{{6}}\.parquet",
            r"runs/[^/]+\.json",
            r"\.tmp/put-if-absent",  # by which every run finds out whether the storage is fit
            rf"\.index/{PARTITION}/.+",  # may be there or not: it only saves reading
        ]
    )
)
RECORDED = ("run_id", "plan", "date", "images", "chunks", "mask", "partition")
"""What a run record says that does not depend on who wrote it, and when."""

ALIKE = 0.999
"""Share of an image's pixels beyond which two masks differ by no more than last bits of sums."""


def check_undisturbed(arena: Arena) -> None:
    """That the yardstick itself is right: all images once, nothing else in the output."""
    rows = rows_of(arena.expected)
    assert sorted(row["key"] for row in rows) == arena.keys
    bad = dict.fromkeys(KILLERS, "Unreadable: ") | {key: error for key, error in arena.poisoned.items() if error}
    errors = {row["key"]: row["error"] for row in rows if row["error"]}
    assert errors.keys() == bad.keys()
    assert not [(key, errors[key]) for key, error in bad.items() if not re.match(error, errors[key])]
    assert not [path for path in arena.expected if not DOCUMENTED.fullmatch(path)]


def check(arena: Arena, output: Store, outcome: Mapping[str, str], last: Job) -> None:
    """That an output holds what the plan leaves when nothing disturbs it, object by object, byte by byte.

    Args:
        outcome: error kinds of images that end otherwise, by key.
        last: the job that finished the plan.
    """
    found = contents(output)
    assert not [path for path in found if not DOCUMENTED.fullmatch(path)]
    changed = sum(kind == "Changed" for kind in outcome.values())
    if changed:  # whoever finished the plan has seen the newer versions afterwards, and made a plan for them
        later = _without_index(found) - _without_index(arena.expected)
        kinds = Counter(path.partition("/")[0] for path in later)
        assert kinds == dict.fromkeys(("plans", "masks", "class_stats", "runs"), 1), "objects are missing, or stray"
        found = {path: content for path, content in found.items() if path not in later}
    assert _without_index(found) == _without_index(arena.expected), "objects are missing, or stray"
    rows = rows_of(found)
    assert len(rows) == len({(row["uri"], row["etag"]) for row in rows}) == len(arena.keys)
    for path, expected in arena.expected.items():
        if path.startswith("runs/"):
            _check_record(json.loads(found[path]), json.loads(expected), rows)
        elif path.startswith("masks/") and any(row["key"] in outcome for row in rows_of({path: expected})):
            _check_rows(rows_of({path: found[path]}), rows_of({path: expected}), outcome)
        elif path.startswith("masks/"):
            assert substance(found[path]) == substance(expected), f"{path} differs from that of the undisturbed run"
        elif not path.startswith((".index/", ".tmp/")) and not (
            path.startswith("class_stats/") and "Changed" in outcome.values()
        ):
            assert found[path] == expected, f"{path} differs from that of the undisturbed run"
    line = json.loads(last.line())
    assert line["images"] == line["labelled"] + line["errors"] + line["skipped"] == len(arena.keys) + changed


def check_newer(arena: Arena, output: Store, overwritten: Iterable[str]) -> None:
    """That the next run has labelled the new versions of images that had changed, and nothing besides."""
    found = contents(output)
    rows = rows_of(found)
    assert not [path for path in found if not DOCUMENTED.fullmatch(path)]
    now = {item.key: item.etag for item in arena.input.list()}
    newer = [row for row in rows if row["key"] in overwritten and row["etag"] == now[row["key"]]]
    assert sorted(row["key"] for row in newer) == sorted(overwritten)
    assert all(row["status"] == "ok" for row in newer)
    versions = {(row["uri"], row["etag"]) for row in rows}
    assert len(rows) == len(versions) == len(arena.keys) + len(newer)


def rows_of(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """All rows of the label table among some files."""
    labels = [content for path, content in sorted(files.items()) if path.startswith("masks/")]
    return [row for content in labels for row in pq.read_table(io.BytesIO(content)).to_pylist()]


def _check_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]], outcome: Mapping[str, str]) -> None:
    """Rows of a chunk in which some end otherwise: their neighbours do not."""
    assert [(row["uri"], row["etag"]) for row in found] == [(row["uri"], row["etag"]) for row in expected]
    # An image that falls out of a batch may change the last bit of its neighbours' sums; a bad one never was in it.
    exactly = all(outcome.get(row["key"]) != "Changed" for row in expected)
    for row, undisturbed in zip(found, expected, strict=True):
        if row["key"] in outcome:
            assert (row["status"], _kind(row)) == ("error", outcome[row["key"]]), f"{row['key']}: {row['error']}"
        elif exactly:
            assert row == undisturbed
        else:
            _check_alike(row, undisturbed)


def _check_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A row whose sums may have another last bit."""
    summed = ("mask_classes", "mask_lengths", "confidence", "class_stats")
    assert {**found, **dict.fromkeys(summed)} == {**expected, **dict.fromkeys(summed)}
    if expected["status"] == "ok":
        assert (_mask(found) == _mask(expected)).mean() > ALIKE


def _mask(row: Mapping[str, Any]) -> NDArray[np.integer[Any]]:
    codes = np.array(row["mask_classes"]), np.array(row["mask_lengths"])
    return run_lengths.decode(*codes, row["height"], row["width"])


def _check_record(found: dict[str, Any], expected: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert {key: found[key] for key in RECORDED} == {key: expected[key] for key in RECORDED}
    assert found["errors"] == dict(Counter(_kind(row) for row in rows if row["error"]))
    assert found["labelled"] == sum(row["status"] == "ok" for row in rows)
    # What it took is told of the whole plan, whoever has carried out which part of it.
    assert found["spent"]["images"] == found["images"]
    assert found["wall_seconds"].keys() == found["cpu_seconds"].keys() == expected["cpu_seconds"].keys()


def _without_index(paths: Iterable[str]) -> set[str]:
    return {path for path in paths if not path.startswith(".index/")}


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["error"]).partition(":")[0]
