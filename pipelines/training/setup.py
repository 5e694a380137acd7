"""Preparation on the driver: check the data, resolve the network, and gather a worker's input in one value."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field, replace

from torch import Tensor

from pipelines.datasets import data_card
from pipelines.datasets.data_card import DataCard
from pipelines.datasets.dataset import Dataset, Pair, first
from pipelines.training.config import TrainConfig
from pipelines.training.initial_weights import read_initial_weights
from pipelines.training.loading import Crops
from pipelines.training.patience import patient
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import check
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.pspnet import PSPNetConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A worker's input: the config, and what the driver resolved and checked."""

    config: TrainConfig
    crops: Crops
    """The crops of every step."""
    val: tuple[Pair, ...]
    """The pairs to score."""
    network: PSPNetConfig
    init: dict[str, Tensor] | None = field(repr=False)
    """State of the whole network to start from, or None."""
    pixels: tuple[int, ...]
    """Training pixels of each class."""
    loader_cpus: float = 0.0
    """CPUs that each task of Ray Data claims to make crops; 0 makes them in the worker's threads."""
    progress: bool = False
    """Whether a terminal shows a bar of the steps."""

    @property
    def dataset(self) -> Dataset:
        """Data set of both splits."""
        return self.crops.dataset

    @property
    def inference(self) -> InferenceSettings:
        """Settings that the trained model labels by: at the size that it learnt at."""
        size = self.config.augmentation.image_scale
        return InferenceSettings(resize="scale", size=size) if size != 1 else InferenceSettings()

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.config.schedule.epochs * self.crops.steps

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step, counted from 1: every few epochs and after the last."""
        return step % (self.config.checkpoints.val_every * self.crops.steps) == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step: after each validation, and every few steps."""
        every = self.config.checkpoints.checkpoint_every
        return self.validates(step) or (every > 0 and step % every == 0)


def check_data(config: TrainConfig, dataset: Dataset) -> DataCard:
    """Read every pair of both splits; return their card.

    Raises:
        ConfigError: for a pair that cannot be learnt from, labels that nothing can be learnt from or scored on, a split
            too small for the batch, or a crop that no image fills at any scale.
    """
    pairs, val, batch = dataset.split(config.train), dataset.split(config.val), config.step.batch
    enough = f"the {config.train} split has {len(pairs)} images; give a smaller batch"
    check(len(pairs) >= batch, "batch", batch, enough)
    log.info("checking %d training and %d validation pairs", len(pairs), len(val))
    if config.val == config.train:
        log.warning("val=%s: that is what is learnt from; scores on it tell nothing of other images", config.val)
        val = ()
    card = data_card.check(dataset, [*pairs, *val])
    check_labels(config, dataset.classes, card)
    crops = config.augmentation
    largest = crops.image_scale * crops.scale[1] * max(card.splits[config.train].largest)
    size = f"even {crops.scale[1]:g} times as large the largest image has {largest:.0f} pixels"
    check(largest >= crops.crop, "crop", crops.crop, f"{size}; give a smaller crop")
    return card


def check_labels(config: TrainConfig, classes: ClassTable, card: DataCard) -> None:
    """Refuse labels of which training makes a model that knows nothing, however good its scores look.

    Raises:
        ConfigError: a split without a labelled pixel, a single class to learn, or a class without a pixel anywhere
            and no --absent-classes.
    """
    hint = _hint(classes, card)
    for flag, name in (("train", config.train), ("val", config.val)):
        remedy = f"none of its {card.splits[name].images} masks holds a labelled pixel{hint}"
        check(bool(card.splits[name].pixels.any()), flag, name, remedy)
    learnt = sorted(set(classes.names) - set(card.absent(config.train)))
    remedy = f"all labelled pixels are of the class {learnt[0]}, so there is nothing to tell apart{hint}"
    check(len(learnt) > 1, "train", config.train, remedy)
    absent = card.absent(*{config.train, config.val})
    remedy = f"no mask of {config.train} or {config.val} has a pixel of them{hint}; else take them out of the classes, "
    check(config.absent_classes or not absent, "classes", first(absent), f"{remedy}or give --absent-classes")


def _hint(classes: ClassTable, card: DataCard) -> str:
    """Say what else the pixels without a label may be."""
    unnamed = sum((split.unnamed for split in card.splits.values()), Counter[int]())
    if unnamed:
        ids = first(raw for raw, _ in unnamed.most_common())
        return f"; the masks hold ids that the classes leave out: {ids}; name them under ids in classes.json"
    ignored = sum(split.ignored for split in card.splits.values())
    if not ignored or classes.ids is not None:
        return ""
    share = ignored / (ignored + sum(int(split.pixels.sum()) for split in card.splits.values()))
    return (
        f"; {share:.0%} of the pixels have {classes.ignore}, which is ignored: where it stands for a class, say so in "
        f'classes.json, for example "ids": {{"0": 0, "{classes.ignore}": 1}}'
    )


def set_up(config: TrainConfig, dataset: Dataset, card: DataCard) -> Setup:
    """Resolve the network and gather a worker's input.

    Raises:
        ConfigError: when the weights of --init fit neither flags nor data.
    """
    init = config.network.init
    start = read_initial_weights(init, bins=config.network.bins) if init else None
    network = config.network.resolve(len(dataset.classes), auxiliary=config.auxiliary, start=start)
    if config.step.norm == "frozen" and not init:
        log.warning("norm=frozen without --init: a fresh network's statistics (mean 0, variance 1) normalise nothing")
    return Setup(
        config=replace(config, network=config.network.settled(network)),
        crops=Crops(
            dataset=patient(dataset),
            pairs=dataset.split(config.train),
            blocks=dataset.blocks(config.train),
            augment=config.augmentation,
            mean=network.mean,
            batch=config.step.batch,
            seed=config.seed,
        ),
        val=dataset.split(config.val),
        network=network,
        init=start.state(network, seed=config.seed) if start else None,
        pixels=tuple(card.splits[config.train].pixels.tolist()),
        progress=sys.stderr.isatty(),
    )
