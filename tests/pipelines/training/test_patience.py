"""Outages of storage during training: workers wait, log it once, and lose nothing."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipelines.process.retrying import Retries
from pipelines.storage import TransientStorageError, open_store
from pipelines.training.checkpointing import CheckpointFolder
from pipelines.training.loading import Batch, Crops, Rank, load_by_threads
from pipelines.training.loop import newest_of_all
from pipelines.training.patience import Patience
from pipelines.training.setup import Setup, check_data, set_up
from tests.support.faultproxy import FaultProxy, Rule, slow_down
from tests.support.ranks import make_trainer
from tests.support.setups import SMALL, config_of

ATTEMPTS = 2
QUICK = Retries(attempts=ATTEMPTS, first_wait=0, longest_wait=0, jitter=0)
SECONDS = 60.0  # a busy machine takes long


@pytest.fixture
def setup(data: Path, s3_proxy: FaultProxy, s3_bucket: str) -> Setup:
    """What a trainer is given of a data set in a bucket, which gives up soon by itself."""
    store = open_store(s3_bucket, field="data", retries=QUICK)
    for path in sorted(data.rglob("*.*")):
        assert store.put_if_absent(path.relative_to(data).as_posix(), path.read_bytes())
    config = config_of(s3_bucket, **SMALL, epochs=3)
    quick = dataclasses.replace(config.dataset.open(), store=store)
    setup = set_up(config, quick, check_data(config, quick))
    return dataclasses.replace(setup, network=dataclasses.replace(setup.network, stages=2))


def batches_of(crops: Crops) -> list[Batch]:
    with load_by_threads(crops, Rank(), 0, 6, threads=1) as batches:
        return list(batches)


def test_data_that_are_away_for_a_while_make_the_same_crops(
    setup: Setup, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    expected = batches_of(setup.crops)
    assert not caplog.messages
    away = s3_proxy.add(Rule(slow_down, path="/images/train/", first=4))
    with ThreadPoolExecutor(1) as reader:
        # As they come to a worker: pickled.
        found = reader.submit(batches_of, pickle.loads(pickle.dumps(setup.crops)))
        assert away.reached(ATTEMPTS + 1, seconds=SECONDS)  # after a read has given up by itself
        s3_proxy.clear()
        for batch, other in zip(found.result(SECONDS), expected, strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.masks, other.masks)
    missing, back = caplog.messages
    assert missing.startswith("storage does not answer (s3://") and missing.endswith("; training waits for up to 600 s")
    assert back.startswith("storage answers again after ")


def test_validation_waits_for_its_data(setup: Setup, s3_proxy: FaultProxy) -> None:
    trainer = make_trainer(setup)
    segmenter = trainer.segmenter(trainer.scored_model())
    expected = trainer.validate(segmenter)
    away = s3_proxy.add(Rule(slow_down, path="/masks/val/", times=2 * ATTEMPTS))
    assert (trainer.validate(segmenter).counts == expected.counts).all()
    assert len(away.hits) == 2 * ATTEMPTS


def test_a_restart_waits_for_its_checkpoint(setup: Setup, s3_proxy: FaultProxy, s3_bucket: str) -> None:
    trainer = make_trainer(setup)
    folder = CheckpointFolder(open_store(s3_bucket, field="output", retries=QUICK), "run")
    assert newest_of_all(folder, trainer) is None
    snapshot = trainer.snapshot(model=trainer.scored_model())
    folder.write(snapshot, folder.new(snapshot))
    away = s3_proxy.add(Rule(slow_down, path="run/checkpoints", times=ATTEMPTS))
    found = newest_of_all(folder, trainer)
    assert len(away.hits) == ATTEMPTS
    assert found is not None
    assert found.model.fingerprint == snapshot.model.fingerprint


def test_an_outage_is_logged_once_however_many_threads_meet_it(caplog: pytest.LogCaptureFixture) -> None:
    patience, threads = Patience(), 4
    met = threading.Barrier(threads)
    tried = [0] * threads

    def read(thread: int) -> int:
        tried[thread] += 1
        if tried[thread] == 1:
            met.wait(SECONDS)
            raise TransientStorageError("the bucket is away")
        met.wait(SECONDS)  # nobody finds it back before all have missed it
        return thread

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(lambda thread: patience.outlast(lambda: read(thread)), range(threads))) == [0, 1, 2, 3]
    assert tried == [2] * threads
    missing, back = caplog.messages
    assert "the bucket is away" in missing
    assert back.startswith("storage answers again")


def test_patience_ends_for_all_readers_of_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    """Those that come later, too: a run that fails is not held up by what it no longer needs."""
    patience = Patience(0.9)  # less than the first wait
    tries: list[int] = []

    def read(call: int) -> None:
        tries.append(call)
        raise TransientStorageError("the bucket is away")

    for call in range(3):
        with pytest.raises(TransientStorageError, match="the bucket is away"):
            patience.outlast(functools.partial(read, call))
    assert [call for call in tries if call] == [1, 2]
    assert len(caplog.messages) == 1
