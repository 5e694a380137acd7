"""What one training worker does. The driver's side is ``training.py``.

One step, as in the paper: preprocess -> (initialised once) -> forward -> loss -> backward and update -> repeat. After
each epoch every worker scores its share of the validation split with the ``Segmenter`` that labelling uses, the
confusion matrices are added up, and the first worker reports metrics and checkpoint.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
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
from pspnet_core.device import autocast
from pspnet_core.inference import InferenceSettings, Segmenter
from pspnet_core.losses import class_weights, pspnet_loss
from pspnet_core.metrics import ConfusionMatrix
from pspnet_core.optim import build_optimiser, poly, set_learning_rate
from pspnet_core.pspnet import PSPNet, PSPNetConfig
from pspnet_core.transforms import AugmentConfig

OPTIMISER_FILE = "optimiser.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Everything a worker needs; made and checked by the driver. Fields as in ``TrainConfig`` unless described."""

    dataset: Dataset
    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    network: PSPNetConfig
    inference: InferenceSettings
    augment: AugmentConfig
    init: dict[str, Tensor] | None = field(repr=False)
    """State of the whole network to start from, or None."""
    pixels: tuple[int, ...]
    """Training pixels of each class."""
    name: str
    epochs: int
    batch: int
    optimiser: str
    rate: float
    head: float
    decay: float
    warmup: int
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
        confusion = worker.validate()
        metrics = worker.metrics(epoch, trained, confusion)
        with tempfile.TemporaryDirectory() as folder:
            if shard.rank == 0:
                worker.save(Path(folder), epoch + 1)
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
        # The Segmenter shares the model: validation scores the weights as they are, by labelling's own path.
        self.segmenter = Segmenter(self.model, config.inference, device=device)
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
            self.model.load_state_dict(checkpoints.load(Path(folder) / "model").weights)
            state = safetensors.torch.load_file(Path(folder) / OPTIMISER_FILE)
            progress = json.loads((Path(folder) / PROGRESS_FILE).read_text())
        _load_optimiser(self.optimiser, state)
        return int(progress["epoch"])

    def save(self, folder: Path, epoch: int) -> None:
        """Write model, optimiser and progress; ``epoch`` is the next one to train."""
        checkpoint = checkpoints.from_model(
            self.model,
            name=self.config.name,
            classes=self.config.dataset.classes,
            inference=self.config.inference,
        )
        checkpoint.save(folder / "model")
        safetensors.torch.save_file(_optimiser_state(self.optimiser), folder / OPTIMISER_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps({"epoch": epoch, "step": epoch * self.loader.steps}))

    def train_epoch(self, epoch: int) -> EpochResult:
        """All steps of one epoch."""
        self.model.train()
        start, total, rate = time.perf_counter(), torch.zeros(()), 0.0
        for step, (images, masks) in enumerate(self._with_progress(epoch)):
            rate = self._rate(epoch * self.loader.steps + step)
            total += self._step(images.to(self.device), masks.to(self.device), rate)
        seconds = time.perf_counter() - start
        return EpochResult(loss=float(total) / self.loader.steps, rate=rate, seconds=seconds)

    def _rate(self, step: int) -> float:
        steps = self.config.epochs * self.loader.steps
        return self.config.rate * poly(step, steps=steps, warmup=self.config.warmup)

    def _step(self, images: Tensor, masks: Tensor, rate: float) -> Tensor:
        """Forward, loss, backward and update on one batch; returns the loss."""
        set_learning_rate(self.optimiser, rate)
        with autocast(self.device, gradients=True):
            logits = self.parallel(images)
        loss = pspnet_loss(logits, masks, ignore=self.config.augment.ignore, weight=self.weights)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach().cpu()

    def validate(self) -> ConfusionMatrix:
        """Confusion matrix of the whole validation split, on every worker."""
        self.model.eval()
        if self.shard.world > 1:
            # Each worker's BatchNorm has seen other images; what is scored must be what the first worker saves.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        pairs = self.config.val[self.shard.rank :: self.shard.world]
        confusion = score(self.segmenter, self.config.dataset, pairs)
        if self.shard.world > 1:
            counts = torch.from_numpy(confusion.counts).to(self.device)
            torch.distributed.all_reduce(counts)
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
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[device.index], gradient_as_bucket_view=True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named ``<parameter index>.<what>``."""
    state = optimiser.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for index, values in state.items()
        for key, value in values.items()
        if value is not None
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
