"""What one training worker does. The driver's side is ``training.py``.

One step, as in the paper: preprocess -> (initialised once) -> forward -> loss -> backward and update -> repeat. Every
``validate`` epochs each worker scores its share of the validation split with the ``Segmenter`` that labelling uses, the
confusion matrices are added up, and the first worker reports metrics and writes a checkpoint.

A step takes one batch, spread over the workers and, to save memory, over several passes of each. Its loss is the mean
over the pixels that count in all of them together, however unevenly the ignored ones are spread.

Everything that chance decides (order, augmentation, dropout) is drawn from the seed and the number of the step, so a
run that goes on from the checkpoint of step ``s`` does what an undisturbed one did after it.

Shapes: ``b`` images of one worker's part of the batch, ``h w`` pixels of the crop.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.experimental import tqdm_ray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.datasets.dataset import Dataset, Pair
from pipelines.evaluation.scoring import BATCH, chunked, compare, score, spread
from pipelines.training.checkpointing import CheckpointFolder, Progress, Snapshot
from pipelines.training.loading import Batch, Crops, Shard, feed_ray, feed_threads
from pipelines.training.patience import Patience
from pipelines.training.recording import Clock, Record
from pspnet_core.checkpoints.checkpoint import Checkpoint, cpu_state_dict
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.device import autocast, make_deterministic, place, training_dtype, training_layout
from pspnet_core.errors import PspnetError
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import ConfusionMatrix
from pspnet_core.network.pspnet import Logits, PSPNet, PSPNetConfig
from pspnet_core.training.ema import WeightAverage
from pspnet_core.training.losses import LossConfig, class_weights, pspnet_loss, valid_weight
from pspnet_core.training.norms import set_norm
from pspnet_core.training.optim import build_optimiser, load_optimiser_state, optimiser_state, poly, set_lr

EXAMPLES = 6
"""Validation images that are drawn after each epoch, always the same."""


class NotFinite(PspnetError):
    """Loss, gradient or weights are NaN or infinite; what was saved before is whole."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Everything a worker needs; made and checked by the driver. Fields as in ``TrainConfig`` unless described."""

    crops: Crops
    """The crops of every step."""
    val: tuple[Pair, ...]
    network: PSPNetConfig
    loss: LossConfig
    inference: InferenceSettings
    init: dict[str, Tensor] | None = field(repr=False)
    """State of the whole network to start from, or None."""
    pixels: tuple[int, ...]
    """Training pixels of each class."""
    name: str
    epochs: int
    accumulate: int
    norm: str
    precision: str
    deterministic: bool
    compile: bool
    optimiser: str
    rate: float
    power: float
    momentum: float
    head: float
    decay: float
    warmup: int
    clip: float
    ema: float
    balance: float
    every: int
    validate: int
    keep: int
    feed_cpus: float = 0.0
    """CPUs that each task of Ray Data claims to make crops; 0 makes them in the worker's threads."""
    progress: bool = False
    """Whether a terminal shows a bar of the steps."""

    @property
    def dataset(self) -> Dataset:
        """Where the images of both splits come from."""
        return self.crops.dataset

    @property
    def seed(self) -> int:
        """Seed of weights, order, augmentation and dropout."""
        return self.crops.seed

    @property
    def ignore(self) -> int:
        """Id of pixels without a label."""
        return self.crops.augment.ignore

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.crops.steps

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step, counted from 1: every ``validate`` epochs and after the last."""
        return step % (self.validate * self.crops.steps) == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step: after each validation, and every ``every`` steps."""
        return self.validates(step) or (self.every > 0 and step % self.every == 0)


def train_loop(arguments: dict[str, Any]) -> str | None:
    """Entry point of a worker process.

    Args:
        arguments: ``loop``, ``folder`` (of the run's checkpoints) and ``run``.

    Returns:
        None when all steps are done, else why it stopped: trying again, as Ray Train does after an error, would find
        the same.
    """
    config: LoopConfig = arguments["loop"]
    folder: CheckpointFolder = arguments["folder"]
    context = ray.train.get_context()
    shard = Shard(rank=context.get_world_rank(), world=context.get_world_size())
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    worker = Worker(config, shard, ray.train.torch.get_device())
    newest = newest_of_all(folder, worker)
    worker.restore(newest)
    first = shard.rank == 0
    recording = Record.opened(arguments["run"], folder, newest, keep=config.keep) if first else contextlib.nullcontext()
    try:
        with recording as record, feed(config, shard, worker.steps_done, threads) as batches:
            run_steps(worker, batches, record)
    except NotFinite as error:
        return str(error)
    return None


def newest_of_all(folder: CheckpointFolder, worker: "Worker") -> Snapshot | None:
    """The newest checkpoint that the first worker sees; all go on from that one, whatever is written just now."""
    patience = Patience()
    found = patience.outlast(folder.newest) if worker.shard.rank == 0 else None
    if worker.shard.world > 1:
        chosen = [found.folder if found else None]
        torch.distributed.broadcast_object_list(chosen, src=0, device=worker.device)
        if worker.shard.rank and chosen[0]:
            place = chosen[0]
            return patience.outlast(lambda: folder.read(folder.entry(place)))
    return found


def feed(
    config: LoopConfig, shard: Shard, start: int, threads: int
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """This worker's batches from a step on."""
    if config.feed_cpus:
        return feed_ray(config.crops, shard, start, config.steps, cpus=config.feed_cpus)
    return feed_threads(config.crops, shard, start, config.steps, threads=max(2, threads))


def run_steps(worker: "Worker", batches: Iterator[Batch], record: Record | None) -> None:
    """All steps that are left, with a validation every few epochs; the first worker keeps the record."""
    config = worker.config
    clock = Clock(config.crops.batch)
    for batch in _with_progress(worker, clock.timed(batches), shown=record is not None and config.progress):
        rate = worker.rate
        worker.train_step(batch)
        clock.tick()
        if record:
            record.step(worker.steps_done, clock.metrics() | {"loss": worker.loss, "rate": rate})
        if config.validates(worker.steps_done):
            model = worker.scored_model()
            segmenter = worker.segmenter(model)
            confusion = worker.validate(segmenter)
            metrics = worker.epoch_metrics(confusion, rate) | {"images_per_second": clock.images_per_second}
            if record:
                examples = compare(segmenter, config.dataset, spread(config.val, EXAMPLES))
                record.epoch(metrics, confusion, list(examples), config.dataset.classes)
                record.save(worker.snapshot(model=model, metrics=metrics))
            ray.train.report(metrics)
            clock.restart()
        elif record and config.saves(worker.steps_done):
            record.save(worker.snapshot(model=worker.current_model()))


class Worker:
    """One worker's model and optimiser. Holds no connection; what happens outside of it is ``Record``'s.

    Attributes:
        steps_done: steps since the start of the run.
        loss: of the last step, over all workers.
        losses: sum of the losses of the epoch so far.
    """

    def __init__(self, config: LoopConfig, shard: Shard, device: torch.device) -> None:
        if config.deterministic:
            make_deterministic()
        torch.manual_seed(config.seed)
        self.config, self.shard, self.device = config, shard, device
        self.steps_done, self.loss, self.losses = 0, math.nan, 0.0
        self.model = PSPNet(config.network)
        if config.init is not None:
            self.model.load_state_dict(config.init)
        place(self.model, device)
        set_norm(self.model, config.norm, workers=shard.world, device=device)
        self.average = WeightAverage(self.model, config.ema) if config.ema else None
        if config.compile:
            self.model.compile()
        self.parallel = _parallel(self.model, shard, device, deterministic=config.deterministic)
        self.optimiser = build_optimiser(
            self.model,
            config.optimiser,
            momentum=config.momentum,
            weight_decay=config.decay,
            head_lr_factor=config.head,
        )
        self.dtype = training_dtype(device, config.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        weights = class_weights(torch.tensor(config.pixels), power=config.balance) if config.balance else None
        self.weights = None if weights is None else weights.to(device)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Take up the state of a checkpoint; without one the run starts."""
        if snapshot is None:
            return
        raw = snapshot.weights if snapshot.weights is not None else snapshot.model.weights
        self.model.load_state_dict(raw)
        if self.average:
            self.average.model.load_state_dict(snapshot.model.weights)
        load_optimiser_state(self.optimiser, self.model, snapshot.optimiser)
        if snapshot.progress.scaler:
            self.scaler.load_state_dict(snapshot.progress.scaler)
        self.steps_done, self.losses = snapshot.progress.step, snapshot.progress.loss

    def snapshot(self, *, model: Checkpoint, metrics: Mapping[str, float] | None = None) -> Snapshot:
        """The state as it is now, copied to CPU memory; ``metrics`` where an epoch has just ended."""
        progress = Progress(
            step=self.steps_done,
            workers=self.shard.world,
            loss=self.losses,
            scaler=self.scaler.state_dict(),
            metrics=dict(metrics or {}),
        )
        return Snapshot(
            model=model,
            weights=cpu_state_dict(self.model) if self.average else None,
            optimiser=optimiser_state(self.optimiser, self.model),
            progress=progress,
        )

    @property
    def rate(self) -> float:
        """Learning rate of the backbone in the next step."""
        share = poly(self.steps_done, steps=self.config.steps, power=self.config.power, warmup=self.config.warmup)
        return self.config.rate * share

    def train_step(self, batch: Batch) -> None:
        """Take the next step of the run with this worker's part of its batch.

        Raises:
            NotFinite: names the step and the images of all workers; that of a checkpoint also when it has spoilt them.
        """
        if self.steps_done % self.config.crops.steps == 0:
            self.losses = 0.0
        self.model.train()
        # Dropout: other on each worker, and what it was before where a step is taken again.
        torch.manual_seed(derived_seed(self.config.seed, self.steps_done, self.shard.rank))
        images = batch.images.to(self.device, memory_format=training_layout(self.device))
        try:
            self.loss = float(self.step(images, batch.masks.to(self.device).long(), self.rate))
            if self.average:
                self.average.update(self.model, self.steps_done)
            if self.config.saves(self.steps_done + 1):
                self._refuse_spoilt_state()
        except NotFinite as error:
            keys = ", ".join(self.config.crops.keys(self.steps_done))
            raise NotFinite(f"{error} at step {self.steps_done + 1} on images {keys}") from error
        self.losses += self.loss
        self.steps_done += 1

    def step(self, images: Tensor, masks: Tensor, rate: float) -> Tensor:
        """One step on one batch: forward (the network preprocesses its input itself), loss, backward and update.

        Args:
            images: ``(b, 3, h, w)`` uint8 RGB, this worker's part of the batch.
            masks: ``(b, h, w)`` int64 class ids.
            rate: learning rate of the backbone.

        Returns:
            The loss of the batch, over all workers.

        Raises:
            NotFinite: before anything is changed.
        """
        set_lr(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        passes = self.config.accumulate
        parts = list(zip(images.tensor_split(passes), masks.tensor_split(passes), strict=True))
        shares = self._shares([targets for _, targets in parts])
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(parts):
            with self._gradients_shared(last=number == len(parts) - 1):
                with autocast(self.device, self.dtype):
                    logits = self.parallel(inputs)
                loss = shares[number] * self._loss(logits, targets)
                # DDP takes the mean of the workers' gradients; the shares are made for their sum.
                self.scaler.scale(loss * self.shard.world).backward()
            total += loss.detach()
        self._added_up(total)
        self.scaler.unscale_(self.optimiser)
        self._refuse_infinite(total, self._clipped_norm())
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return total

    def _clipped_norm(self) -> Tensor:
        """The norm of the gradient of all weights together, the same on all workers, as it was before it is clipped."""
        norm: Tensor
        if self.config.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        else:  # not by clipping to infinity, which writes every gradient once more
            slopes = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(slope) for slope in slopes]))
        return norm

    def _refuse_infinite(self, loss: Tensor, norm: Tensor) -> None:
        """Stop before an update that would spoil the weights; both values travel from the device at once."""
        value, length = torch.stack([loss, norm]).tolist()
        if not math.isfinite(value):
            raise NotFinite(f"the loss is {value}")
        # The loss scaling of float16 leaves such a step out, and goes on with a smaller scale.
        if not math.isfinite(length) and not self.scaler.is_enabled():
            raise NotFinite(f"the norm of the gradient is {length}")

    def _refuse_spoilt_state(self) -> None:
        """Stop before a checkpoint that nothing can go on from, on all workers if on one: each has its own statistics.

        They overflow in a forward pass whose loss and gradient may still be finite, as weights do in an update.
        """
        models = [self.model, self.average.model] if self.average else [self.model]
        state = [tensor for model in models for tensor in model.state_dict().values() if tensor.is_floating_point()]
        spoilt = torch.stack([~torch.isfinite(tensor).all() for tensor in state]).sum()
        if self._added_up(spoilt):
            raise NotFinite("weights or statistics of BatchNorm are not finite")

    def _loss(self, logits: Logits, targets: Tensor) -> Tensor:
        return pspnet_loss(logits, targets, ignore=self.config.ignore, weight=self.weights, config=self.config.loss)

    def _shares(self, masks: Sequence[Tensor]) -> Tensor:
        """Share of each of this worker's passes in the step's loss; those of all workers add up to 1."""
        counts = torch.stack([valid_weight(mask, ignore=self.config.ignore, weight=self.weights) for mask in masks])
        total = self._added_up(counts.sum())
        return (counts / torch.where(total > 0, total, 1)).float()

    def _added_up(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all workers, in place."""
        if self.shard.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def _gradients_shared(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between the workers once a step, with the last pass."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def current_model(self) -> Checkpoint:
        """This worker's model as it is scored and saved: the averaged weights if there are any."""
        return Checkpoint.from_model(
            self.average.model if self.average else self.model,
            name=self.config.name,
            classes=self.config.dataset.classes,
            settings=self.config.inference,
        )

    def scored_model(self) -> Checkpoint:
        """``current_model`` of the first worker, on every worker: each one's BatchNorm has seen other images."""
        if self.shard.world > 1:
            for buffer in (self.average.model if self.average else self.model).buffers():
                torch.distributed.broadcast(buffer, src=0)
        return self.current_model()

    def segmenter(self, model: Checkpoint) -> Segmenter:
        """What labels with a model on this worker's device; its batches are evaluation's."""
        return Segmenter(model.model, self.config.inference, device=self.device, batch=BATCH)

    def validate(self, segmenter: Segmenter) -> ConfusionMatrix:
        """Confusion matrix of the whole validation split, on every worker."""
        chunks = chunked(self.config.val)[self.shard.rank :: self.shard.world]
        confusion = score(segmenter, self.config.dataset, list(itertools.chain.from_iterable(chunks)))
        counts = self._added_up(torch.from_numpy(confusion.counts).to(self.device))
        confusion.counts[:] = counts.cpu().numpy()
        return confusion

    def epoch_metrics(self, confusion: ConfusionMatrix, rate: float) -> dict[str, float]:
        """What is reported of the epoch that has just ended; ``iou_<class id>`` of each class that was there."""
        iou = {f"iou_{index}": value for index, value in enumerate(confusion.iou().tolist()) if np.isfinite(value)}
        return {
            "epoch": self.steps_done // self.config.crops.steps,
            "loss": self.losses / self.config.crops.steps,
            "rate": rate,
            "workers": self.shard.world,
            "miou": confusion.miou,
            "macc": confusion.macc,
            "aacc": confusion.aacc,
        } | iou


def _with_progress(worker: Worker, batches: Iterator[Batch], *, shown: bool) -> Iterator[Batch]:
    """Pass batches on, with a bar of the epoch's steps on the driver's terminal."""
    steps = worker.config.crops.steps
    bar = None
    for batch in batches:
        if shown and (bar is None or worker.steps_done % steps == 0):
            epoch = worker.steps_done // steps + 1
            bar = tqdm_ray.tqdm(desc=f"epoch {epoch}/{worker.config.epochs}", total=steps, position=0)
            bar.update(worker.steps_done % steps)
        yield batch
        if bar is not None:
            bar.update(1)
            if worker.steps_done % steps == 0:
                bar.close()


def _parallel(model: PSPNet, shard: Shard, device: torch.device, *, deterministic: bool) -> torch.nn.Module:
    """The model with its gradients averaged over the workers."""
    if shard.world == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=devices,
        gradient_as_bucket_view=True,
        # Otherwise the gradients are put into other buckets after the first step, and more than two workers would add
        # them up in another order from then on: a run that was interrupted would differ in the last bit.
        find_unused_parameters=deterministic,
    )


def derived_seed(*parts: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
