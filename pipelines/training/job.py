"""Training: ``TrainConfig`` in, a registered model out. The driver's side; a worker's side is ``training_loop.py``.

Layout -> checked pairs -> ``TorchTrainer`` over the workers -> metrics and checkpoints by the first worker -> the best
checkpoint logged and registered in MLflow.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from pipelines.cluster.resources import Share, WorkerRange, share
from pipelines.cluster.session import ray_session
from pipelines.datasets.data_card import DataCard, check
from pipelines.datasets.dataset import Dataset, LayoutOptions
from pipelines.datasets.layouts import open_dataset
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate
from pipelines.storage import Store, open_store, to_local
from pipelines.tracking import registry
from pipelines.tracking.runs import Run, resume_run, start_run
from pipelines.training.checkpointing import CheckpointFolder, best
from pipelines.training.initial_weights import Start, read_start
from pipelines.training.loading import TASK_CPUS, Crops
from pipelines.training.loop import LoopConfig, train_loop
from pipelines.training.patience import patient
from pspnet_core.checkpoints.checkpoint import Checkpoint, check_name
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.device import training_dtype
from pspnet_core.errors import ConfigError, PspnetError
from pspnet_core.network.pspnet import PSPNetConfig
from pspnet_core.training.augment import AugmentConfig
from pspnet_core.training.losses import LossConfig
from pspnet_core.training.norms import check_norm
from pspnet_core.training.optim import OPTIMISERS

log = logging.getLogger(__name__)
_POSITIVE = ["epochs", "crop", "batch", "accumulate", "rate", "power", "resize", "head", "validate", "keep", "grow"]
# How long workers wait for room: until the nodes of an autoscaler are up; but where fewer workers will do, only until
# the cluster knows that a node is gone.
START_TIMEOUT_S, ELASTIC_START_TIMEOUT_S = "600", "30"
EXPERIMENT = "pspnet-training"
FEEDS = ("auto", "threads", "ray")
FEED_RESERVE = 0.2
"""Share of the CPUs that is left to Ray Data where it makes the crops."""


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
    """Split to score, see --validate."""
    name: str = "pspnet"
    """Name of the run and of the registered model."""
    epochs: int = 100
    """Passes over the training split."""
    workers: str = "1"
    """Data-parallel workers: N, or MIN:MAX for as many as the cluster has room for, which may change meanwhile."""
    gpus: float | None = None
    """GPUs per worker; by default 1 when the cluster has any."""
    backbone: str | None = None
    """resnet18, resnet34, resnet50, resnet101 or resnet152; by default that of --init, else resnet50."""
    stem: str | None = None
    """First layers of the backbone: plain (one 7x7), deep (three 3x3) or deep32 (three 3x3, narrower); by default those
    of --init, else plain."""
    stride: int | None = None
    """Output stride of the backbone: 8 (the paper's), 16 or 32; by default that of the PSPNet of --init, else 8."""
    bins: tuple[int, ...] | None = None
    """Grid sizes of the pyramid, none above the feature map of the crop (crop / stride); by default those of the PSPNet
    of --init, else 1,2,3,6."""
    crop: int = 473
    """Side of the square training crop, in pixels."""
    resize: float = 1.0
    """Factor on the images' size, in training and in inference alike: 0.5 works at half resolution."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale in training."""
    rotate: float = 10.0
    """Largest rotation in training either way, in degrees; half the crops are rotated."""
    blur: float = 0.5
    """Share of blurred crops."""
    mirror: float = 0.5
    """Share of mirrored crops."""
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
    momentum: float = 0.9
    """Momentum of sgd; of adamw the decay of the first moment."""
    rate: float = 0.01
    """Base learning rate of the backbone; it falls by the poly rule."""
    power: float = 0.9
    """Exponent of the poly rule: (1 - step / steps) to this power."""
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
    dropout: float = 0.1
    """Share of channels that are dropped before the classifier in training."""
    balance: float = 0.0
    """Weight of rare classes in the loss: frequency to the power of minus this; 0 weighs all alike."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    init: str | None = None
    """Start from these weights: a checkpoint (any model URI), or ImageNet backbone weights (.pth, .safetensors)."""
    resume: bool = False
    """Go on with the run of this --name in --output from its newest checkpoint."""
    every: int = 0
    """Steps between checkpoints, besides the one after each validation; 0 for none."""
    validate: int = 1
    """Epochs between validations; one follows the last epoch in any case."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best one."""
    failures: int = 10
    """How often the run outlives the death of workers or their nodes before it gives up."""
    grow: float = 60.0
    """Seconds between looks for room for more workers, with --workers MIN:MAX."""
    precision: str = "auto"
    """Number format of the convolutions: float32, bfloat16, float16 (with loss scaling), or auto: the fastest there."""
    deterministic: bool = False
    """The same weights from the same command, to the last bit; slower on GPUs."""
    compile: bool = False
    """Whether the network is compiled, which takes minutes at the start: for long runs on GPUs."""
    feed: str = "auto"
    """What makes the crops: threads (of each worker), ray (Ray Data on all CPUs of the cluster), or auto: ray where the
    workers have GPUs."""
    confidence: float = 0.9
    """Layout labels: pixels of a class whose mean confidence in an image is lower are ignored."""
    holdout: float = 0.1
    """Layout labels: share of the images that make the split val."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for field in _POSITIVE:
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(field, getattr(self, field), "give a positive number")
        for field in ("decay", "balance", "warmup", "clip", "every", "failures"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(field, getattr(self, field), "give a number of at least 0")
        for field in ("momentum", "dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "give a number of at least 0 and below 1")
        if not 0 <= self.ema < 1:
            raise ConfigError("ema", self.ema, "give a decay such as 0.999, or 0 for none")
        if self.stride not in (None, 8, 16, 32):
            raise ConfigError("stride", self.stride, "choose 8, 16 or 32")
        if self.optimiser not in OPTIMISERS:
            raise ConfigError("optimiser", self.optimiser, f"choose one of {', '.join(OPTIMISERS)}")
        if self.feed not in FEEDS:
            raise ConfigError("feed", self.feed, f"choose one of {', '.join(FEEDS)}")
        training_dtype(torch.device("cpu"), self.precision)
        check_norm(self.norm)
        # The parts check their own settings: here, where no data has been read yet.
        self.loss_config()
        network = self.network(classes=2)
        self.augmentation(network, ignore=255)
        if self.init is None or (self.stride and self.bins):  # else --init tells them
            self._check_bins(network)
        self.worker_range()

    def _check_bins(self, network: PSPNetConfig) -> None:
        stride, cells = network.output_stride, math.ceil(self.crop / network.output_stride)
        if max(network.bins) > cells:
            remedy = f"the feature map of --crop {self.crop} at --stride {stride} has {cells}x{cells} cells"
            raise ConfigError("bins", ",".join(map(str, network.bins)), f"{remedy}; give smaller bins or a larger crop")

    def worker_range(self) -> WorkerRange:
        """The numbers of workers that the batch is large enough for.

        Raises:
            ConfigError: when there are none.
        """
        wanted = WorkerRange.parse(self.workers)
        # BatchNorm learns nothing from one image.
        alone = 1 if self.norm in ("frozen", "sync") else 2
        most = self.batch // (alone * self.accumulate)
        if self.norm == "sync" and self.batch < 2 * self.accumulate:
            most = 0
        if most < wanted.low:
            least = "at least 2 images for BatchNorm in each pass of a worker, or --norm frozen"
            raise ConfigError("batch", self.batch, f"too small for {wanted.low} workers: give {least}")
        return WorkerRange(low=wanted.low, high=min(wanted.high, most))

    def network(self, classes: int, start: Start | None = None) -> PSPNetConfig:
        """The network for this many classes: what the flags leave open is as in the network of ``start``.

        Raises:
            ConfigError: when the weights of ``start`` are those of another backbone or stem, or not for RGB images.
        """
        for flag, theirs in (("backbone", start.config.backbone), ("stem", start.config.stem)) if start else ():
            if getattr(self, flag) not in (None, theirs):
                remedy = f"its {flag} {theirs} differs; start from the same {flag}, or leave out --{flag}"
                raise ConfigError("init", self.init, remedy)
        flags: dict[str, Any] = {
            "backbone": self.backbone,
            "stem": self.stem,
            "output_stride": self.stride,
            "bins": self.bins,
        }
        given = {field: value for field, value in flags.items() if value is not None}
        given |= {"classes": classes, "dropout": self.dropout, "auxiliary": self.auxiliary > 0}
        network = PSPNetConfig(**(start.shared if start else {}) | given)
        if network.bands != 3:
            raise ConfigError("init", self.init, f"takes {network.bands} bands; image files are read as 3, RGB")
        return network

    def settled(self, network: PSPNetConfig) -> "TrainConfig":
        """The same config with every flag of the network as it turned out."""
        return dataclasses.replace(
            self, backbone=network.backbone, stem=network.stem, stride=network.output_stride, bins=network.bins
        )

    def loss_config(self) -> LossConfig:
        """The loss and its settings."""
        return LossConfig(
            kind=self.loss,
            label_smoothing=self.smoothing,
            ohem_thresh=self.threshold,
            ohem_min_kept=self.kept,
            focal_gamma=self.gamma,
            aux_weight=self.auxiliary,
        )

    def augmentation(self, network: PSPNetConfig, ignore: int) -> AugmentConfig:
        """How a training crop is made; its padding is the network's mean colour and the ignore id."""
        red, green, blue = network.mean
        return AugmentConfig(
            crop=(self.crop, self.crop),
            image_scale=self.resize,
            scale=self.scale,
            rotate=self.rotate,
            blur=self.blur,
            hflip=self.mirror,
            cat_max_ratio=self.cap,
            photometric=self.photometric,
            mean=(red, green, blue),
            ignore=ignore,
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training.

    Returns:
        ``run_id``, ``model`` (``models:/name/version``), ``metrics`` (``miou``, ``macc``, ``aacc`` of the best epoch),
        ``images_per_second``, ``epoch`` (the best one), ``checkpoint`` (URI of its folder) and ``champion`` (whether
        the model got that alias).

    Raises:
        ConfigError: a mistake in the config or the data, found before the first step.
        TrainingFailed: the workers kept failing, or the loss was not a finite number.
    """
    dataset = open_dataset(
        config.data, config.layout, LayoutOptions(confidence=config.confidence, holdout=config.holdout)
    )
    card = checked(config, dataset)
    loop = loop_config(config, dataset, card)
    config = config.settled(loop.network)
    output = open_store(config.output, field="output")
    folder = CheckpointFolder(output, config.name)
    with ray_session():
        scaling = Scaling.of(config)
        check_norm(config.norm, gpu=scaling.share.gpus > 0)
        loop = dataclasses.replace(loop, feed_cpus=scaling.feed_cpus)
        output.check_writable_atomically()
        run, begun = _open_run(config, output, loop)
        try:
            if begun:
                run.log_setting(dataclasses.asdict(config), card=card.to_json())
            _fit(config, loop, scaling, folder, run)
            summary = _publish(config, loop, folder, run)
        except BaseException:
            run.finish("FAILED")
            raise
        run.finish("FINISHED")
    return summary


def checked(config: TrainConfig, dataset: Dataset) -> DataCard:
    """The card of both splits, every pair of which is read.

    Raises:
        ConfigError: for a pair that cannot be learnt from, a split too small for the batch, or a crop that no image
            fills at any scale.
    """
    pairs = dataset.split(config.train)
    if len(pairs) < config.batch:
        raise ConfigError(
            "batch", config.batch, f"the {config.train} split has {len(pairs)} images; give a smaller batch"
        )
    val = dataset.split(config.val)
    log.info("checking %d training and %d validation pairs", len(pairs), len(val))
    card = check(dataset, [*pairs, *val])
    largest = config.resize * config.scale[1] * max(card.splits[config.train].largest)
    if largest < config.crop:
        remedy = (
            f"even {config.scale[1]:g} times as large the largest image has {largest:.0f} pixels; give a smaller crop"
        )
        raise ConfigError("crop", config.crop, remedy)
    return card


def loop_config(config: TrainConfig, dataset: Dataset, card: DataCard) -> LoopConfig:
    """Gather what a worker needs."""
    start = read_start(config.init, bins=config.bins) if config.init else None
    network = config.network(len(dataset.classes), start)
    if config.norm == "frozen" and not config.init:
        log.warning("norm=frozen without --init: a fresh network's statistics (mean 0, variance 1) normalise nothing")
    resized = InferenceSettings(resize="scale", size=config.resize) if config.resize != 1 else InferenceSettings()
    return LoopConfig(
        crops=Crops(
            dataset=patient(dataset),
            pairs=dataset.split(config.train),
            blocks=dataset.blocks(config.train),
            augment=config.augmentation(network, dataset.classes.ignore),
            batch=config.batch,
            seed=config.seed,
        ),
        val=dataset.split(config.val),
        network=network,
        loss=config.loss_config(),
        inference=resized,
        init=start.state(network) if start else None,
        pixels=tuple(card.splits[config.train].pixels.tolist()),
        progress=sys.stderr.isatty(),
        **{key: getattr(config, key) for key in _PASSED_ON},
    )


_PASSED_ON = (
    *("name", "epochs", "accumulate", "norm", "precision", "deterministic", "compile", "every", "validate", "keep"),
    *("optimiser", "rate", "power", "momentum", "head", "decay", "warmup", "clip", "ema", "balance"),
)


def _open_run(config: TrainConfig, output: Store, loop: LoopConfig) -> tuple[Run, bool]:
    """Start the run, or take up the one to resume; and whether MLflow has begun a new one for it.

    The output remembers its shape, on which the saved state depends (data and network, and what is kept of optimiser
    and average), so that a resume can be compared with it.
    """
    shape = {key: getattr(config, key) for key in ("backbone", "stem", "stride", "layout", "optimiser", "ema", "batch")}
    shape |= {"bins": list(loop.network.bins), "auxiliary": "on" if config.auxiliary else "off"}
    shape |= {"data": loop.dataset.store.root, "classes": len(loop.dataset.classes)}
    started = _of_init(loop.network)
    names, kept = list(loop.dataset.classes.names), {key: getattr(config, key) for key in _KEPT}
    record, field, place = f"{config.name}/config.json", "output", output.uri_of(config.name)
    if output.exists(record):
        if not config.resume:
            remedy = "add --resume to go on with it, or choose another --name or --output"
            raise ConfigError(field, place, f"holds a run already; {remedy}")
        before = json.loads(output.read(record))
        for key, value in shape.items():
            if before.get(key) != value:
                raise ConfigError(key, value, f"the run to resume has {before.get(key)}; give that, or another --name")
        if before.get("init", {}) != started:
            remedy = "the run to resume has another network; give the --init that it began with, or another --name"
            raise ConfigError("init", config.init, remedy)
        _refuse_other_classes(before.get("names", names), names)
        _tell_changes(before.get("kept", kept), kept)
        run = resume_run(EXPERIMENT, config.name, before["run_id"])
        return run, run.run_id != before["run_id"]
    run = start_run(EXPERIMENT, config.name)
    content = shape | {"init": started, "names": names, "kept": kept, "run_id": run.run_id}
    if not output.put_if_absent(record, json.dumps(content, indent=1).encode()):
        raise ConfigError(field, place, "another run began there just now; choose another --name or --output")
    return run, True


_KEPT = ("seed", "crop", "resize", "epochs", "rate", "power", "warmup")
"""What the images, crops and learning rate of a step are functions of, beside the batch."""


def _refuse_other_classes(before: list[str], names: list[str]) -> None:
    """A classifier of as many classes goes on with others, or in another order, without an error."""
    for index, (old, new) in enumerate(zip(before, names, strict=True)):
        if old != new:
            remedy = f"class {index} of the run to resume is {old}; give its classes in its order, or another --name"
            raise ConfigError("classes", new, remedy)


def _tell_changes(before: dict[str, Any], kept: dict[str, Any]) -> None:
    """A longer run, for one, may be wanted: it is told, and not refused."""
    changes = [f"--{key} {value} (before: {before[key]})" for key, value in kept.items() if before[key] != value]
    if changes:
        log.warning("order, crops or learning rate go on in another way than they began: %s", ", ".join(changes))


def _of_init(network: PSPNetConfig) -> dict[str, str]:
    """What only --init can have changed of a network, whose flags are compared by themselves."""
    flags = ("classes", "backbone", "stem", "output_stride", "bins", "dropout", "auxiliary")
    fields = [field for field in dataclasses.fields(network) if field.name not in flags]
    return {field.name: str(value) for field in fields if (value := getattr(network, field.name)) != field.default}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many workers there are, and what each of them and the tasks that feed them may use."""

    workers: WorkerRange
    share: Share
    feed_cpus: float
    """As ``LoopConfig.feed_cpus``."""

    @classmethod
    def of(cls, config: TrainConfig) -> "Scaling":
        """On the connected cluster: a fixed number of workers shares its CPUs, of a range each has one of its own."""
        workers, resources = config.worker_range(), ray.cluster_resources()
        by_ray = config.feed == "ray" or (config.feed == "auto" and resources.get("GPU", 0) > 0 and config.gpus != 0)
        reserve = FEED_RESERVE if by_ray else 0.0
        if workers.low == workers.high:
            part = share(workers.high, config.gpus, reserve=reserve, resources=resources)
        else:
            gpus = config.gpus if config.gpus is not None else float(resources.get("GPU", 0) > 0)
            part = Share(workers=workers.high, cpus=1 - reserve, gpus=gpus)
        spare = resources.get("CPU", 0) - part.cpus * workers.high
        return cls(workers=workers, share=part, feed_cpus=(1.0 if spare >= 1 else TASK_CPUS) if by_ray else 0.0)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.workers.low < self.workers.high

    def config(self, grow: float) -> ScalingConfig:
        """For Ray Train."""
        resources = {"CPU": self.share.cpus} | ({"GPU": self.share.gpus} if self.share.gpus else {})
        return ScalingConfig(  # type: ignore[call-arg]  # typed as Train V1, which V2 replaces at import
            num_workers=(self.workers.low, self.workers.high) if self.elastic else self.workers.high,  # type: ignore[arg-type]
            use_gpu=self.share.gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=grow,
        )


def _fit(config: TrainConfig, loop: LoopConfig, scaling: Scaling, folder: CheckpointFolder, run: Run) -> None:
    patience = ELASTIC_START_TIMEOUT_S if scaling.elastic else START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", patience)
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.store.filesystem))
    trainer = TorchTrainer(
        train_loop,  # type: ignore[arg-type]  # Train V2 hands on what it returns
        train_loop_config={"loop": loop, "folder": folder, "run": run},
        scaling_config=scaling.config(config.grow),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as Train V1, which V2 replaces at import
            name=config.name,
            storage_path=folder.store.path_of(""),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.failures),
            callbacks=[EpochPrinter()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result: Any = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(f"training failed: {_cause(error)}") from error
    if reason := result.return_value:
        entries = folder.entries()
        last = (
            f"the last good checkpoint is {folder.store.uri_of(entries[-1].model)}" if entries else "no checkpoint yet"
        )
        raise TrainingFailed(f"training stopped: {reason}; {last}; try a lower --rate, --clip, or --precision float32")


def _cause(error: ray.train.TrainingFailedError) -> str:
    """The first worker's own words."""
    failures = getattr(error, "worker_failures", None) or {}
    return " ".join(str(next(iter(failures.values()), error)).strip().splitlines()[-1:])


def _publish(config: TrainConfig, loop: LoopConfig, folder: CheckpointFolder, run: Run) -> dict[str, Any]:
    """Log and register the best checkpoint."""
    found = best(folder.entries())
    if not found:
        raise TrainingFailed("training ended without a checkpoint")
    entry, metrics = found[0], found[0].progress.metrics
    uri, data = folder.store.uri_of(entry.model), loop.dataset.fingerprint(config.val)
    with to_local(uri, field="output") as local:
        model = run.log_model(local, config.name, miou=metrics["miou"], data=data, step=entry.progress.step)
    champion = registry.promote(model, lambda other: _score(config, other), uri=run.uri)
    return {
        "run_id": run.run_id,
        "model": model,
        "metrics": {key: metrics[key] for key in ("miou", "macc", "aacc")},
        "images_per_second": metrics["images_per_second"],
        "epoch": int(metrics["epoch"]),
        "checkpoint": uri,
        "champion": champion,
    }


def _score(config: TrainConfig, checkpoint: Checkpoint) -> float:
    """mIoU of another model on the validation split."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder))
        settings = EvaluateConfig(
            data=config.data,
            layout=config.layout,
            split=config.val,
            confidence=config.confidence,
            holdout=config.holdout,
            model=folder,
            gpus=config.gpus,
            track=False,
        )
        return float(evaluate(settings)["miou"])


class EpochPrinter(UserCallback):
    """Prints a line for each epoch, from Ray Train's controller process."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called with every worker's metrics, which are the same."""
        total = metrics[0]
        shown = "  ".join(f"{key} {total[key]:.4g}" for key in ("loss", "miou", "aacc", "images_per_second"))
        print(f"epoch {total['epoch']}  {shown}", flush=True)
