"""What one training worker does from its start to the last step; ``trainer`` has the step itself.

Every few epochs each worker scores its share of the validation split with the ``Segmenter`` that labelling uses, the
confusion matrices are added up, and the first worker reports metrics and writes a checkpoint.
"""

import contextlib
import os
from collections.abc import Iterator

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.experimental import tqdm_ray

from pipelines.evaluation.scoring import compare, spread
from pipelines.tracking.runs import Run
from pipelines.training.checkpointing import CheckpointFolder, Snapshot
from pipelines.training.loading import Batch, Rank, load_by_ray, load_by_threads
from pipelines.training.patience import Patience
from pipelines.training.recording import Clock, Record
from pipelines.training.setup import Setup
from pipelines.training.trainer import NotFinite, Trainer

EXAMPLES = 6
"""Validation images that are drawn after each epoch, always the same."""


def train_loop(setup: Setup, folder: CheckpointFolder, run: Run) -> str | None:
    """Train in a worker process.

    Args:
        folder: the run's checkpoints.

    Returns:
        None when all steps are done, else why it stopped: trying again, as Ray Train does after an error, would find
        the same.
    """
    context = ray.train.get_context()
    rank = Rank(index=context.get_world_rank(), world=context.get_world_size())
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    trainer = Trainer(setup, rank, ray.train.torch.get_device())
    newest = newest_of_all(folder, trainer)
    if newest:
        trainer.restore(newest)
    keep = setup.config.checkpoints.keep_checkpoints
    recording = contextlib.nullcontext() if rank.index else Record.opened(run, folder, newest, keep=keep)
    try:
        with recording as record, load_batches(setup, rank, trainer.steps_done, threads) as batches:
            run_steps(trainer, batches, record)
    except NotFinite as error:
        return str(error)
    return None


def newest_of_all(folder: CheckpointFolder, trainer: Trainer) -> Snapshot | None:
    """Read the newest checkpoint that the first worker sees: all resume from it, even if a newer one appears."""
    patience = Patience()
    found = patience.outlast(folder.newest) if trainer.rank.index == 0 else None
    if trainer.rank.world > 1:
        chosen = [found.folder if found else None]
        torch.distributed.broadcast_object_list(chosen, src=0, device=trainer.device)
        if trainer.rank.index and chosen[0]:
            place = chosen[0]
            return patience.outlast(lambda: folder.read(folder.entry(place)))
    return found


def load_batches(
    setup: Setup, rank: Rank, start: int, threads: int
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Make this worker's batches from a step on."""
    if setup.loader_cpus:
        return load_by_ray(setup.crops, rank, start, setup.steps, cpus=setup.loader_cpus)
    return load_by_threads(setup.crops, rank, start, setup.steps, threads=max(2, threads))


def run_steps(trainer: Trainer, batches: Iterator[Batch], record: Record | None) -> None:
    """Take all steps that are left, with a validation every few epochs; the first worker keeps the record."""
    setup = trainer.setup
    clock = Clock(setup.crops.batch)
    for batch in _with_progress(trainer, clock.timed(batches), shown=record is not None and setup.progress):
        lr = trainer.lr
        trainer.train_step(batch)
        clock.tick()
        if record:
            record.step(trainer.steps_done, clock.metrics() | {"loss": trainer.loss, "lr": lr})
        if setup.validates(trainer.steps_done):
            ray.train.report(validate(trainer, record, {"lr": lr, "images_per_second": clock.images_per_second}))
            clock.restart()
        elif record and setup.saves(trainer.steps_done):
            record.save(trainer.snapshot(model=trainer.current_model()))


def validate(trainer: Trainer, record: Record | None, metrics: dict[str, float]) -> dict[str, float]:
    """Score the validation split, and record and save the epoch; return the epoch's metrics with those given."""
    setup, model = trainer.setup, trainer.scored_model()
    segmenter = trainer.segmenter(model)
    confusion = trainer.validate(segmenter)
    metrics = trainer.epoch_metrics(confusion) | metrics
    if record:
        examples = compare(segmenter, setup.dataset, spread(setup.val, EXAMPLES))
        record.epoch(metrics, confusion, list(examples), setup.dataset.classes)
        record.save(trainer.snapshot(model=model, metrics=metrics))
    return metrics


def _with_progress(trainer: Trainer, batches: Iterator[Batch], *, shown: bool) -> Iterator[Batch]:
    """Pass batches on, with a bar of the epoch's steps on the driver's terminal."""
    steps = trainer.setup.crops.steps
    bar = None
    for batch in batches:
        if shown and (bar is None or trainer.steps_done % steps == 0):
            epoch = trainer.steps_done // steps + 1
            bar = tqdm_ray.tqdm(desc=f"epoch {epoch}/{trainer.setup.config.schedule.epochs}", total=steps, position=0)
            bar.update(trainer.steps_done % steps)
        yield batch
        if bar is not None:
            bar.update(1)
            if trainer.steps_done % steps == 0:
                bar.close()
