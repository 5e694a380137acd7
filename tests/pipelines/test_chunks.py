"""The stages of a chunk outside the model's actor."""

import datetime
from pathlib import Path
from typing import cast

import pytest

from pipelines.chunks import PATIENCE, Read, Work, Write
from pipelines.coordinator import Coordinator
from pipelines.ledger import Ledger, Order, Plan
from pipelines.storage import open_store
from pipelines.tables import Paths, Stamp
from pspnet_core.scenes import SCENE_CLASSES

NOW = datetime.datetime(2026, 1, 31, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize("stage", [Read, Write])
def test_the_stages_outlast_an_output_that_is_away_for_two_minutes(
    tmp_path: Path, stage: type[Read] | type[Write]
) -> None:
    store = open_store(str(tmp_path), field="output")
    work = Work(
        output=store,
        ledger=Ledger(store, Paths(partition="grey-0")),
        stamp=Stamp(run_id="run", made=NOW, mask="rle"),
        model="grey",
        classes=SCENE_CLASSES,
        pixels=10_000,
        coordinator=cast(Coordinator, None),
    )
    order = Order(source="images", input=["in"], date="2026-01-31", mask="rle")
    plan = Plan(number=0, run_id="run", made=NOW, order=order, chunks=1, images=1)
    patient = stage(work, plan).work
    for used in (patient.output, patient.ledger.store):
        assert (used.root, used.field, used.retries) == (store.root, "output", PATIENCE)
    waits = [min(PATIENCE.first_wait * 2**done, PATIENCE.longest_wait) for done in range(PATIENCE.attempts - 1)]
    assert sum(waits) >= 120
    assert store.retries != PATIENCE
