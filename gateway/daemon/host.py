"""What the parent of several workers says of them together: readiness, books and metrics of the host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gateway.ops import aggregate
from gateway.ops.asgi import Sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prometheus_client import Metric

    from gateway.daemon.worker import Worker


class Host:
    """The workers, added up with those that have ended."""

    def __init__(self, workers: Sequence[Worker], version: str) -> None:
        self._workers = workers
        self._version = version
        self._sum = aggregate.Sum()
        self.restarts = 0
        self._unknown_fate = 0
        self._blind_s = 0.0
        self._past: dict[str, int] = {}

    def learn(self, across: Mapping[str, str]) -> None:
        """How metrics add up, as a worker says itself."""
        self._sum.learn(across)

    def note_restart(self) -> None:
        """A worker is started again."""
        self.restarts += 1

    def retire(self, worker: Worker) -> None:
        """What an ended process counted stays in the sum.

        Of one that was killed only the last sample is known: what was in flight then has an unknown fate, and what it
        counted since is not in the sum.
        """
        self._sum.retire(worker.page)
        if worker.sidecar and not worker.complete:
            self._blind_s += trio.current_time() - worker.heard_at
        self._unknown_fate += int(aggregate.value(worker.page, "gateway_messages_in_flight"))
        for name, value in worker.health.get("messages", {}).items():
            name = "unknown_fate" if name == "in_flight" else name
            self._past[name] = self._past.get(name, 0) + value

    def reasons(self) -> list[str]:
        """Ready while one worker is: the others refuse with 503, and clients come again."""
        if any(worker.health.get("ready") for worker in self._workers):
            return []
        return [
            f"worker {worker.number}: {reason}"
            for worker in self._workers
            for reason in worker.health.get("reasons", ["not started"])
        ]

    def details(self) -> dict[str, Any]:
        """What ``/health`` shows beside the reasons: the workers' figures, one by one and added up."""
        sums = dict(self._past)
        for worker in self._workers:
            for name, value in worker.health.get("messages", {}).items():
                sums[name] = sums.get(name, 0) + value
        return {
            "connections": sum(worker.health.get("connections", 0) for worker in self._workers),
            "messages": sums,
            "workers": [
                {
                    "worker": worker.number,
                    "pid": worker.process.pid if worker.process is not None else None,
                    "sidecar": worker.sidecar,
                    **worker.health,
                }
                for worker in self._workers
            ],
            "restarts": self.restarts,
            "version": self._version,
        }

    def metrics(self) -> bytes:
        """The page of /metrics: the workers' added up, and what only the parent knows."""
        running = sum(worker.process is not None for worker in self._workers)
        own: list[Metric] = [
            GaugeMetricFamily("gateway_workers", "Worker processes that run.", running),
            CounterMetricFamily("gateway_worker_restarts", "Workers started again.", value=self.restarts),
            CounterMetricFamily(
                "gateway_messages_unknown_fate",
                "In flight in a worker when it was last heard of before it was killed.",
                value=self._unknown_fate,
            ),
            CounterMetricFamily(
                "gateway_worker_unsampled_seconds",
                "Between killed workers' last samples and their ends: what they counted then is not in the sum.",
                value=self._blind_s,
            ),
        ]
        return self._sum.text((worker.page for worker in self._workers), own)

    def sidecar(self) -> Sidecar:
        """The sidecar's application."""
        return Sidecar(
            reasons=self.reasons,
            details=self.details,
            metrics=self.metrics,
            version={"gateway": self._version, "python": sys.version.split()[0]},
        )
