"""What the machine does meanwhile: CPUs, memory, disk, network and GPUs, read by MLflow's collectors.

MLflow's own monitor ends for good with the first request that fails. Here the readings go through the ``MetricsLog`` of
the process, which outlives an absent server.
"""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.tracking.metrics_log import MetricsLog

EVERY_S = 10.0


class SystemMetrics:
    """Logs ``system/...`` every few seconds, where MLflow's user interface looks for them. A context.

    Args:
        log: where the readings go.
        every: seconds between two readings.
        node: name of the machine, for runs on several: the metrics are then ``system/<node>/...``.
    """

    def __init__(self, log: MetricsLog, *, every: float = EVERY_S, node: str | None = None) -> None:
        self.log, self.every = log, every
        self.prefix = f"system/{node}/" if node else "system/"
        self.collectors = collectors()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            readings = {f"{self.prefix}{name}": value for name, value in readings_of(self.collectors).items()}
            # The step tells the time, so that it goes on where another worker takes over.
            self.log.add(int(time.time()), readings)
            if self._ended.wait(self.every):
                return


def collectors() -> list[BaseMetricsMonitor]:
    """MLflow's collectors that work on this machine."""
    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no pynvml (nvidia-ml-py); no NVIDIA GPU or driver
        found.append(GPUMonitor())
    return found


def readings_of(sources: Sequence[BaseMetricsMonitor]) -> Mapping[str, float]:
    """One reading of each collector."""
    readings: dict[str, float] = {}
    for source in sources:
        source.collect_metrics()
        readings |= source.aggregate_metrics()
        source.clear_metrics()
    return readings
