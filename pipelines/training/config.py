"""``TrainConfig``: the settings of a training run as a tree of parts.

The parts of a worker's step are here; the others are beside what they configure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from pipelines.cluster.resources import WorkerRange
from pipelines.datasets.layouts import DataConfig
from pipelines.training.checkpointing import CheckpointConfig
from pipelines.training.initial_weights import NetworkConfig
from pipelines.training.scaling import ScalingConfig
from pspnet_core.checkpoints.checkpoint import check_name
from pspnet_core.device import training_dtype
from pspnet_core.errors import check, check_not_negative, check_positive
from pspnet_core.network.pspnet import PSPNetConfig
from pspnet_core.training.augment import AugmentConfig
from pspnet_core.training.losses import LossConfig
from pspnet_core.training.norms import check_norm
from pspnet_core.training.optim import OptimiserConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Batch, normalisation and number format of a training step."""

    batch: int = 16
    """Images per step over all workers together."""
    accumulate: int = 1
    """Passes in which each worker takes its part of the batch: 2 halves the memory and leaves the step as it is."""
    class_balance: float = 0.0
    """Weight of rare classes in the loss: frequency to the power of minus this; 0 weighs all alike."""
    norm: str = "auto"
    """BatchNorm in training: batch (each worker's own images), sync (all workers' images; GPUs only), auto (sync on
    several GPUs, else batch) or frozen (the statistics of --init; allows 1 image per worker)."""
    precision: str = "auto"
    """Number format of the convolutions: float32, bfloat16, float16 (with loss scaling), or auto: the fastest there."""
    deterministic: bool = False
    """The same weights from the same command, to the last bit; slower on GPUs."""
    compile: bool = False
    """Whether the network is compiled, which takes minutes at the start: for long runs on GPUs."""

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, accumulate=self.accumulate)
        check_not_negative(class_balance=self.class_balance)
        check_norm(self.norm)
        training_dtype(torch.device("cpu"), self.precision)

    def feasible(self, wanted: WorkerRange) -> WorkerRange:
        """Narrow a range of workers to those for which the batch is large enough.

        Raises:
            ConfigError: when there are none.
        """
        # BatchNorm learns nothing from one image.
        alone = 1 if self.norm in ("frozen", "sync") else 2
        most = self.batch // (alone * self.accumulate)
        if self.norm == "sync" and self.batch < 2 * self.accumulate:
            most = 0
        least = "at least 2 images for BatchNorm in each pass of a worker, or --norm frozen"
        check(most >= wanted.low, "batch", self.batch, f"too small for {wanted.low} workers: give {least}")
        return WorkerRange(low=wanted.low, high=min(wanted.high, most))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a PSPNet on labelled images and register it in MLflow."""

    dataset: DataConfig
    train: str = "train"
    """Split to learn from."""
    val: str = "val"
    """Split to score, see --val-every."""
    absent_classes: bool = False
    """Train although some classes have no pixel in either split."""
    output: str
    """Where checkpoints go: a local folder or a URI. One folder per --name."""
    name: str = "pspnet"
    """Name of the run and of the registered model."""
    resume: bool = False
    """Go on with the run of this --name in --output from its newest checkpoint."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    step: StepConfig = field(default_factory=StepConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        network = self.network.resolve(classes=2, auxiliary=self.auxiliary)
        if self.network.init is None or (self.network.output_stride and self.network.bins):  # else --init tells them
            self._check_bins(network)
        self.workers()

    @property
    def auxiliary(self) -> bool:
        """Whether the network has an auxiliary head."""
        return self.loss.aux_weight > 0

    def workers(self) -> WorkerRange:
        """Narrow ``--workers`` to those for which the batch is large enough."""
        return self.step.feasible(WorkerRange.parse(self.scaling.workers))

    def _check_bins(self, network: PSPNetConfig) -> None:
        stride, crop = network.output_stride, self.augmentation.crop
        cells = math.ceil(crop / stride)
        bins, size = ",".join(map(str, network.bins)), f"--crop {crop} at --output-stride {stride} has {cells}x{cells}"
        remedy = f"the feature map of {size} cells; give smaller bins or a larger crop"
        check(max(network.bins) <= cells, "bins", bins, remedy)
