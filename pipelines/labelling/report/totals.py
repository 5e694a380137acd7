"""Totals of labelling: the report of a chunk, which adds up over chunks, plans and runs."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pspnet_core.errors import ConfigError

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts and seconds of one chunk, or of many; ``+`` adds them up.

    Attributes:
        images: images of the chunks, also those that another run labelled.
        labelled: images that got a mask.
        kinds: images that got an error row, by kind.
        bytes_read: bytes of encoded images that were read.
        given_up: chunks whose images became ``Crashed`` rows because the processes that worked on them kept ending.
        cpu, wall: seconds of each stage, of CPU and on the wall; threads side by side add up. ``segment`` is all that
            an actor does with a chunk; ``decode``, ``predict`` and ``encode`` are its parts.
        held: seconds of actors, working or waiting: of the ``actor`` itself, and times each ``gpu`` and ``cpu`` of it.
    """

    images: int = 0
    labelled: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    given_up: int = 0
    cpu: Counter[str] = field(default_factory=Counter)
    wall: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Totals":
        """The totals that ``to_json`` gave."""
        fields: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in content.items()
        }
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """The totals as plain data."""
        # Not by dataclasses.asdict, which makes another thing of a Counter.
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @property
    def errors(self) -> int:
        """Images that got an error row."""
        return self.kinds.total()

    @property
    def done(self) -> int:
        """Images that got a row."""
        return self.labelled + self.errors

    def of_stage(self, stage: str) -> "Totals":
        """The seconds of one stage alone."""
        return Totals(cpu=Counter({stage: self.cpu[stage]}), wall=Counter({stage: self.wall[stage]}))

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            images=self.images + other.images,
            labelled=self.labelled + other.labelled,
            kinds=_sum(self.kinds, other.kinds),
            bytes_read=self.bytes_read + other.bytes_read,
            given_up=self.given_up + other.given_up,
            cpu=_sum(self.cpu, other.cpu),
            wall=_sum(self.wall, other.wall),
            held=_sum(self.held, other.held),
        )


def _sum(left: Counter[str], right: Counter[str]) -> Counter[str]:
    both = Counter(left)  # Counter's own + drops what is not positive
    both.update(right)
    return both


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of one GPU and of one CPU for an hour, in any currency; a resource without a price is not counted.

    Raises:
        ConfigError: for a price that is negative or no number.
    """

    gpu: float | None = None
    cpu: float | None = None

    def __post_init__(self) -> None:
        for name, price in (("price_gpu", self.gpu), ("price_cpu", self.cpu)):
            if price is not None and not (math.isfinite(price) and price >= 0):
                raise ConfigError(name, price, "give a price for an hour, 0 or more")

    def cost(self, *, gpu_seconds: float, cpu_seconds: float) -> float | None:
        """The price of so many seconds; None without any price."""
        if self.gpu is None and self.cpu is None:
            return None
        return ((self.gpu or 0) * gpu_seconds + (self.cpu or 0) * cpu_seconds) / HOUR_S


def spent(totals: Totals, prices: Prices) -> dict[str, Any]:
    """Resources that the images took, and their cost.

    Returns:
        ``images`` (those that got a row), ``bytes_read``, ``gpu_seconds`` and ``cpu_seconds`` (seconds times the GPUs,
        or CPUs, that the model's actors held, from before they loaded it until their last chunk was done),
        ``price_gpu``, ``price_cpu``, ``cost`` and ``cost_per_1000_images``; None for what is not known.
    """
    gpu, cpu = float(totals.held["gpu"]), float(totals.held["cpu"])
    cost = prices.cost(gpu_seconds=gpu, cpu_seconds=cpu)
    return {
        "images": totals.done,
        "bytes_read": totals.bytes_read,
        "gpu_seconds": round(gpu, 3),
        "cpu_seconds": round(cpu, 3),
        "price_gpu": prices.gpu,
        "price_cpu": prices.cpu,
        "cost": cost,
        "cost_per_1000_images": None if cost is None or not totals.done else 1000 * cost / totals.done,
    }
