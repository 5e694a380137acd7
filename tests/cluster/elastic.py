"""Drivers that ``test_elastic.py`` runs on a cluster of its own: ``python -m tests.cluster.elastic NAME ...``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.cluster import resources as cluster
from pipelines.cluster.resources import ActorConfig, Pool
from pipelines.cluster.session import ray_session
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pspnet_core.errors import ConfigError
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction

ACTORS = 4
PATIENCE_S = 300.0
GPUS = 0.5
"""Of each actor."""
LAST = 250
"""Red of the image that waits for the pool to shrink."""


@dataclass(frozen=True)
class Crowd:
    """Builds a predictor that answers once there are ``ACTORS`` of them, each of which leaves a file."""

    folder: str

    def __call__(self) -> Member:
        return Member(Path(self.folder))


class Member:
    """One of the crowd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"{os.getpid()}").touch()

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        for key, image in images:
            self._until(lambda: len(list(self.folder.iterdir())) >= ACTORS, "the pool does not grow")
            if image.views[0][0, 0, 0] >= LAST:
                self._until(_others_are_gone, "the pool does not shrink")
            yield key, Prediction(np.zeros((image.height, image.width), np.uint8), np.ones((8, 8), np.float32))

    @staticmethod
    def _until(condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(otherwise)
            time.sleep(0.05)


def _others_are_gone() -> bool:
    free: float = ray.available_resources().get("GPU", 0.0)
    return free >= (ACTORS - 1) * GPUS


def grow_and_shrink(bucket: str, output: str, model: str, crowd: str) -> object:
    """Label a bucket with a pool that has to grow for it, and shrink before it is done."""
    config = LabelConfig(
        input=bucket, output=output, model=model, chunk=2, actors=ActorConfig(workers=f"1:{ACTORS}", gpus=GPUS)
    )
    return label(config, Crowd(crowd))


def refusals() -> object:
    """What each pool that does not fit is told, and one that does."""
    patience, cluster.PLACE_S, cluster.ARRIVE_S = cluster.PLACE_S, 1.0, 1.0
    told = {
        "too many GPUs for one node": _told("1", 2.0),
        "more workers than GPUs": _told("3", None),
        "fractions that do not add up": _told("3", 0.6),
        "too many workers for the CPUs": _told("200", 0.0),
        "taken": _told_beside_another(),
    }
    cluster.PLACE_S = patience
    return told | {"fits": _told("1:4", 0.5)}


def _told(workers: str, gpus: float | None) -> str:
    try:
        pool = Pool.of(ActorConfig(workers=workers, gpus=gpus), reserve=0.5)
    except ConfigError as error:
        return str(error)
    return f"{pool.low} to {pool.high} of {pool.actor.cpus:g} CPUs and {pool.actor.gpus:g} GPUs"


def _told_beside_another() -> str:
    """While another one has taken all GPUs."""

    others: list[Any] = [ray.remote(_Other).options(num_cpus=0.5, num_gpus=1).remote() for _ in range(2)]
    ray.get([other.there.remote() for other in others])
    told = _told("1", 1.0)
    for other in others:
        ray.kill(other)
    return told


class _Other:
    """Somebody else's actor."""

    def there(self) -> bool:
        return True


def arrival() -> object:
    """A pool for a GPU more than there is; comes back when somebody has brought it."""
    return _told("3", 1.0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    with ray_session():
        function: Callable[..., object] = globals()[sys.argv[1]]
        print(json.dumps(function(*sys.argv[2:])))
