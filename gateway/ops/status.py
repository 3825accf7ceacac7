"""What a daemon says about itself: why it is not ready, its books, its metrics. All of it is read when asked for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gateway.core.holds import PRODUCER_FULL
from gateway.ops.asgi import Sidecar
from gateway.telemetry.metrics import Across

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sized

    from prometheus_client import Metric

    from gateway.core.books import Books
    from gateway.core.progress import Progress
    from gateway.core.tally import Tally
    from gateway.kafka.producer import KafkaProducer
    from gateway.registry.shared import SharedRegistry
    from gateway.router.spool.replay import Replay
    from gateway.router.spool.writer import SpoolWriter
    from gateway.telemetry.metrics import Metrics

OUTCOMES: Final = ("received", "delivered", "dead_lettered", "dropped", "spooled")
"""Label values of the books' counters."""


def shown_books(totals: Tally) -> dict[str, int]:
    """The totals as the sidecar and the last line of the log give them."""
    return {
        "received": totals.received,
        "delivered": totals.delivered,
        "dead_lettered": totals.dead_lettered,
        "dropped": totals.dropped,
        "spooled": totals.spooled,
        "in_flight": totals.in_flight,
        "imbalance": totals.imbalance,
        "imbalance_bytes": totals.imbalance_bytes,
    }


@dataclass(frozen=True, slots=True)
class Status:
    """The parts of a running gateway that are asked."""

    state: Callable[[], str]
    """``starting``, ``ready``, ``draining`` or ``stopped``."""
    producer: KafkaProducer
    books: Books
    sessions: Sized
    holds: Callable[[], tuple[str, ...]]
    """Why nothing is handed over at the moment (`gateway.core.holds`)."""
    short_of_memory: Callable[[], bool]
    registry: SharedRegistry | None
    spool: SpoolWriter | None
    replay: Replay | None
    spool_directory: str | None
    bootstrap_servers: str
    version: str
    progress: Progress

    def reasons(self) -> list[str]:
        """Why the gateway is not ready; none when it is."""
        cluster = self.producer.cluster
        state = self.state()
        reasons = []
        if state == "starting":
            reasons.append("starting")
        if state in ("draining", "stopped"):
            reasons.append("draining")
        if self.replay is not None and self.replay.waiting:
            reasons.append("spool_not_sent_yet")
        if self.spool is not None and self.spool.fault:
            reasons.append(f"spool_unwritable: {self.spool.fault}")
        if cluster.missing_topics:
            reasons.append(f"topics_missing: {', '.join(cluster.missing_topics)}")
        if cluster.not_authorised:
            reasons.append(f"not_authorised: {', '.join(cluster.not_authorised)}")
        if not cluster.up:
            reasons.append("kafka_unavailable")
        elif self.producer.broken:
            reasons.append("kafka_producer_replaced")
        reasons += [f"kafka_stalled: no partition of {topic} takes records" for topic in cluster.unwritable_topics]
        reasons += self.progress.reasons
        if self.short_of_memory():
            reasons.append("short_of_memory")
        if self.registry is not None and self.registry.refuses:
            reasons.append("registry_unavailable")
        if PRODUCER_FULL in self.holds():
            reasons.append("producer_queue_full")
        return reasons

    def details(self) -> dict[str, Any]:
        """What ``/health`` shows beside the reasons."""
        books, cluster = self.books.summary(), self.producer.cluster
        return {
            "state": self.state(),
            "connections": len(self.sessions),
            "companies": self.books.companies,
            "kafka": {
                "bootstrap_servers": self.bootstrap_servers,
                "up": cluster.up,
                "queue_messages": len(self.producer),
                "queue_full": self.producer.full,
                "unwritable_partitions": [f"{topic}/{number}" for topic, number in sorted(cluster.unwritable)],
            },
            "registry": {
                "kind": "memory" if self.registry is None else self.registry.kind,
                "up": self.registry is None or self.registry.up,
            },
            "messages": {**shown_books(books.totals), "unbalanced_companies": books.unbalanced_companies},
            "spool": {
                "directory": self.spool_directory,
                "waiting_records": len(self.spool or ()),
                "fault": self.spool.fault if self.spool is not None else "",
            },
            "version": self.version,
        }

    def declare(self, metrics: Metrics) -> None:
        """Declare the metrics that are read here, and not counted."""
        metrics.info("gateway_build_info", "The running version.", "version", self.version)
        metrics.gauge("gateway_connections", "Open WebSocket connections.", lambda: len(self.sessions))
        metrics.gauge(
            "gateway_ready",
            "1 while /health/ready answers 200.",
            lambda: not self.reasons(),
            across=Across.HIGHEST,  # a host is ready when one of its processes is
        )
        metrics.gauge(
            "gateway_kafka_up",
            "1 while a broker is connected.",
            lambda: self.producer.cluster.up,
            across=Across.LOWEST,
        )
        metrics.gauge(
            "gateway_registry_up",
            "0 while the registry of several gateways does not answer.",
            lambda: self.registry is None or self.registry.up,
            across=Across.LOWEST,
        )
        metrics.gauge("gateway_short_of_memory", "1 while newcomers are refused for memory.", self.short_of_memory)
        metrics.gauge("gateway_reading_paused", "1 while the producer queue is full.", lambda: bool(self.holds()))
        metrics.gauge(
            "gateway_producer_queue_messages", "Records in the producer, unconfirmed.", lambda: len(self.producer)
        )
        metrics.gauge("gateway_spool_waiting_records", "Not on the disk yet.", lambda: len(self.spool or ()))
        metrics.gauge(
            "gateway_spool_ok",
            "0 while the spool takes nothing.",
            lambda: self.spool is None or not self.spool.fault,
            across=Across.LOWEST,
        )
        declare_books(metrics, self.books)

    def sidecar(self, metrics: Metrics) -> Sidecar:
        """The sidecar's application."""
        return Sidecar(
            reasons=self.reasons,
            details=self.details,
            metrics=lambda: metrics.page(trio.current_time()),
            version={"gateway": self.version, "python": platform.python_version()},
        )


def declare_books(metrics: Metrics, books: Books) -> None:
    """Declare the metrics of the books: their sums are made once a page."""

    def collect() -> Iterable[Metric]:
        summary = books.summary()
        totals = summary.totals
        yield _by_type("gateway_messages", "Messages by outcome.", summary.by_type, "")
        yield _by_type("gateway_message_bytes", "Bytes of messages by outcome.", summary.by_type, "_bytes")
        yield GaugeMetricFamily("gateway_messages_in_flight", "Handed to the producer.", totals.in_flight)
        yield GaugeMetricFamily("gateway_message_bytes_in_flight", "Their bytes.", totals.in_flight_bytes)
        yield GaugeMetricFamily(
            "gateway_books_imbalance",
            "received - (delivered + dead_lettered + dropped + spooled + in_flight); 0 unless there is a bug.",
            totals.imbalance,
        )
        yield GaugeMetricFamily(
            "gateway_books_imbalance_bytes", "The same in bytes of messages as received.", totals.imbalance_bytes
        )
        yield GaugeMetricFamily("gateway_companies", "Companies connected or in flight.", books.companies)

    metrics.families("books", collect)


def _by_type(name: str, text: str, by_type: dict[str, Tally], suffix: str) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=["outcome", "message_type"])
    for message_type, tally in sorted(by_type.items()):
        for outcome in OUTCOMES:
            family.add_metric([outcome, message_type], getattr(tally, outcome + suffix))
    return family
