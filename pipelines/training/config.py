"""``TrainConfig``: the settings of a training run as a tree of parts.

The parts of a worker's step are here; the others are beside what they configure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from pipelines.cluster.resources import WorkerRange
from pipelines.datasets.layouts import DataConfig
from pipelines.process.config_tree import check_below_1, check_not_negative, check_positive
from pipelines.training.checkpointing import CheckpointConfig
from pipelines.training.initial_weights import NetworkConfig
from pipelines.training.loading import AugmentationConfig
from pipelines.training.scaling import ScalingConfig
from pspnet_core.checkpoints.checkpoint import check_name
from pspnet_core.device import training_dtype
from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNetConfig
from pspnet_core.training.losses import LossConfig
from pspnet_core.training.norms import check_norm
from pspnet_core.training.optim import OPTIMISERS


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
        """The part of a range of workers for which the batch is large enough.

        Raises:
            ConfigError: when there are none.
        """
        # BatchNorm learns nothing from one image.
        alone = 1 if self.norm in ("frozen", "sync") else 2
        most = self.batch // (alone * self.accumulate)
        if self.norm == "sync" and self.batch < 2 * self.accumulate:
            most = 0
        if most < wanted.low:
            least = "at least 2 images for BatchNorm in each pass of a worker, or --norm frozen"
            raise ConfigError("batch", self.batch, f"too small for {wanted.low} workers: give {least}")
        return WorkerRange(low=wanted.low, high=min(wanted.high, most))


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """The optimiser, its learning rates, and the moving average of the weights."""

    kind: str = "sgd"
    """sgd (the paper's) or adamw."""
    lr: float = 0.01
    """Base learning rate of the backbone; it falls by the poly rule."""
    head_lr_factor: float = 10.0
    """Factor on the learning rate of all layers but the backbone."""
    momentum: float = 0.9
    """Momentum of sgd; of adamw the decay of the first moment."""
    weight_decay: float = 1e-4
    """Weight decay of the convolutions; norms and biases have none."""
    grad_clip: float = 0.0
    """Largest norm of the gradient of all weights together; 0 for no limit."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then scored and saved; 0 for none."""

    def __post_init__(self) -> None:
        if self.kind not in OPTIMISERS:
            raise ConfigError("optimiser", self.kind, f"choose one of {', '.join(OPTIMISERS)}")
        check_positive(lr=self.lr, head_lr_factor=self.head_lr_factor)
        check_not_negative(weight_decay=self.weight_decay, grad_clip=self.grad_clip)
        check_below_1(momentum=self.momentum)
        if not 0 <= self.ema < 1:
            raise ConfigError("ema", self.ema, "give a decay such as 0.999, or 0 for none")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of a run and the curve of its learning rate."""

    epochs: int = 100
    """Passes over the training split."""
    power: float = 0.9
    """Exponent of the poly rule: (1 - step / steps) to this power."""
    warmup: int = 0
    """Steps over which the learning rate rises to its base."""

    def __post_init__(self) -> None:
        check_positive(epochs=self.epochs, power=self.power)
        check_not_negative(warmup=self.warmup)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a PSPNet on labelled images and register it in MLflow."""

    dataset: DataConfig
    train: str = "train"
    """Split to learn from."""
    val: str = "val"
    """Split to score, see --val-every."""
    output: str
    """Where checkpoints go: a local folder or a URI. One folder per --name."""
    name: str = "pspnet"
    """Name of the run and of the registered model."""
    resume: bool = False
    """Go on with the run of this --name in --output from its newest checkpoint."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
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
        """The part of ``--workers`` for which the batch is large enough."""
        return self.step.feasible(WorkerRange.parse(self.scaling.workers))

    def settled(self, network: PSPNetConfig) -> TrainConfig:
        """The same config with the network's flags filled in."""
        return replace(self, network=self.network.settled(network))

    def _check_bins(self, network: PSPNetConfig) -> None:
        stride, crop = network.output_stride, self.augmentation.crop
        cells = math.ceil(crop / stride)
        if max(network.bins) > cells:
            remedy = f"the feature map of --crop {crop} at --output-stride {stride} has {cells}x{cells} cells"
            raise ConfigError("bins", ",".join(map(str, network.bins)), f"{remedy}; give smaller bins or a larger crop")
