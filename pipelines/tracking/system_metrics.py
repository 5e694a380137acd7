"""What the machine does during a run: CPUs, memory, disk, network and GPUs, read by MLflow's collectors.

MLflow's own monitor ends for good with the first request that fails. Here the readings go through the ``MetricsLog`` of
the process, which outlives an absent server.
"""

import logging
import time
from contextlib import AbstractContextManager, suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.process.background import working
from pipelines.tracking.metrics_log import MetricsLog

log = logging.getLogger(__name__)
EVERY_S = 10.0


def log_system_metrics(metrics: MetricsLog, *, every: float = EVERY_S) -> AbstractContextManager[None]:
    """Log ``system/...`` every few seconds within the context, where MLflow's user interface looks for them."""
    sources = _collectors()

    def read() -> float | None:
        readings: dict[str, float] = {}
        try:
            for source in sources:
                source.collect_metrics()
                readings |= source.aggregate_metrics()
                source.clear_metrics()
            # The step is the time, so that the curve goes on when another worker takes over.
            metrics.add(int(time.time()), {f"system/{name}": value for name, value in readings.items()})
        except Exception as error:  # of any kind, because the work itself goes on
            log.warning("the machine is not read any more: %s", error)
            return None
        return every

    return working(read, name="system-metrics")


def _collectors() -> list[BaseMetricsMonitor]:
    """MLflow's collectors that work on this machine."""
    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no pynvml (nvidia-ml-py); no NVIDIA GPU or driver
        found.append(GPUMonitor())
    return found
