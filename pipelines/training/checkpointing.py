"""The checkpoints of a training run in a store: written in a thread of their own, read to go on, the best kept.

::

    <name>/checkpoints/<step>-<random>/model/model.json, weights.safetensors   what was scored; a model URI
                                       optimiser.safetensors                   momenta
                                       weights.safetensors                     what learns, if the model is an average
                                       progress.json                           written last: without it there is nothing

A folder is never written twice (its name is drawn), so what a killed worker left unfinished is not mixed with what its
successor writes for the same step.
"""

import dataclasses
import json
import logging
import math
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipelines.process.background import Worker
from pipelines.process.reading_back import read_back
from pipelines.process.retrying import Outage, Retries
from pipelines.storage import ObjectMissing, Store, TransientStorageError, to_local
from pipelines.training.patience import PATIENCE_S
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pspnet_core.errors import ConfigError, PspnetError, check_not_negative, check_positive

log = logging.getLogger(__name__)
MODEL_FOLDER = "model"
OPTIMISER_FILE = "optimiser.safetensors"
WEIGHTS_FILE = "weights.safetensors"
PROGRESS_FILE = "progress.json"


class CheckpointLost(PspnetError):
    """The last checkpoints of a run could not be written before patience ended."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Intervals of validation and of checkpoints, and how many are kept."""

    val_every: int = 1
    """Epochs between validations; one follows the last epoch in any case."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one after each validation; 0 for none."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, besides the best one."""

    def __post_init__(self) -> None:
        check_positive(val_every=self.val_every, keep_checkpoints=self.keep_checkpoints)
        check_not_negative(checkpoint_every=self.checkpoint_every)


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Progress of a run in plain numbers. Order, augmentation, dropout and learning rate are functions of the step."""

    step: int
    """Steps done since the start."""
    workers: int = 1
    """Number of those that took the last step."""
    loss: float = 0.0
    """Sum of the losses of the steps of the epoch that is under way."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler of float16; empty for other formats."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the epoch that this step ends; empty in the middle of one."""
    unsent: list[Any] = field(default_factory=list)
    """Metric points that the tracking server had not taken yet."""
    averaged: bool = False
    """Whether the model holds an average, and the weights that learn lie beside it."""

    @property
    def score(self) -> float:
        """mIoU, or minus infinity where none was measured."""
        return float(self.metrics.get("miou", -math.inf))


@dataclass(frozen=True, kw_only=True, eq=False)  # by identity: tensors have no truth value to compare by
class Snapshot:
    """A run's whole state in CPU memory; nothing that training changes later."""

    model: Checkpoint
    weights: dict[str, Tensor] | None = field(repr=False)
    """The weights that learn, when the model holds their average."""
    optimiser: dict[str, Tensor] = field(repr=False)
    progress: RunProgress
    folder: str | None = None
    """Folder that it was read from, relative to the store."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A complete checkpoint: its folder relative to the store, and its progress."""

    folder: str
    progress: RunProgress

    @property
    def model(self) -> str:
        """Path of the model's folder."""
        return f"{self.folder}/{MODEL_FOLDER}"


class DamagedCheckpoint(ConfigError):
    """A checkpoint cannot be read for what it holds."""


EntryT = TypeVar("EntryT", Snapshot, SavedCheckpoint)


class CheckpointFolder:
    """The checkpoints of one run. Cheap to pickle.

    Args:
        store: the run's output.
        name: the run's name.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    @property
    def path(self) -> str:
        """Folder of the checkpoints, relative to the store."""
        return f"{self.name}/checkpoints"

    def entries(self) -> list[SavedCheckpoint]:
        """List the complete checkpoints, oldest first, without those that another process deletes meanwhile."""
        return self._entries()[0]

    def _entries(self) -> tuple[list[SavedCheckpoint], list[ConfigError]]:
        """As ``entries``, and what is wrong with the others."""
        entries, damaged = list[SavedCheckpoint](), list[ConfigError]()
        for item in self.store.list(self.path, suffixes={PROGRESS_FILE}):
            try:
                entries.append(self.entry(item.key.rpartition("/")[0]))
            except ObjectMissing:
                continue
            except DamagedCheckpoint as error:
                log.warning("%s; it is passed over", error)
                damaged.append(error)
        entries.sort(key=lambda entry: (entry.progress.step, entry.progress.score, entry.folder))
        return entries, damaged

    def entry(self, folder: str) -> SavedCheckpoint:
        """Read the progress of the checkpoint in a folder.

        Raises:
            DamagedCheckpoint: it is damaged.
            And as ``Store.read`` when the checkpoint is not complete.
        """
        path = f"{folder}/{PROGRESS_FILE}"
        data = self.store.read(path)
        try:
            return SavedCheckpoint(folder=folder, progress=read_back(RunProgress, data))
        except ValueError as error:
            raise DamagedCheckpoint("resume", self.store.uri_of(path), f"damaged checkpoint ({error})") from error

    def new(self, snapshot: Snapshot) -> SavedCheckpoint:
        """Choose the folder of a snapshot; its name is drawn."""
        folder = f"{self.path}/{snapshot.progress.step:09d}-{uuid.uuid4().hex[:8]}"
        return SavedCheckpoint(folder=folder, progress=snapshot.progress)

    def write(self, snapshot: Snapshot, entry: SavedCheckpoint) -> None:
        """Write a snapshot; readers see it whole or not at all. May be repeated. Raises as ``Store.put_if_absent``."""
        for path, data in _files(snapshot):
            self.store.put_if_absent(f"{entry.folder}/{path}", data)

    def newest(self) -> Snapshot | None:
        """Read the newest checkpoint that is not damaged; None when there is none at all.

        Raises:
            ConfigError: when there are some and all of them are damaged.
        """
        entries, errors = self._entries()
        damaged = errors[0] if errors else None
        for entry in reversed(entries):
            try:
                return self.read(entry)
            except ConfigError as error:
                log.warning("%s; trying the one before", error)
                damaged = error
        if damaged:
            raise damaged
        return None

    def read(self, entry: SavedCheckpoint) -> Snapshot:
        """Read what ``write`` wrote.

        Raises:
            ConfigError: when a file is damaged.
        """
        with to_local(self.store.uri_of(entry.folder), field=self.store.field) as folder:
            weights = folder / WEIGHTS_FILE
            model = load_checkpoint(folder / MODEL_FOLDER)
            if entry.progress.averaged and not weights.is_file():
                raise DamagedCheckpoint("resume", entry.folder, f"damaged checkpoint (no {WEIGHTS_FILE})")
            try:
                return Snapshot(
                    model=model,
                    weights=safetensors.torch.load_file(weights) if weights.is_file() else None,
                    optimiser=safetensors.torch.load_file(folder / OPTIMISER_FILE),
                    progress=entry.progress,
                    folder=entry.folder,
                )
            except (OSError, SafetensorError) as error:
                raise ConfigError("resume", folder, f"damaged checkpoint ({error})") from error

    def prune(self, keep: int) -> None:
        """Delete all but the newest ``keep`` and the best one, and what was left unfinished before these."""
        entries = self.entries()
        kept = {entry.folder for entry in [*entries[-keep:], *best(entries)]}
        newest = entries[-1].folder if entries else ""
        superseded = (item.key for item in self.store.list(self.path) if _folder(item.key) < newest)
        # Progress first: without it the folder no longer counts as a checkpoint.
        for key in sorted(superseded, key=lambda key: not key.endswith(PROGRESS_FILE)):
            if _folder(key) not in kept:
                self.store.delete(key)


def _folder(key: str) -> str:
    """The checkpoint's folder of one of its files."""
    return "/".join(key.split("/")[:3])


def best(entries: Iterable[EntryT]) -> list[EntryT]:
    """Choose the one of the highest mIoU, the first of several; none where nothing was scored."""
    scored = [entry for entry in entries if entry.progress.score > -math.inf]
    return [max(scored, key=lambda entry: (entry.progress.score, -entry.progress.step))] if scored else []


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes, in the order in which they are written."""
    for name, data in snapshot.model.files().items():
        yield f"{MODEL_FOLDER}/{name}", data
    if snapshot.weights is not None:
        yield WEIGHTS_FILE, safetensors.torch.save(snapshot.weights)
    yield OPTIMISER_FILE, safetensors.torch.save(snapshot.optimiser)
    yield PROGRESS_FILE, json.dumps(dataclasses.asdict(snapshot.progress)).encode()


_MENDABLE = (TransientStorageError, ConfigError)
_RETRIES = Retries(attempts=0, longest_wait=30.0)
IDLE_S = 60.0
"""Seconds that the thread of a ``CheckpointWriter`` sleeps; a snapshot wakes it."""


class CheckpointWriter:
    """Writes snapshots in a thread, so that training does not wait for storage, and retries while it is away.

    At most three snapshots are held at a time: the one that is being written, the newest and the best-scored one that
    wait for it.

    Args:
        folder: where to.
        keep: newest checkpoints that stay, beside the best one; at least 1.
        patience: seconds that ``close`` waits for a storage that does not answer.
    """

    def __init__(self, folder: CheckpointFolder, *, keep: int, patience: float = PATIENCE_S) -> None:
        self._folder, self._keep, self._patience = folder, keep, patience
        self._outage = Outage("the storage of checkpoints", "training goes on, and they are written later")
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: list[Snapshot] = []
        self._closing = False
        self._worker = Worker(self._turn, name="checkpoints")

    def submit(self, snapshot: Snapshot) -> None:
        """Queue a snapshot; it replaces waiting ones that are neither the newest nor the best."""
        self._raise_failure()
        with self._lock:
            self._waiting = _newest_and_best([*self._waiting, snapshot])
        self._worker.wake()

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointLost: storage did not take it within the patience.
        """
        self._closing = True
        self._worker.wake()
        if not self._worker.join(self._patience):
            steps = ", ".join(str(snapshot.progress.step) for snapshot in self._waiting)
            where = self._folder.store.uri_of(self._folder.path)
            raise CheckpointLost(
                f"the checkpoint of step {steps} could not be written to {where}; mend it and --resume"
            )
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._worker.failure is not None:
            raise self._worker.failure

    def _turn(self) -> float | None:
        """Write what waits, oldest first; the last turn is the one that begins after ``close``."""
        closing = self._closing  # before the look: nothing is submitted after it
        while self._waiting:
            self._persist(self._waiting[0])
        return None if closing else IDLE_S

    def _persist(self, snapshot: Snapshot) -> None:
        """Try until it is written, or something newer makes it worthless."""
        place = self._folder.new(snapshot)
        try:
            _RETRIES.call(
                lambda: self._folder.write(snapshot, place),
                lambda error: isinstance(error, _MENDABLE),
                outage=self._outage,
                given_up=lambda: snapshot not in self._waiting,
            )
        except _MENDABLE:
            log.info("the checkpoint of step %d gives way to a newer one", snapshot.progress.step)
        with self._lock:
            self._waiting = [entry for entry in self._waiting if entry is not snapshot]
        try:
            self._folder.prune(self._keep)
        except _MENDABLE as error:
            log.warning("old checkpoints could not be deleted, the next time they will: %s", error)


def _newest_and_best(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Keep the newest, and the best of those that were scored, in their order."""
    wanted = [snapshots[-1], *best(snapshots)]
    return [snapshot for snapshot in snapshots if snapshot in wanted]
