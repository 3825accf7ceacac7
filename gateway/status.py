"""What a daemon says about itself: why it is not ready, its books, its metrics. All of it is read when asked for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from gateway.sidecar.asgi import Sidecar
from gateway.telemetry.metrics import Exposition, Gauges

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from gateway.core.books import Books
    from gateway.egress.producer import KafkaProducer
    from gateway.egress.spooling import Replay, SpoolWriter
    from gateway.lifecycle import Lifecycle
    from gateway.telemetry.metrics import Counters


def shown_books(books: Books) -> dict[str, int]:
    """The totals as the sidecar and the last line of the log give them."""
    totals = books.totals()
    return {
        "received": totals.received,
        "delivered": totals.delivered,
        "dead_lettered": totals.dead_lettered,
        "dropped": totals.dropped,
        "spooled": totals.spooled,
        "in_flight": totals.in_flight,
        "imbalance": totals.imbalance,
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
        elif self.producer.broken:
            reasons.append("kafka_producer_replaced")
        elif not self.producer.up:
            reasons.append("kafka_unavailable")
        if self.producer.full:
            reasons.append("producer_queue_full")
        return reasons

    def details(self) -> dict[str, Any]:
        """What ``/health`` shows beside the reasons."""
        return {
            "state": self.lifecycle.state.value,
            "connections": len(self.sessions),
            "companies": self.books.companies,
            "kafka": {
                "bootstrap_servers": self.bootstrap_servers,
                "up": self.producer.up,
                "queue_messages": len(self.producer),
                "queue_full": self.producer.full,
            },
            "messages": {
                **shown_books(self.books),
                "unbalanced_companies": len(self.books.unbalanced_companies()),
            },
            "spool": {
                "directory": self.spool_directory,
                "waiting_records": len(self.spool or ()),
                "fault": self.spool.fault if self.spool is not None else "",
            },
            "version": self.version,
        }

    def sidecar(self) -> Sidecar:
        """The sidecar's application."""
        gauges = Gauges(
            connections=lambda: len(self.sessions),
            producer_queue=lambda: len(self.producer),
            paused=self.paused,
            ready=lambda: not self.reasons(),
            kafka_up=lambda: self.producer.up,
            spool_waiting=lambda: len(self.spool or ()),
            spool_ok=lambda: self.spool is None or not self.spool.fault,
        )
        exposition = Exposition(self.counters, self.books, gauges, self.version)
        return Sidecar(
            reasons=self.reasons,
            details=self.details,
            metrics=lambda: exposition.page(trio.current_time()),
            version={"gateway": self.version, "python": platform.python_version()},
        )
