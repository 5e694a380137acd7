"""Training: ``TrainConfig`` in, a registered model out. The driver's side; a worker's side is ``training_loop.py``.

Layout -> checked pairs -> ``TorchTrainer`` over the workers -> per-epoch metrics and checkpoints through ``report`` ->
the best checkpoint logged and registered in MLflow.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
import ray
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from pipelines import tracking
from pipelines.cluster import WorkerRange, ray_session, share
from pipelines.datasets import Dataset, class_pixels, open_dataset
from pipelines.storage import Store, open_store
from pipelines.training_loop import LoopConfig, train_loop
from pspnet_core.checkpoints import check_name
from pspnet_core.errors import ConfigError, PspnetError
from pspnet_core.inference import InferenceSettings
from pspnet_core.losses import LossConfig
from pspnet_core.norms import check_norm
from pspnet_core.optim import OPTIMISERS
from pspnet_core.pspnet import PSPNetConfig
from pspnet_core.transforms import AugmentConfig

log = logging.getLogger(__name__)
# The first start on a busy small machine takes longer than Ray's 60 s: imports of torch compete for the CPUs.
START_TIMEOUT_S = "600"


class TrainingFailed(PspnetError):
    """The training run ended with an error that retries did not cure."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a PSPNet on labelled images and register it in MLflow."""

    data: str
    """Labelled images: a local folder or a URI (s3://...)."""
    output: str
    """Where checkpoints go: a local folder or a URI. One folder per --name."""
    layout: str = "folder"
    """How the data is laid out; a row of LAYOUTS."""
    train: str = "train"
    """Split to learn from."""
    val: str = "val"
    """Split to score after each epoch."""
    name: str = "pspnet"
    """Name of the run and of the registered model."""
    epochs: int = 100
    """Passes over the training split."""
    workers: str = "1"
    """Data-parallel workers: N, or MIN:MAX for as many as the cluster has room for at the start."""
    gpus: float | None = None
    """GPUs per worker; by default 1 when the cluster has any."""
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101 or resnet152."""
    stem: str = "plain"
    """First layers of the backbone: plain (one 7x7), deep (three 3x3) or deep32 (three 3x3, narrower)."""
    stride: int = 8
    """Output stride of the backbone: 8 (the paper's), 16 or 32."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Grid sizes of the pyramid; none may exceed the feature map of the crop (crop / stride)."""
    crop: int = 473
    """Side of the square training crop, in pixels."""
    resize: float = 1.0
    """Factor on the images' size, in training and in inference alike: 0.5 works at half resolution."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale in training."""
    cap: float = 0.75
    """Largest share of a crop's labelled pixels that one class may have, as far as ten tries find such a crop."""
    photometric: float = 0.0
    """Share of crops whose brightness, contrast, saturation and hue are changed."""
    batch: int = 16
    """Images per step over all workers together."""
    accumulate: int = 1
    """Passes in which each worker takes its part of the batch: 2 halves the memory and leaves the step as it is."""
    norm: str = "auto"
    """BatchNorm in training: batch (each worker's own images), sync (all workers' images; GPUs only), auto (sync on
    several GPUs, else batch) or frozen (the statistics of --init; allows 1 image per worker)."""
    optimiser: str = "sgd"
    """sgd (the paper's) or adamw."""
    rate: float = 0.01
    """Base learning rate of the backbone; it falls by the poly rule (power 0.9)."""
    head: float = 10.0
    """Factor on the learning rate of all layers but the backbone."""
    decay: float = 1e-4
    """Weight decay of the convolutions; norms and biases have none."""
    warmup: int = 0
    """Steps over which the learning rate rises to its base."""
    clip: float = 0.0
    """Largest norm of the gradient of all weights together; 0 for no limit."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then scored and saved; 0 for none."""
    loss: str = "cross_entropy"
    """cross_entropy, ohem (cross-entropy of the hard pixels), focal, dice or lovasz."""
    smoothing: float = 0.0
    """Label smoothing of cross_entropy and ohem: share of the label that is spread over all classes."""
    threshold: float = 0.7
    """ohem: a pixel is hard when its class has a probability below this."""
    kept: int = 100_000
    """ohem: pixels of one pass of a worker that are kept at least, the hardest ones."""
    gamma: float = 2.0
    """focal: how much easy pixels are played down; 0 gives cross-entropy."""
    auxiliary: float = 0.4
    """Weight of the auxiliary loss; 0 leaves out the auxiliary head."""
    balance: float = 0.0
    """Weight of rare classes in the loss: frequency to the power of minus this; 0 weighs all alike."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    init: str | None = None
    """Start from these weights: a checkpoint (any model URI), or ImageNet backbone weights (.pth, .safetensors)."""
    resume: bool = False
    """Go on with the run of this --name in --output from its newest checkpoint."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for field in ("epochs", "crop", "batch", "accumulate", "rate", "resize", "head"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(field, getattr(self, field), "give a positive number")
        for field in ("decay", "balance", "warmup", "clip"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(field, getattr(self, field), "give a number of at least 0")
        if not 0 <= self.ema < 1:
            raise ConfigError("ema", self.ema, "give a decay such as 0.999, or 0 for none")
        if self.stride not in (8, 16, 32):
            raise ConfigError("stride", self.stride, "choose 8, 16 or 32")
        if self.optimiser not in OPTIMISERS:
            raise ConfigError("optimiser", self.optimiser, f"choose one of {', '.join(OPTIMISERS)}")
        check_norm(self.norm)
        # The parts check their own settings: here, where no data has been read yet.
        self.loss_config()
        self.augmentation(self.network(classes=2), ignore=255)
        self._check_bins()
        if not self.worker_counts():
            least = "at least 2 images for BatchNorm in each pass of a worker, or --norm frozen"
            raise ConfigError("batch", self.batch, f"give a multiple of the workers times --accumulate, with {least}")

    def _check_bins(self) -> None:
        cells = math.ceil(self.crop / self.stride)
        if max(self.bins) > cells:
            remedy = f"the feature map of --crop {self.crop} at --stride {self.stride} has {cells}x{cells} cells"
            raise ConfigError("bins", ",".join(map(str, self.bins)), f"{remedy}; give smaller bins or a larger crop")

    def worker_counts(self) -> list[int]:
        """Numbers of workers in the range that share the batch evenly, the largest first."""
        workers = WorkerRange.parse(self.workers)
        return [count for count in range(workers.high, workers.low - 1, -1) if self._suits(count)]

    def _suits(self, workers: int) -> bool:
        """Whether so many workers get the same number of images in each pass, and BatchNorm enough of them."""
        images, rest = divmod(self.batch, workers * self.accumulate)
        together = images * workers if self.norm == "sync" else images
        return rest == 0 and together >= (1 if self.norm == "frozen" else 2)

    def network(self, classes: int) -> PSPNetConfig:
        """The network for this many classes."""
        return PSPNetConfig(
            classes=classes,
            backbone=self.backbone,
            stem=self.stem,  # type: ignore[arg-type]
            output_stride=self.stride,  # type: ignore[arg-type]
            bins=self.bins,
            auxiliary=self.auxiliary > 0,
        )

    def loss_config(self) -> LossConfig:
        """The loss and its settings."""
        return LossConfig(
            kind=self.loss,
            smoothing=self.smoothing,
            threshold=self.threshold,
            kept=self.kept,
            gamma=self.gamma,
            auxiliary=self.auxiliary,
        )

    def augmentation(self, network: PSPNetConfig, ignore: int) -> AugmentConfig:
        """How a training crop is made; its padding is the network's mean colour and the ignore id."""
        red, green, blue = network.mean
        return AugmentConfig(
            crop=(self.crop, self.crop),
            base=self.resize,
            scale=self.scale,
            cap=self.cap,
            photometric=self.photometric,
            mean=(red, green, blue),
            ignore=ignore,
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training.

    Returns:
        ``run_id``, ``model`` (``models:/name/version``), ``metrics`` (``miou``, ``macc``, ``aacc`` of the best epoch),
        ``images_per_second``, ``epoch`` (the best one) and ``checkpoint`` (URI of its folder).

    Raises:
        ConfigError: a mistake in the config or the data, found before the first step.
        TrainingFailed: the workers kept failing.
    """
    dataset = open_dataset(config.data, config.layout)
    loop = loop_config(config, dataset)
    output = open_store(config.output, field="output")
    with ray_session():
        scaling = _scaling(config)
        check_norm(config.norm, gpu=bool(scaling.use_gpu))
        output.check_writable_atomically()
        run = tracking.start_run("pspnet-training", config.name)
        try:
            _check_output(config, output, dataset)
            run.log_params(dataclasses.asdict(config))
            result = _fit(config, loop, scaling, output, run)
            summary = _publish(config, result, output, run)
        except BaseException:
            run.finish("FAILED")
            raise
        run.finish("FINISHED")
    return summary


def loop_config(config: TrainConfig, dataset: Dataset) -> LoopConfig:
    """Check the data and gather what a worker needs."""
    pairs = dataset.split(config.train)
    if len(pairs) < config.batch:
        raise ConfigError(
            "batch", config.batch, f"the {config.train} split has {len(pairs)} images; give a smaller batch"
        )
    log.info("checking %d training masks", len(pairs))
    pixels = class_pixels(dataset, pairs)
    class_pixels(dataset, dataset.split(config.val))
    network = config.network(len(dataset.classes))
    if config.norm == "frozen" and not config.init:
        log.warning("norm=frozen without --init: a fresh network's statistics (mean 0, variance 1) normalise nothing")
    resized = InferenceSettings(resize="scale", size=config.resize) if config.resize != 1 else InferenceSettings()
    return LoopConfig(
        dataset=dataset,
        train=pairs,
        val=dataset.split(config.val),
        network=network,
        loss=config.loss_config(),
        inference=resized,
        augment=config.augmentation(network, dataset.classes.ignore),
        init=tracking.load_weights(config.init, network) if config.init else None,
        pixels=tuple(int(count) for count in pixels),
        progress=sys.stderr.isatty(),
        **{key: getattr(config, key) for key in _PASSED_ON},
    )


_PASSED_ON = (
    *("name", "epochs", "batch", "accumulate", "norm", "seed"),
    *("optimiser", "rate", "head", "decay", "warmup", "clip", "ema", "balance"),
)


def _check_output(config: TrainConfig, output: Store, dataset: Dataset) -> None:
    """Refuse to mix two runs in one folder; remember this one's shape so that a resume can be compared with it.

    Compared is what the saved state depends on: data and network, and what is kept of optimiser and average.
    """
    shape = {key: getattr(config, key) for key in ("backbone", "stem", "stride", "layout", "optimiser", "ema")}
    shape |= {"bins": list(config.bins), "auxiliary": "on" if config.auxiliary else "off"}
    shape |= {"data": dataset.store.root, "classes": len(dataset.classes)}
    record = f"{config.name}/config.json"
    created = output.put_if_absent(record, json.dumps(shape, indent=1).encode())
    if created:
        return
    if not config.resume:
        remedy = "add --resume to go on with it, or choose another --name or --output"
        raise ConfigError("output", output.uri_of(config.name), f"holds a run already; {remedy}")
    before = json.loads(output.read(record))
    for key, value in shape.items():
        if before.get(key) != value:
            raise ConfigError(key, value, f"the run to resume has {before.get(key)}; give that, or another --name")


def _scaling(config: TrainConfig) -> ScalingConfig:
    """As many workers of the range as get a CPU (and a GPU) of their own; the smallest number if need be with less."""
    available = ray.cluster_resources()
    counts = config.worker_counts()
    most = available.get("GPU", 0.0) / (config.gpus or 1) if available.get("GPU") else available.get("CPU", 0.0)
    workers = next((count for count in counts if count <= most), counts[-1])
    part = share(workers, config.gpus, reserve=0.0, resources=available)
    resources = {"CPU": part.cpus} | ({"GPU": part.gpus} if part.gpus else {})
    return ScalingConfig(num_workers=workers, use_gpu=part.gpus > 0, resources_per_worker=resources)


def _fit(config: TrainConfig, loop: LoopConfig, scaling: ScalingConfig, output: Store, run: tracking.Run) -> Result:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"loop": loop},
        scaling_config=scaling,
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as Train V1, which V2 replaces at import
            name=config.name,
            storage_path=output.path_of(""),
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(output.filesystem)),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="miou"),
            callbacks=[EpochLogger(run)],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(f"training failed: {_cause(error)}") from error


def _cause(error: ray.train.TrainingFailedError) -> str:
    """The first worker's own words."""
    failures = getattr(error, "worker_failures", None) or {}
    return " ".join(str(next(iter(failures.values()), error)).strip().splitlines()[-1:])


def _publish(config: TrainConfig, result: Result, output: Store, run: tracking.Run) -> dict[str, Any]:
    """Log and register the best checkpoint."""
    best = max(result.best_checkpoints or [], key=lambda entry: float(entry[1]["miou"]), default=None)
    if best is None:
        raise TrainingFailed("training ended without a checkpoint")
    checkpoint, metrics = best
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.to_directory(folder)
        model = run.log_model(Path(folder) / "model", config.name)
    return {
        "run_id": run.run_id,
        "model": model,
        "metrics": {key: metrics[key] for key in ("miou", "macc", "aacc")},
        "images_per_second": metrics["images_per_second"],
        "epoch": metrics["epoch"],
        "checkpoint": output.uri_of(f"{config.name}/{PurePosixPath(checkpoint.path).name}/model"),
    }


class EpochLogger(UserCallback):
    """Logs the metrics of each epoch to MLflow and to the log, from Ray Train's controller process."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called with every worker's metrics; the first worker's are the totals."""
        total = metrics[0]
        numbers = {key: float(value) for key, value in total.items() if isinstance(value, int | float)}
        try:
            self.run.log_metrics(numbers, step=int(total["epoch"]))
        except tracking.TrackingError as error:
            # Training outlives a tracking server that is away for a while.
            print(f"epoch {total['epoch']} was not logged: {error}", flush=True)
        shown = "  ".join(f"{key} {numbers[key]:.4g}" for key in ("loss", "miou", "aacc", "images_per_second"))
        print(f"epoch {total['epoch']}  {shown}", flush=True)
