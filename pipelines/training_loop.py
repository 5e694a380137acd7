"""What one training worker does. The driver's side is ``training.py``.

One step, as in the paper: preprocess -> (initialised once) -> forward -> loss -> backward and update -> repeat. After
each epoch every worker scores its share of the validation split with the ``Segmenter`` that labelling uses, the
confusion matrices are added up, and the first worker reports metrics and checkpoint.

A step takes one batch, spread over the workers and, to save memory, over several passes of each. Its loss is the mean
over the pixels that count in all of them together, however unevenly the ignored ones are spread.

Shapes: ``b`` images of one worker's part of the batch, ``h w`` pixels of the crop.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from ray.experimental import tqdm_ray
from ray.train import Checkpoint
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.datasets import Dataset, Pair
from pipelines.loading import CropLoader, Shard
from pipelines.scoring import score
from pspnet_core import checkpoints
from pspnet_core.device import autocast, place, training_layout
from pspnet_core.ema import WeightAverage
from pspnet_core.inference import InferenceSettings, Segmenter
from pspnet_core.losses import LossConfig, class_weights, pspnet_loss, valid_weight
from pspnet_core.metrics import ConfusionMatrix
from pspnet_core.norms import set_norm
from pspnet_core.optim import build_optimiser, load_optimiser_state, optimiser_state, poly, set_learning_rate
from pspnet_core.pspnet import Logits, PSPNet, PSPNetConfig
from pspnet_core.transforms import AugmentConfig

MODEL_FOLDER = "model"  # what was scored: a checkpoint like any other
OPTIMISER_FILE = "optimiser.safetensors"
WEIGHTS_FILE = "weights.safetensors"  # the weights that learn, when the model holds their average
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Everything a worker needs; made and checked by the driver. Fields as in ``TrainConfig`` unless described."""

    dataset: Dataset
    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    network: PSPNetConfig
    loss: LossConfig
    inference: InferenceSettings
    augment: AugmentConfig
    init: dict[str, Tensor] | None = field(repr=False)
    """State of the whole network to start from, or None."""
    pixels: tuple[int, ...]
    """Training pixels of each class."""
    name: str
    epochs: int
    batch: int
    accumulate: int
    norm: str
    optimiser: str
    rate: float
    head: float
    decay: float
    warmup: int
    clip: float
    ema: float
    balance: float
    seed: int
    progress: bool
    """Whether a terminal shows a bar of the steps."""


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What training one epoch cost."""

    loss: float
    rate: float
    seconds: float


def train_loop(arguments: dict[str, LoopConfig]) -> None:
    """Entry point of a worker process."""
    config = arguments["loop"]
    context = ray.train.get_context()
    shard = Shard(rank=context.get_world_rank(), world=context.get_world_size())
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    worker = Worker(config, shard, ray.train.torch.get_device(), threads)
    start = worker.restore(ray.train.get_checkpoint())
    for epoch in range(start, config.epochs):
        trained = worker.train_epoch(epoch)
        model = worker.checkpoint()
        confusion = worker.validate(model)
        metrics = worker.metrics(epoch, trained, confusion)
        with tempfile.TemporaryDirectory() as folder:
            if shard.rank == 0:
                worker.save(Path(folder), model, epoch + 1)
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
            else:
                ray.train.report(metrics)


class Worker:
    """One worker's model, optimiser and data."""

    def __init__(self, config: LoopConfig, shard: Shard, device: torch.device, threads: int) -> None:
        self.config, self.shard, self.device = config, shard, device
        self.model = PSPNet(config.network)
        if config.init is not None:
            self.model.load_state_dict(config.init)
        place(self.model, device)
        set_norm(self.model, config.norm, workers=shard.world, device=device)
        self.average = WeightAverage(self.model, config.ema) if config.ema else None
        self.parallel = _parallel(self.model, shard, device)
        self.optimiser = build_optimiser(
            self.model, config.optimiser, weight_decay=config.decay, head_factor=config.head
        )
        self.loader = CropLoader(
            config.dataset,
            config.train,
            config.augment,
            batch=config.batch,
            seed=config.seed,
            shard=shard,
            threads=max(2, threads),
        )
        weights = class_weights(torch.tensor(config.pixels), power=config.balance) if config.balance else None
        self.weights = None if weights is None else weights.to(device)

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Take up the state of a checkpoint; returns the epoch to go on with."""
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            scored = checkpoints.load(Path(folder) / MODEL_FOLDER).weights
            raw = safetensors.torch.load_file(Path(folder) / WEIGHTS_FILE) if self.average else scored
            state = safetensors.torch.load_file(Path(folder) / OPTIMISER_FILE)
            progress = json.loads((Path(folder) / PROGRESS_FILE).read_text())
        self.model.load_state_dict(raw)
        if self.average:
            self.average.model.load_state_dict(scored)
        load_optimiser_state(self.optimiser, self.model, state)
        return int(progress["epoch"])

    def save(self, folder: Path, model: checkpoints.Checkpoint, epoch: int) -> None:
        """Write model, optimiser and progress; ``epoch`` is the next one to train."""
        model.save(folder / MODEL_FOLDER)
        if self.average:
            safetensors.torch.save_file(_on_cpu(self.model.state_dict()), folder / WEIGHTS_FILE)
        safetensors.torch.save_file(optimiser_state(self.optimiser, self.model), folder / OPTIMISER_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps({"epoch": epoch, "step": epoch * self.loader.steps}))

    def train_epoch(self, epoch: int) -> EpochResult:
        """All steps of one epoch."""
        self.model.train()
        # Dropout: other on each worker, and in a resumed run what it would have been.
        torch.manual_seed(derived_seed(self.config.seed, epoch, self.shard.rank))
        start, total, rate = time.perf_counter(), torch.zeros((), device=self.device), 0.0
        for index, (images, masks) in enumerate(self._with_progress(epoch)):
            step = epoch * self.loader.steps + index
            rate = self._rate(step)
            images = images.to(self.device, memory_format=training_layout(self.device))
            total += self.step(images, masks.to(self.device).long(), rate)
            if self.average:
                self.average.update(self.model, step)
        loss = float(self._added_up(total)) / self.loader.steps
        return EpochResult(loss=loss, rate=rate, seconds=time.perf_counter() - start)

    def _rate(self, step: int) -> float:
        steps = self.config.epochs * self.loader.steps
        return self.config.rate * poly(step, steps=steps, warmup=self.config.warmup)

    def step(self, images: Tensor, masks: Tensor, rate: float) -> Tensor:
        """One step on one batch: forward (the network preprocesses its input itself), loss, backward and update.

        Args:
            images: ``(b, 3, h, w)`` uint8 RGB, this worker's part of the batch.
            masks: ``(b, h, w)`` int64 class ids.
            rate: learning rate of the backbone.

        Returns:
            This worker's part of the loss; those of all workers add up to it.
        """
        set_learning_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        parts = list(zip(images.chunk(self.config.accumulate), masks.chunk(self.config.accumulate), strict=True))
        shares = self._shares([targets for _, targets in parts])
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(parts):
            with self._gradients_shared(last=number == len(parts) - 1):
                with autocast(self.device):
                    logits = self.parallel(inputs)
                loss = shares[number] * self._loss(logits, targets)
                # DDP takes the mean of the workers' gradients; the shares are made for their sum.
                (loss * self.shard.world).backward()
            total += loss.detach()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        return total

    def _loss(self, logits: Logits, targets: Tensor) -> Tensor:
        ignore = self.config.augment.ignore
        return pspnet_loss(logits, targets, ignore=ignore, weight=self.weights, config=self.config.loss)

    def _shares(self, masks: Sequence[Tensor]) -> Tensor:
        """Share of each of this worker's passes in the step's loss; those of all workers add up to 1."""
        ignore = self.config.augment.ignore
        counts = torch.stack([valid_weight(mask, ignore=ignore, weight=self.weights) for mask in masks])
        total = self._added_up(counts.sum())
        return (counts / torch.where(total > 0, total, 1)).float()

    def _added_up(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all workers."""
        if self.shard.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def _gradients_shared(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between the workers once a step, with the last pass."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def checkpoint(self) -> checkpoints.Checkpoint:
        """The model as it is scored and saved, the same on every worker: the averaged weights if there are any."""
        model = self.average.model if self.average else self.model
        if self.shard.world > 1:
            # Each worker's BatchNorm has seen other images.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        return checkpoints.from_model(
            model,
            name=self.config.name,
            classes=self.config.dataset.classes,
            inference=self.config.inference,
        )

    def validate(self, model: checkpoints.Checkpoint) -> ConfusionMatrix:
        """Confusion matrix of the whole validation split, on every worker."""
        segmenter = Segmenter(model.model, self.config.inference, device=self.device)
        pairs = self.config.val[self.shard.rank :: self.shard.world]
        confusion = score(segmenter, self.config.dataset, pairs)
        counts = self._added_up(torch.from_numpy(confusion.counts).to(self.device))
        confusion.counts[:] = counts.cpu().numpy()
        return confusion

    def metrics(self, epoch: int, trained: EpochResult, confusion: ConfusionMatrix) -> dict[str, Any]:
        """What is reported of an epoch."""
        images = self.loader.steps * self.config.batch
        iou = {f"iou_{index}": value for index, value in enumerate(confusion.iou().tolist()) if np.isfinite(value)}
        return {
            "epoch": epoch + 1,
            "loss": trained.loss,
            "rate": trained.rate,
            "images_per_second": images / trained.seconds,
            "miou": confusion.miou,
            "macc": confusion.macc,
            "aacc": confusion.aacc,
        } | iou

    def _with_progress(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.loader.epoch(epoch)
        if self.shard.rank or not self.config.progress:
            yield from batches
            return
        bar = tqdm_ray.tqdm(desc=f"epoch {epoch + 1}/{self.config.epochs}", total=self.loader.steps, position=0)
        for batch in batches:
            yield batch
            bar.update(1)
        bar.close()


def _parallel(model: PSPNet, shard: Shard, device: torch.device) -> torch.nn.Module:
    """The model with its gradients averaged over the workers."""
    if shard.world == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def derived_seed(*parts: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
