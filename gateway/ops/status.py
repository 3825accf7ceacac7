"""What a daemon says about itself: why it is not ready, its books, its metrics. All of it is read when asked for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from gateway.ops.asgi import Sidecar
from gateway.telemetry.metrics import Exposition, Gauges

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from gateway.core.books import Books, Tally
    from gateway.core.progress import Progress
    from gateway.daemon.lifecycle import Lifecycle
    from gateway.kafka.producer import KafkaProducer
    from gateway.router.spool.writer import Replay, SpoolWriter
    from gateway.telemetry.metrics import Counters


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

    lifecycle: Lifecycle
    producer: KafkaProducer
    books: Books
    sessions: Sized
    paused: Callable[[], bool]
    counters: Counters
    spool: SpoolWriter | None
    replay: Replay | None
    spool_directory: str | None
    bootstrap_servers: str
    version: str
    progress: Progress

    def reasons(self) -> list[str]:
        """Why the gateway is not ready; none when it is."""
        state = self.lifecycle.state.value
        reasons = []
        if state == "starting":
            reasons.append("starting")
        if state in ("draining", "stopped"):
            reasons.append("draining")
        if self.replay is not None and self.replay.waiting:
            reasons.append("spool_not_sent_yet")
        if self.spool is not None and self.spool.fault:
            reasons.append(f"spool_unwritable: {self.spool.fault}")
        if self.producer.missing_topics:
            reasons.append(f"topics_missing: {', '.join(self.producer.missing_topics)}")
        if self.producer.not_authorised:
            reasons.append(f"not_authorised: {', '.join(self.producer.not_authorised)}")
        if not self.producer.up:
            reasons.append("kafka_unavailable")
        elif self.producer.broken:
            reasons.append("kafka_producer_replaced")
        reasons += [
            f"kafka_stalled: no partition of {topic} takes records" for topic in self.producer.unwritable_topics
        ]
        reasons += self.progress.reasons
        if self.producer.full:
            reasons.append("producer_queue_full")
        return reasons

    def details(self) -> dict[str, Any]:
        """What ``/health`` shows beside the reasons."""
        books = self.books.summary()
        return {
            "state": self.lifecycle.state.value,
            "connections": len(self.sessions),
            "companies": self.books.companies,
            "kafka": {
                "bootstrap_servers": self.bootstrap_servers,
                "up": self.producer.up,
                "queue_messages": len(self.producer),
                "queue_full": self.producer.full,
                "unwritable_partitions": [f"{topic}/{number}" for topic, number in sorted(self.producer.unwritable)],
            },
            "messages": {**shown_books(books.totals), "unbalanced_companies": books.unbalanced_companies},
            "spool": {
                "directory": self.spool_directory,
                "waiting_records": len(self.spool or ()),
                "fault": self.spool.fault if self.spool is not None else "",
            },
            "version": self.version,
        }

    def exposition(self) -> Exposition:
        """The page of /metrics."""
        gauges = Gauges(
            connections=lambda: len(self.sessions),
            producer_queue=lambda: len(self.producer),
            paused=self.paused,
            ready=lambda: not self.reasons(),
            kafka_up=lambda: self.producer.up,
            spool_waiting=lambda: len(self.spool or ()),
            spool_ok=lambda: self.spool is None or not self.spool.fault,
        )
        return Exposition(self.counters, self.books, gauges, self.version)

    def sidecar(self, exposition: Exposition) -> Sidecar:
        """The sidecar's application."""
        return Sidecar(
            reasons=self.reasons,
            details=self.details,
            metrics=lambda: exposition.page(trio.current_time()),
            version={"gateway": self.version, "python": platform.python_version()},
        )
