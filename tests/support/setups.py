"""Trainings small enough for a test: their configs, and their setups over a data set that is read once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pipelines.datasets.data_card import DataCard
from pipelines.datasets.dataset import Dataset
from pipelines.process.config_tree import build
from pipelines.training.config import TrainConfig
from pipelines.training.setup import Setup, check_data, set_up

SMALL: dict[str, Any] = {"backbone": "resnet18", "output_stride": 32, "bins": (1, 2), "crop": 48, "batch": 4}
"""Flags of a network whose steps take no time."""


def config_of(data: Path | str, **flags: Any) -> TrainConfig:
    return build(TrainConfig, {"data": str(data), "output": f"{data}/runs"} | flags)


def setup_of(config: TrainConfig) -> Setup:
    return set_up(config, *_checked(config.dataset.data))


@functools.cache
def _checked(data: str) -> tuple[Dataset, DataCard]:
    """The images do not depend on the network."""
    config = config_of(data, **SMALL)
    dataset = config.dataset.open()
    return dataset, check_data(config, dataset)
