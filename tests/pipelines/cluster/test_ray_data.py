"""Results of Ray Data: rows in the caller's thread, errors of their own kind, nothing left behind."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import ray.data

from pipelines.cluster.ray_data import blocks_of, quiet_ray_data, rows_of
from pipelines.storage import TransientStorageError

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_ray_data()


def numbers(count: int) -> ray.data.Dataset:
    return ray.data.range(count, override_num_blocks=count).map(lambda row: row | {"square": row["id"] ** 2})


def test_every_row_comes_once() -> None:
    found = sorted(rows_of(numbers(7)), key=lambda row: int(row["id"]))
    assert found == [{"id": number, "square": number**2} for number in range(7)]
    assert sum(block.num_rows for block in blocks_of(numbers(7))) == 7


def test_an_error_of_ours_comes_out_of_a_stage_as_itself() -> None:
    """What a stage raises on another machine reaches the user in its own words, not as a traceback of Ray's."""

    def unreachable(row: dict[str, Any]) -> dict[str, Any]:
        raise TransientStorageError("no answer after 5 attempts")

    with pytest.raises(TransientStorageError, match=r"^no answer after 5 attempts$"):
        list(rows_of(ray.data.from_items([{"id": 0}]).map(unreachable)))


def test_nothing_is_left_of_an_execution_that_is_left() -> None:
    """A thread that still asks Ray for something when the process disconnects makes Ray end the process."""
    before = set(threading.enumerate())
    found: Iterator[dict[str, Any]] = rows_of(numbers(64))
    next(found)
    assert set(threading.enumerate()) - before
    del found
    assert set(threading.enumerate()) <= before
