"""Checkpoints of a run: whole or not there, written while training goes on, the newest and the best kept."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.process.retrying import Retries
from pipelines.storage import TransientStorageError, open_store
from pipelines.storage.local import LocalStore
from pipelines.training.checkpointing import (
    PROGRESS_FILE,
    CheckpointFolder,
    CheckpointLost,
    CheckpointWriter,
    RunProgress,
    Snapshot,
    best,
)
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    torch.manual_seed(0)
    config = PSPNetConfig(classes=2, backbone="resnet18", stages=2, bins=(1, 2), auxiliary=False)
    model = Checkpoint.from_model(PSPNet(config), name="tiny", classes=ClassTable.from_json({"names": ["a", "b"]}))
    optimiser = {"decoder.1.weight.momentum_buffer": torch.randn(2, 3, generator=torch.Generator().manual_seed(1))}
    return Snapshot(model=model, weights=None, optimiser=optimiser, progress=RunProgress(step=0))


def at(snapshot: Snapshot, step: int, miou: float | None = None) -> Snapshot:
    metrics = {} if miou is None else {"miou": miou}
    return dataclasses.replace(snapshot, progress=RunProgress(step=step, metrics=metrics))


def steps(folder: CheckpointFolder) -> list[int]:
    return [entry.progress.step for entry in folder.entries()]


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointFolder:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")
    return CheckpointFolder(open_store(root, field="output"), "tiny")


def write(folder: CheckpointFolder, snapshot: Snapshot) -> None:
    folder.write(snapshot, folder.new(snapshot))


def test_what_is_written_is_read(folder: CheckpointFolder, snapshot: Snapshot) -> None:
    assert folder.newest() is None
    progress = RunProgress(
        step=7, loss=0.1 + 0.2, scaler={"scale": 2.0**16}, metrics={"miou": 1 / 3}, unsent=[["loss", 0.5, 1, 7]]
    )
    given = dataclasses.replace(snapshot, weights={"w": torch.ones(3)}, progress=progress)
    write(folder, given)
    found = folder.newest()
    assert found is not None
    assert found.progress == progress
    assert found.model.fingerprint == snapshot.model.fingerprint
    assert found.weights is not None
    assert torch.equal(found.weights["w"], torch.ones(3))
    assert found.optimiser.keys() == snapshot.optimiser.keys()
    assert all(torch.equal(found.optimiser[name], tensor) for name, tensor in snapshot.optimiser.items())


def test_an_unfinished_one_is_not_there(folder: CheckpointFolder, snapshot: Snapshot) -> None:
    write(folder, at(snapshot, 3))
    later = folder.new(at(snapshot, 5))
    folder.store.put_if_absent(f"{later.folder}/optimiser.safetensors", b"half")
    newest = folder.newest()
    assert newest is not None
    assert newest.progress.step == 3
    # It may be one that is being written: only what is older than the newest goes.
    folder.prune(keep=1)
    assert folder.store.exists(f"{later.folder}/optimiser.safetensors")
    write(folder, at(snapshot, 6))
    folder.prune(keep=1)
    assert not list(folder.store.list(later.folder))
    assert steps(folder) == [6]


def test_the_newest_and_the_best_are_kept(folder: CheckpointFolder, snapshot: Snapshot) -> None:
    for step, miou in ((10, 0.2), (20, 0.6), (25, None), (30, 0.6), (35, None), (40, 0.5)):
        write(folder, at(snapshot, step, miou))
    folder.prune(keep=2)
    assert steps(folder) == [20, 35, 40]
    assert [entry.progress.step for entry in best(folder.entries())] == [20]
    assert all(item.key.startswith("tiny/checkpoints/") for item in folder.store.list())


def test_one_that_is_deleted_while_others_are_read_is_passed_over(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(open_store(str(tmp_path), field="output"), "tiny")
    for step in (1, 2, 3):
        write(folder, at(snapshot, step))
    listed = list(folder.store.list(folder.path, suffixes={PROGRESS_FILE}))
    folder.prune(keep=1)
    monkeypatch.setattr(folder.store, "list", lambda *_, **__: listed)
    assert steps(folder) == [3]


def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(open_store(str(tmp_path), field="output"), "tiny")
    write(folder, at(snapshot, 1))
    for step, damage in ((2, "optimiser.safetensors"), (3, "progress.json"), (4, "weights.safetensors")):
        progress = RunProgress(step=step, averaged=True)
        write(folder, dataclasses.replace(snapshot, weights={"w": torch.ones(3)}, progress=progress))
        path = tmp_path / folder.entries()[-1].folder / damage
        path.unlink() if step == 4 else path.write_bytes(b'{"step": "many"}')
    newest = folder.newest()
    assert newest is not None
    assert newest.progress.step == 1
    assert "damaged checkpoint" in caplog.text
    (tmp_path / folder.entries()[0].model / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"weights\.safetensors"):
        folder.newest()


class Unreachable(LocalStore):
    """A store that does not answer until ``there`` is set; ``asked`` is set by the first request it refuses."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), field="output", retries=Retries())
        self.there, self.asked = threading.Event(), threading.Event()

    def put_if_absent(self, path: str, data: bytes) -> bool:
        if not self.there.is_set():
            self.asked.set()
            raise TransientStorageError("the bucket is away")
        return super().put_if_absent(path, data)


@pytest.fixture
def unreachable(tmp_path: Path) -> Iterator[Unreachable]:
    store = Unreachable(tmp_path)
    yield store
    store.there.set()


def test_an_unreachable_store_is_waited_for(
    unreachable: Unreachable, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(unreachable, "tiny")
    writer = CheckpointWriter(folder, keep=1)
    for step, miou in ((1, None), (2, 0.9), (3, None), (4, 0.1), (5, None)):
        writer.submit(at(snapshot, step, miou))  # returns at once
    assert unreachable.asked.wait(60)
    unreachable.there.set()
    writer.close()
    # The best one and the newest; the others would be deleted soon.
    assert steps(folder) == [2, 5]
    assert "does not answer (the bucket is away); training goes on" in caplog.text


def test_a_full_disk_is_waited_for(
    tmp_path: Path, snapshot: Snapshot, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path), field="output", retries=Retries(attempts=2, first_wait=0.01, jitter=0.0))
    flush, refused = os.fsync, iter(range(3))

    def full(file: int) -> None:
        if next(refused, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    monkeypatch.setattr(os, "fsync", full)
    folder = CheckpointFolder(store, "tiny")
    writer = CheckpointWriter(folder, keep=1)
    writer.submit(at(snapshot, 1))
    writer.close()
    assert steps(folder) == [1]
    assert "training goes on" in caplog.text
    assert f"{os.strerror(errno.ENOSPC)}: free some room" in caplog.text


def test_patience_ends(unreachable: Unreachable, snapshot: Snapshot) -> None:
    writer = CheckpointWriter(CheckpointFolder(unreachable, "tiny"), keep=1, patience=0.1)
    writer.submit(at(snapshot, 4))
    with pytest.raises(CheckpointLost, match=r"step 4 could not be written to .*tiny/checkpoints"):
        writer.close()


def test_a_fault_of_the_writer_reaches_training(snapshot: Snapshot) -> None:
    class Broken(CheckpointFolder):
        def write(self, snapshot: Snapshot, entry: object) -> None:
            raise MemoryError("no room")

    writer = CheckpointWriter(Broken(open_store("/nowhere", field="output"), "tiny"), keep=1)
    writer.submit(at(snapshot, 1))
    with pytest.raises(MemoryError, match="no room"):
        writer.close()
    with pytest.raises(MemoryError, match="no room"):
        writer.submit(at(snapshot, 2))
