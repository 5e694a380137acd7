"""Flags of training: each reaches its part, and a mistake is found before any data is read."""

import math
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import parse_config
from pipelines.datasets.layouts import LAYOUTS
from pipelines.training.config import TrainConfig
from pipelines.training.setup import check_data
from pspnet_core.errors import ConfigError
from pspnet_core.training.augment import AugmentConfig
from pspnet_core.training.losses import LossConfig
from tests.support.paths import ROOT
from tests.support.setups import SMALL, config_of, setup_of


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"batch": 3},
            "batch=3: too small for 2 workers: give at least 2 images for BatchNorm in each pass of a",
        ),
        ({"batch": 8, "accumulate": 4}, "batch=8: too small for 2 workers"),
        ({"batch": 1, "workers": "1", "norm": "sync"}, "batch=1: too small for 1 workers"),
        ({"momentum": 1.0}, "momentum=1.0: give a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1: give a number of at least 0 and below 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0: give a positive number"),
        ({"val_every": 0}, "val_every=0: give a positive number"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1: give a number of at least 0"),
        ({"loader": "dask"}, "loader=dask: choose one of auto, threads, ray"),
        ({"precision": "half"}, "precision=half: choose one of auto, float32, bfloat16, float16"),
        ({"rotate": 200.0}, "rotate=200.0: choose an angle"),
        ({"backbone": "resnet20"}, "backbone=resnet20: choose one of"),
        ({"loss": "hinge"}, "loss=hinge: choose one of cross_entropy"),
        ({"norm": "layer"}, "norm=layer: choose one of auto, batch, sync, frozen"),
        ({"ema": 1.0}, "ema=1.0: give a decay such as 0.999, or 0 for none"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0: give a number of at least 0"),
        ({"accumulate": 0}, "accumulate=0: give a positive number"),
        ({"lr": math.nan}, "lr=nan: give a positive number"),
        ({"weight_decay": math.nan}, "weight_decay=nan: give a number of at least 0"),
        ({"workers": "4:1"}, "workers=4:1: the smaller number comes first"),
        ({"epochs": 0}, "epochs=0: give a positive number"),
        ({"optimiser": "lion"}, "optimiser=lion: choose one of sgd, adamw"),
        ({"name": "9lives"}, "name=9lives: start with a letter"),
    ],
)
def test_bad_flags(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("a", **SMALL | {"workers": "2"} | changes)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"batch": 12}, 4),
        ({"batch": 5}, 2),  # 3 images and 2
        ({"batch": 4}, 2),
        ({"batch": 4, "norm": "frozen"}, 4),
        ({"batch": 4, "norm": "sync"}, 4),
        ({"batch": 9, "accumulate": 2}, 2),
        ({"batch": 8, "accumulate": 2, "norm": "frozen"}, 4),
        ({"batch": 1, "norm": "frozen"}, 1),
    ],
)
def test_each_pass_has_as_many_images_as_its_norm_needs(changes: dict[str, Any], most: int) -> None:
    workers = config_of("a", **SMALL | {"workers": "1:4"} | changes).workers()
    assert (workers.low, workers.high) == (1, most)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_published_recipes_are_configs(path: Path) -> None:
    config = parse_config(TrainConfig, ["--config", str(path), "--data", "a", "--output", "b", "--workers", "1:8"])
    assert config.name == path.stem
    assert config.dataset.layout in LAYOUTS
    assert "val mIoU" in path.read_text()
    assert (config.workers().low, config.workers().high) == (1, min(8, config.step.batch // 2))


def test_bins_fit_when_the_largest_is_the_feature_map() -> None:
    flags = ["--data=a", "--output=b", "--output-stride", "16", "--bins", "1,2,3,6"]
    for crop in (81, 96):  # six cells of 16 pixels, the last one partly filled
        config = parse_config(TrainConfig, [*flags, "--crop", str(crop)])
        assert config.network.resolve(classes=4).bins == (1, 2, 3, 6)
    with pytest.raises(ConfigError, match=r"^bins=1,2,3,6: .* --crop 80 at --output-stride 16 has 5x5 cells; give"):
        parse_config(TrainConfig, [*flags, "--crop", "80"])


def test_flags_reach_the_parts() -> None:
    flags = (
        "--loss ohem --label-smoothing 0.1 --ohem-thresh 0.6 --ohem-min-kept 5 --focal-gamma 1 --aux-weight 0 "
        "--scale 1,1.5 --image-scale 0.5"
    )
    config = parse_config(TrainConfig, ["--data=a", "--output=b", *flags.split()])
    assert config.loss == LossConfig(
        kind="ohem", label_smoothing=0.1, ohem_thresh=0.6, ohem_min_kept=5, focal_gamma=1.0, aux_weight=0.0
    )
    network = config.network.resolve(classes=3, auxiliary=config.auxiliary)
    assert (network.classes, network.auxiliary) == (3, False)
    assert config.augmentation == AugmentConfig(scale=(1.0, 1.5), image_scale=0.5)


def test_frozen_statistics_of_a_fresh_network_are_warned_of(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup_of(config_of(data, **SMALL, norm="frozen"))
    assert "norm=frozen without --init" in caplog.text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"crop": 500}, "crop=500: even 2 times as large the largest image has 160 pixels"),
        ({"batch": 16}, "batch=16: the train split has 11 images"),
    ],
)
def test_flags_that_do_not_fit_the_data(data: Path, changes: dict[str, Any], line: str) -> None:
    config = config_of(data, **SMALL | {"image_scale": 0.5} | changes)
    with pytest.raises(ConfigError) as caught:
        check_data(config, config.dataset.open())
    assert line in str(caught.value)
