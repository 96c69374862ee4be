"""Load of processor, memory, disk, network and GPU, as MLflow samples it, on its way through the spool.

MLflow's own monitor asks the server at every sample, ends when it is away, and opens the store when it is made.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipeline.tracking.spool import Spool

PREFIX = "system/"
INTERVAL = 10.0
"""Seconds between samples, where MLflow's environment variable says nothing."""
MONITORS: tuple[Any, ...] = (CPUMonitor, DiskMonitor, NetworkMonitor)
GPU_MONITOR: Any = GPUMonitor


class SystemMetrics:
    """Samples from the background; the steps of a resumed run go on counting."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._step = spool.next_step(PREFIX)
        self._interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", INTERVAL))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="system-metrics")

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def _run(self) -> None:
        monitors = _monitors()
        with suppress(OSError, ValueError):  # the disk is full, which the training will tell; the spool is closed
            while not self._over.wait(self._interval):
                self._sample(monitors)

    def _sample(self, monitors: list[Any]) -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._spool.metrics({PREFIX + k: float(value) for k, value in values.items()}, self._step, rising=True)
        self._step += 1

    def finish(self) -> None:
        """Stop sampling."""
        self._over.set()
        self._thread.join(1.0)


def _monitors() -> list[Any]:
    monitors = [monitor() for monitor in MONITORS]
    with suppress(Exception):  # without an NVIDIA GPU, or nvidia-ml-py
        monitors.append(GPU_MONITOR())
    return monitors
