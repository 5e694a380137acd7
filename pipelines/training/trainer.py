"""``Trainer``: the model of one training worker, and the step that it takes with the others.

One step, as in the paper: preprocess -> (initialised once) -> forward -> loss -> backward and update -> repeat.

A step takes one batch, spread over the workers and, to save memory, over several passes of each. Its loss is the mean
over the pixels that count in all of them together, however unevenly the ignored ones are spread.

Everything that chance decides (order, augmentation, dropout) is drawn from the seed and the number of the step, so a
resumed run takes the same steps as an undisturbed one.

Shapes: ``b`` images of one worker's part of the batch, ``h w`` pixels of the crop.
"""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.evaluation.scoring import BATCH, chunked, score
from pipelines.tracking.metric_names import class_metric_names
from pipelines.training.checkpointing import RunProgress, Snapshot
from pipelines.training.loading import Batch, Rank
from pipelines.training.setup import Setup
from pspnet_core.checkpoints.checkpoint import Checkpoint, cpu_state_dict
from pspnet_core.device import autocast, make_deterministic, place, training_dtype, training_layout
from pspnet_core.errors import PspnetError
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import ConfusionMatrix
from pspnet_core.network.pspnet import PSPNet
from pspnet_core.training.ema import WeightAverage
from pspnet_core.training.losses import class_weights, pspnet_loss, valid_weight
from pspnet_core.training.norms import set_norm
from pspnet_core.training.optim import build_optimiser, load_optimiser_state, optimiser_state, poly, set_lr


class NotFinite(PspnetError):
    """Loss, gradient or weights are NaN or infinite; what was saved before is whole."""


class Trainer:
    """A worker's model and optimiser, and the steps that they take. Holds no connection; ``Record`` does.

    Attributes:
        steps_done: steps since the start of the run.
        loss: of the last step, over all workers.
        losses: sum of the losses of the epoch so far.
    """

    def __init__(self, setup: Setup, rank: Rank, device: torch.device) -> None:
        config, step, optimiser = setup.config, setup.config.step, setup.config.optimiser
        if step.deterministic:
            make_deterministic()
        torch.manual_seed(config.seed)
        self.setup, self.rank, self.device = setup, rank, device
        self.steps_done, self.loss, self.losses = 0, math.nan, 0.0
        self.model = PSPNet(setup.network)
        if setup.init is not None:
            self.model.load_state_dict(setup.init)
        place(self.model, device)
        set_norm(self.model, step.norm, workers=rank.world, device=device)
        self.average = WeightAverage(self.model, optimiser.ema) if optimiser.ema else None
        if step.compile:
            self.model.compile()
        self.parallel = _parallel(self.model, rank, device, deterministic=step.deterministic)
        self.optimiser = build_optimiser(self.model, optimiser)
        self.dtype = training_dtype(device, step.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.ignore = setup.dataset.classes.ignore
        balance = config.step.class_balance
        self.weights = class_weights(torch.tensor(setup.pixels), power=balance).to(device) if balance else None

    def restore(self, snapshot: Snapshot) -> None:
        """Take up the state of a checkpoint."""
        raw = snapshot.weights if snapshot.weights is not None else snapshot.model.weights
        self.model.load_state_dict(raw)
        if self.average:
            self.average.model.load_state_dict(snapshot.model.weights)
        load_optimiser_state(self.optimiser, self.model, snapshot.optimiser)
        if snapshot.progress.scaler:
            self.scaler.load_state_dict(snapshot.progress.scaler)
        self.steps_done, self.losses = snapshot.progress.step, snapshot.progress.loss

    def snapshot(self, *, model: Checkpoint, metrics: Mapping[str, float] | None = None) -> Snapshot:
        """Copy the state to CPU memory; ``metrics`` where an epoch has just ended."""
        return Snapshot(
            model=model,
            weights=cpu_state_dict(self.model) if self.average else None,
            optimiser=optimiser_state(self.optimiser, self.model),
            progress=RunProgress(
                step=self.steps_done,
                workers=self.rank.world,
                loss=self.losses,
                scaler=self.scaler.state_dict(),
                metrics=dict(metrics or {}),
                averaged=bool(self.average),
            ),
        )

    @property
    def lr(self) -> float:
        """Learning rate of the backbone in the next step."""
        config = self.setup.config
        return config.optimiser.lr * poly(self.steps_done, self.setup.steps, config.schedule)

    def train_step(self, batch: Batch) -> None:
        """Take the next step of the run with this worker's part of its batch.

        Raises:
            NotFinite: names the step and the images of all workers; that of a checkpoint also when it has spoilt them.
        """
        if self.steps_done % self.setup.crops.steps == 0:
            self.losses = 0.0
        self.model.train()
        # Dropout: other on each worker, and what it was before where a step is taken again.
        seeds = np.random.SeedSequence((self.setup.config.seed, self.steps_done, self.rank.index))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        images = batch.images.to(self.device, memory_format=training_layout(self.device))
        try:
            self.loss = float(self.step(images, batch.masks.to(self.device).long(), self.lr))
            if self.average:
                self.average.update(self.model, self.steps_done)
            if self.setup.saves(self.steps_done + 1):
                self._check_state()
        except NotFinite as error:
            keys = ", ".join(self.setup.crops.keys(self.steps_done))
            raise NotFinite(f"{error} at step {self.steps_done + 1} on images {keys}") from error
        self.losses += self.loss
        self.steps_done += 1

    def step(self, images: Tensor, masks: Tensor, lr: float) -> Tensor:
        """Take one step on one batch: forward (the network preprocesses its input itself), loss, backward and update.

        Args:
            images: ``(b, 3, h, w)`` uint8 RGB, this worker's part of the batch.
            masks: ``(b, h, w)`` int64 class ids.
            lr: learning rate of the backbone.

        Returns:
            The loss of the batch, over all workers.

        Raises:
            NotFinite: before anything is changed.
        """
        set_lr(self.optimiser, lr)
        self.optimiser.zero_grad(set_to_none=True)
        passes = self.setup.config.step.accumulate
        parts = list(zip(images.tensor_split(passes), masks.tensor_split(passes), strict=True))
        shares = self._shares([targets for _, targets in parts])
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(parts):
            with self._sync_gradients(last=number == len(parts) - 1):
                with autocast(self.device, self.dtype):
                    logits = self.parallel(inputs)
                loss = shares[number] * pspnet_loss(
                    logits, targets, config=self.setup.config.loss, ignore=self.ignore, weight=self.weights
                )
                # DDP takes the mean of the workers' gradients; the shares are made for their sum.
                self.scaler.scale(loss * self.rank.world).backward()
            total += loss.detach()
        self._sum_over_workers(total)
        self.scaler.unscale_(self.optimiser)
        self._check_step(total, self._clip_gradient())
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return total

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient; return its norm before that, over all weights together, the same on all workers."""
        norm: Tensor
        if limit := self.setup.config.optimiser.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        else:  # not by clipping to infinity, which writes every gradient once more
            slopes = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(slope) for slope in slopes]))
        return norm

    def _check_step(self, loss: Tensor, norm: Tensor) -> None:
        """Stop before an update that would spoil the weights; both values travel from the device at once."""
        value, length = torch.stack([loss, norm]).tolist()
        if not math.isfinite(value):
            raise NotFinite(f"the loss is {value}")
        # The loss scaling of float16 skips such a step and reduces the scale.
        if not math.isfinite(length) and not self.scaler.is_enabled():
            raise NotFinite(f"the norm of the gradient is {length}")

    def _check_state(self) -> None:
        """Stop all workers before a checkpoint whose values are not finite on one of them.

        Each worker has its own statistics, which overflow in a forward pass whose loss and gradient may be finite;
        weights overflow in an update.
        """
        models = [self.model, self.average.model] if self.average else [self.model]
        state = [tensor for model in models for tensor in model.state_dict().values() if tensor.is_floating_point()]
        spoilt = torch.stack([~torch.isfinite(tensor).all() for tensor in state]).sum()
        if self._sum_over_workers(spoilt):
            raise NotFinite("weights or statistics of BatchNorm are not finite")

    def _shares(self, masks: Sequence[Tensor]) -> Tensor:
        """Weigh this worker's passes in the step's loss; the shares of all workers add up to 1."""
        counts = torch.stack([valid_weight(mask, ignore=self.ignore, weight=self.weights) for mask in masks])
        total = self._sum_over_workers(counts.sum())
        return (counts / torch.where(total > 0, total, 1)).float()

    def _sum_over_workers(self, value: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place."""
        if self.rank.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def _sync_gradients(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Send gradients between the workers once a step, with the last pass."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def current_model(self) -> Checkpoint:
        """Copy this worker's model as it is scored and saved: the averaged weights if there are any."""
        return Checkpoint.from_model(
            self.average.model if self.average else self.model,
            name=self.setup.config.name,
            classes=self.setup.dataset.classes,
            settings=self.setup.inference,
        )

    def scored_model(self) -> Checkpoint:
        """Copy ``current_model`` of the first worker to every worker: each one's BatchNorm has seen other images."""
        if self.rank.world > 1:
            for buffer in (self.average.model if self.average else self.model).buffers():
                torch.distributed.broadcast(buffer, src=0)
        return self.current_model()

    def segmenter(self, model: Checkpoint) -> Segmenter:
        """Build a ``Segmenter`` of a model on this worker's device, with evaluation's batches."""
        return Segmenter(model.model, self.setup.inference, device=self.device, batch=BATCH)

    def validate(self, segmenter: Segmenter) -> ConfusionMatrix:
        """Score the whole validation split; every worker gets all counts."""
        chunks = chunked(self.setup.val)[self.rank.index :: self.rank.world]
        confusion = score(segmenter, self.setup.dataset, list(itertools.chain.from_iterable(chunks)))
        counts = self._sum_over_workers(torch.from_numpy(confusion.counts).to(self.device))
        confusion.counts[:] = counts.cpu().numpy()
        return confusion

    def epoch_metrics(self, confusion: ConfusionMatrix) -> dict[str, float]:
        """Metrics of the epoch that has just ended; ``iou/<class name>`` for each class that was there."""
        names = class_metric_names("iou", self.setup.dataset.classes.names)
        iou = {name: value for name, value in zip(names, confusion.iou().tolist(), strict=True) if np.isfinite(value)}
        return {
            "epoch": self.steps_done // self.setup.crops.steps,
            "loss": self.losses / self.setup.crops.steps,
            "workers": self.rank.world,
            "miou": confusion.miou,
            "macc": confusion.macc,
            "aacc": confusion.aacc,
        } | iou


def _parallel(model: PSPNet, rank: Rank, device: torch.device, *, deterministic: bool) -> torch.nn.Module:
    """Wrap the model so that its gradients are averaged over the workers."""
    if rank.world == 1:
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
