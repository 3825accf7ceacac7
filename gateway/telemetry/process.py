"""The ``process_*`` metrics that Prometheus' clients have in common."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric


class ProcessCollector:
    """Reads /proc/self alone (proc(5)).

    prometheus-client's own needs /proc/stat, which a hardened unit hides (ProcSubset=pid), and is silent without it.
    """

    def __init__(self) -> None:
        booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            self._started_at = booted_at + int(self._stat()[19]) / os.sysconf("SC_CLK_TCK")
        except OSError:  # no /proc at all
            self._started_at = time.time()

    @staticmethod
    def _stat() -> list[str]:
        """The fields of /proc/self/stat from the third on: what comes before may hold spaces."""
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()

    def collect(self) -> Iterable[Metric]:
        """The metric families (prometheus-client's Collector protocol)."""
        try:
            stat, descriptors = self._stat(), len(os.listdir("/proc/self/fd"))
        except OSError:
            return
        cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        resident = int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time.", value=cpu_s)
        yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size.", float(stat[20]))
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size.", resident)
        yield GaugeMetricFamily("process_start_time_seconds", "Start, since the epoch.", self._started_at)
        yield GaugeMetricFamily("process_open_fds", "Open file descriptors.", descriptors)
        yield GaugeMetricFamily("process_max_fds", "Allowed file descriptors.", limit)
