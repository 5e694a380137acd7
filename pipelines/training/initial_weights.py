"""The network that is trained, and the weights that it starts from: a checkpoint, or a file of another project."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.models.loading import load_model, local_weights
from pipelines.process.config_tree import differences
from pipelines.tracking.model_uris import MLFLOW_SCHEMES, fetch_file
from pspnet_core.checkpoints.importers import import_checkpoint
from pspnet_core.checkpoints.weight_files import INDEX
from pspnet_core.errors import ConfigError, check, check_below_1
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

log = logging.getLogger(__name__)
WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors", INDEX)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network to train and its initial weights. None takes a setting from those weights, else the default."""

    backbone: str | None = None
    """resnet18, resnet34, resnet50, resnet101 or resnet152; by default that of --init, else resnet50."""
    stem: str | None = None
    """First layers of the backbone: plain (one 7x7), deep (three 3x3) or deep32 (three 3x3, narrower); by default those
    of --init, else plain."""
    output_stride: int | None = None
    """Output stride of the backbone: 8 (the paper's), 16 or 32; by default that of the PSPNet of --init, else 8."""
    bins: tuple[int, ...] | None = None
    """Grid sizes of the pyramid, none above the feature map of the crop (crop / output stride); by default those of the
    PSPNet of --init, else 1,2,3,6."""
    dropout: float = 0.1
    """Share of channels that are dropped before the classifier in training."""
    init: str | None = None
    """Start from these weights: a checkpoint (any model URI), or ImageNet backbone weights (.pth, .safetensors)."""

    def __post_init__(self) -> None:
        check_below_1(dropout=self.dropout)

    def resolve(self, classes: int, *, auxiliary: bool = True, start: "InitialWeights | None" = None) -> PSPNetConfig:
        """Build the network's config for this many classes; ``start`` decides what the flags leave open.

        Raises:
            ConfigError: when the weights of ``start`` are those of another backbone or stem, or not for RGB images.
        """
        pairs = [("backbone", start.config.backbone), ("stem", start.config.stem)] if start else []
        for flag, theirs in pairs:
            if getattr(self, flag) not in (None, theirs):
                remedy = f"its {flag} {theirs} differs; start from the same {flag}, or leave out --{flag}"
                raise ConfigError("init", self.init, remedy)
        given = {name: value for name, value in vars(self).items() if value is not None and name != "init"}
        given |= {"classes": classes, "auxiliary": auxiliary}
        network = PSPNetConfig(**(start.shared if start else {}) | given)
        bands = f"takes {network.bands} bands; image files are read as 3, RGB"
        check(network.bands == 3, "init", self.init, bands)
        return network

    def settled(self, network: PSPNetConfig) -> "NetworkConfig":
        """Fill in every setting from a network."""
        return dataclasses.replace(self, **{name: getattr(network, name) for name in vars(self) if name != "init"})


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """Weights to start training from.

    Attributes:
        uri: where they were read.
        weights: under our names.
        config: their network.
        backbone_only: whether only the backbone of them is trained.
    """

    uri: str
    weights: dict[str, Tensor]
    config: PSPNetConfig
    backbone_only: bool

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of a ``PSPNetConfig`` that decide what the weights compute."""
        names = _BACKBONE_FIELDS if self.backbone_only else [field.name for field in dataclasses.fields(self.config)]
        return {name: getattr(self.config, name) for name in names}

    def state(self, config: PSPNetConfig, *, seed: int = 0) -> dict[str, Tensor]:
        """Build the state of a network of this config; ``seed`` draws what these weights have nothing for.

        Raises:
            ConfigError: when the weights do not fit the network.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PSPNet(config)
        own, fresh = model.state_dict(), self._fresh(model)
        shapes = {name: tensor.shape for name, tensor in self.weights.items()}
        wrong = [name for name in own.keys() - fresh if shapes.get(name) != own[name].shape]
        if wrong:
            remedy = f"its {min(wrong)} differs; start from the same backbone, stem and classes"
            raise ConfigError("init", self.uri, remedy)
        if not self.backbone_only:
            _warn_of_differences(self.uri, self.config, config)
        return {name: own[name] if name in fresh else self.weights[name] for name in own}

    def _fresh(self, model: PSPNet) -> set[str]:
        """Name the model's weights that are initialised anew.

        Beside a bare backbone these are all others, else the classifiers of other classes and an auxiliary head that
        is missing here.
        """
        names = model.state_dict().keys()
        if self.backbone_only:
            return {name for name in names if not name.startswith("backbone.")}
        with torch.device("meta"):
            alike = PSPNet(dataclasses.replace(model.config, classes=self.config.classes)).state_dict()
        fresh = {name for name, tensor in model.state_dict().items() if tensor.shape != alike[name].shape}
        if fresh:
            log.info(
                "weights of %s loaded but for the classifiers (it has %d classes, the data %d): %s",
                self.uri,
                self.config.classes,
                model.config.classes,
                ", ".join(sorted(fresh)),
            )
        if model.config.auxiliary and not self.config.auxiliary:
            fresh |= {name for name in names if name.startswith("auxiliary.")}
            log.info("%s has no auxiliary head: that one starts afresh", self.uri)
        return fresh


_BACKBONE_FIELDS = ("backbone", "stem", "avg_down", "mean", "std")


def read_initial_weights(uri: str, *, bins: tuple[int, ...] | None = None) -> InitialWeights:
    """Read weights to start training from.

    Args:
        uri: a checkpoint (any model URI), or a file (``WEIGHT_FILES``, local or remote) of another
            project: ImageNet weights of the backbone or a whole PSPNet, see ``importers``.
        bins: sizes of the grids of another project's PSPNet, which leave no trace in its weights; by default those that
            ``importers`` assumes.

    Raises:
        ConfigError: when there are no such weights.
    """
    if not uri.endswith(WEIGHT_FILES):
        checkpoint = load_model(uri, field="init")
        return InitialWeights(uri=uri, weights=checkpoint.weights, config=checkpoint.config, backbone_only=False)
    with _local_file(uri) as file:
        try:
            found = import_checkpoint(file, source=uri, overrides={"bins": bins} if bins else None)
        except ConfigError as error:
            raise ConfigError("init", uri, error.remedy) from error
    return InitialWeights(uri=uri, weights=found.weights, config=found.config, backbone_only=found.backbone_only)


@contextmanager
def _local_file(uri: str) -> Iterator[Path]:
    if not uri.startswith(MLFLOW_SCHEMES):
        with local_weights(uri, field="init") as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        yield fetch_file(uri, folder, field="init")


def _warn_of_differences(uri: str, given: PSPNetConfig, config: PSPNetConfig) -> None:
    """Warn where the weights fit a network that computes something else with them."""
    changed = ((name, theirs) for name, _, theirs in differences(vars(config), vars(given)))
    other = [f"{name} {theirs}" for name, theirs in changed if name not in ("classes", "auxiliary", "dropout")]
    if other:
        log.warning("the network of %s differs from the one to train: it has %s", uri, ", ".join(other))
