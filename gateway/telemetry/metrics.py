"""Counters and their Prometheus exposition.

The hot path adds to plain ints (a prometheus-client child's ``inc()`` costs 240 ns, an int 30); `Exposition` turns them
into metric families when somebody asks, at most once a second. Every label has a fixed set of values.
"""

from __future__ import annotations

import os
import resource
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.platform_collector import PlatformCollector

from gateway.core import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client import Metric

    from gateway.core.books import Books, Tally

CACHE_S: Final = 1.0
"""An exposition is reused this long: producing one takes milliseconds of the event loop."""

LAG_PROBE_S: Final = 0.1

ROUTING_BUCKETS_S: Final = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3)
DELIVERY_BUCKETS_S: Final = (
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    30.0,
    60.0,
)
LAG_BUCKETS_S: Final = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)

HANDSHAKE_OUTCOMES: Final = (
    "accepted",
    "disconnected",
    "tls_failed",
    "overflow",
    "error",
    *catalogue.refusal_codes(),
)
CLOSE_OUTCOMES: Final = ("peer_closed", "peer_lost", "stalled_peer", "cancelled", *catalogue.close_names())


class Histogram:
    """Cumulative buckets over values in seconds; `observe` costs about 200 ns."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` ``times`` times."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds with cumulative counts, as Prometheus wants them."""
        running = 0
        result: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self.counts, strict=True):
            running += count
            result.append((bound, float(running)))
        return result


@dataclass(slots=True)
class Counters:
    """Everything that is counted outside the books. Dictionaries hold every allowed label from the start."""

    handshakes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HANDSHAKE_OUTCOMES, 0))
    closes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLOSE_OUTCOMES, 0))
    dead_letters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(catalogue.dead_letter_reasons(), 0))
    dead_letter_attempts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(catalogue.dead_letter_reasons(), 0)
    )
    spooled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(catalogue.give_up_reasons(), 0))
    drops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(catalogue.give_up_reasons(), 0))
    pauses: int = 0
    renewals: int = 0
    replayed: int = 0
    kafka_errors: int = 0
    log_lines_lost: int = 0
    reloads: dict[str, int] = field(default_factory=lambda: {"ok": 0, "failed": 0})
    routing_s: Histogram = field(default_factory=lambda: Histogram(ROUTING_BUCKETS_S))
    delivery_s: Histogram = field(default_factory=lambda: Histogram(DELIVERY_BUCKETS_S))
    loop_lag_s: Histogram = field(default_factory=lambda: Histogram(LAG_BUCKETS_S))


@dataclass(slots=True)
class Gauges:
    """Values that are read when somebody asks."""

    connections: Callable[[], int]
    producer_queue: Callable[[], int]
    paused: Callable[[], bool]
    ready: Callable[[], bool]
    kafka_up: Callable[[], bool]
    spool_waiting: Callable[[], int]
    spool_ok: Callable[[], bool]


class ProcessCollector:
    """The ``process_*`` metrics that Prometheus' clients have in common, out of /proc/self alone (proc(5)).

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


_OUTCOMES: Final = ("received", "delivered", "dead_lettered", "dropped", "spooled")


class Exposition:
    """The ``/metrics`` page of one process."""

    def __init__(self, counters: Counters, books: Books, gauges: Gauges, version: str) -> None:
        self._counters = counters
        self._books = books
        self._gauges = gauges
        self._version = version
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(ProcessCollector())
        PlatformCollector(registry=self._registry)
        self._page = b""
        self._made_at = float("-inf")

    def page(self, now: float) -> bytes:
        """Prometheus text as of ``now`` (seconds of a steady clock), up to `CACHE_S` old."""
        if now - self._made_at >= CACHE_S:
            self._page = generate_latest(self._registry)
            self._made_at = now
        return self._page

    def collect(self) -> Iterable[Metric]:
        """The metric families (prometheus-client's Collector protocol)."""
        counters, gauges = self._counters, self._gauges
        build = GaugeMetricFamily("gateway_build_info", "The running version.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield GaugeMetricFamily("gateway_connections", "Open WebSocket connections.", gauges.connections())
        yield GaugeMetricFamily("gateway_ready", "1 while /health/ready answers 200.", gauges.ready())
        yield GaugeMetricFamily("gateway_kafka_up", "1 while a broker is connected.", gauges.kafka_up())
        yield GaugeMetricFamily("gateway_reading_paused", "1 while the producer queue is full.", gauges.paused())
        yield GaugeMetricFamily(
            "gateway_producer_queue_messages",
            "Records in the producer, unconfirmed.",
            gauges.producer_queue(),
        )
        yield _counter("gateway_handshakes", "Handshakes.", "outcome", counters.handshakes)
        yield _counter("gateway_connections_closed", "Connections ended.", "outcome", counters.closes)
        yield _counter("gateway_dead_letters", "Messages in the dead-letter topic.", "reason", counters.dead_letters)
        yield _counter(
            "gateway_dead_letter_attempts",
            "Dead letters handed to the producer, again after a failure.",
            "reason",
            counters.dead_letter_attempts,
        )
        yield _counter("gateway_spooled", "Messages written to the spool.", "reason", counters.spooled)
        yield _counter("gateway_drops", "Messages dropped.", "reason", counters.drops)
        yield _counter("gateway_reloads", "Reloads by SIGHUP.", "outcome", counters.reloads)
        yield CounterMetricFamily("gateway_reading_pauses", "Times the queue was full.", value=counters.pauses)
        yield CounterMetricFamily("gateway_producer_renewals", "Producers replaced.", value=counters.renewals)
        yield CounterMetricFamily("gateway_spool_replayed", "Records offered again.", value=counters.replayed)
        yield GaugeMetricFamily("gateway_spool_waiting_records", "Not on the disk yet.", gauges.spool_waiting())
        yield GaugeMetricFamily("gateway_spool_ok", "0 while the spool takes nothing.", gauges.spool_ok())
        yield CounterMetricFamily("gateway_kafka_errors", "Errors librdkafka reported.", value=counters.kafka_errors)
        yield CounterMetricFamily("gateway_log_lines_lost", "Log lines nobody read.", value=counters.log_lines_lost)
        yield from self._messages()
        for name, text, histogram in (
            (
                "gateway_routing_seconds",
                "One read, from its recv to the produce of the last message it brought.",
                counters.routing_s,
            ),
            ("gateway_delivery_seconds", "From receive to Kafka's acknowledgement.", counters.delivery_s),
            ("gateway_loop_lag_seconds", "How late the event loop woke a sleeper.", counters.loop_lag_s),
        ):
            yield HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.total)

    def _messages(self) -> Iterable[Metric]:
        books = self._books.summary()
        by_type, totals = books.by_type, books.totals
        yield _by_type("gateway_messages", "Messages by outcome.", by_type, "")
        yield _by_type("gateway_message_bytes", "Bytes of messages by outcome.", by_type, "_bytes")
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
        yield GaugeMetricFamily("gateway_companies", "Companies connected or in flight.", self._books.companies)


async def probe_loop_lag(counters: Counters) -> None:
    """Measure until cancelled how late the event loop wakes a task that slept for `LAG_PROBE_S`."""
    while True:
        due = trio.current_time() + LAG_PROBE_S
        await trio.sleep_until(due)
        counters.loop_lag_s.observe(max(0.0, trio.current_time() - due))


def _counter(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _by_type(name: str, text: str, by_type: dict[str, Tally], suffix: str) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=["outcome", "message_type"])
    for message_type, tally in sorted(by_type.items()):
        for outcome in _OUTCOMES:
            family.add_metric([outcome, message_type], getattr(tally, outcome + suffix))
    return family
