"""What a run took of the cluster, and what that cost."""

import math
from dataclasses import dataclass
from typing import Any

from pipelines.labelling.report.totals import Totals
from pspnet_core.errors import ConfigError

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of one GPU and of one CPU for an hour, in whatever currency; what has none is not counted.

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
    """What it took to get so far.

    Returns:
        ``images`` (those that got a row), ``bytes_read``, ``gpu_seconds`` and ``cpu_seconds`` (seconds times the GPUs,
        or CPUs, that the model's actors held, from before they loaded it until their last chunk was done),
        ``price_gpu``, ``price_cpu``, ``cost`` and ``cost_per_1000_images``; None for what is not known.
    """
    gpu, cpu = float(totals.held["gpu"]), float(totals.held["cpu"])
    cost = prices.cost(gpu_seconds=gpu, cpu_seconds=cpu)
    return {
        "images": totals.done,
        "bytes_read": totals.read,
        "gpu_seconds": round(gpu, 3),
        "cpu_seconds": round(cpu, 3),
        "price_gpu": prices.gpu,
        "price_cpu": prices.cpu,
        "cost": cost,
        "cost_per_1000_images": None if cost is None or not totals.done else 1000 * cost / totals.done,
    }
