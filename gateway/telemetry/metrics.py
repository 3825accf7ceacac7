"""The metrics of one process and their Prometheus exposition.

Whoever counts declares what it counts, in its constructor, and keeps what it gets: a `Counter` is an int to add to (a
prometheus-client child's ``inc()`` costs 240 ns, an int 30). `Metrics.page` turns all of it into text when somebody
asks, at most once a second. Every label has a fixed set of values, from the start.
"""

from __future__ import annotations

from bisect import bisect_left
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.platform_collector import PlatformCollector

from gateway.telemetry.process import ProcessCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client import Metric

CACHE_S: Final = 1.0
"""A page is reused this long: producing one takes milliseconds of the event loop."""

LAG_PROBE_S: Final = 0.1
LAG_BUCKETS_S: Final = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)


class Across(Enum):
    """How the values of a host's processes make the host's."""

    SUM = "sum"
    LOWEST = "lowest"
    """Something is up when it is up everywhere."""
    HIGHEST = "highest"
    """Something is there when one of them has it."""


THE_CLIENTS_OWN: Final = {
    "process_start_time_seconds": Across.LOWEST,
    "process_max_fds": Across.HIGHEST,
    "python_info": Across.HIGHEST,
}
"""What prometheus-client and `ProcessCollector` bring along and what is not summed up."""


class Counter:
    """Something that is counted: add to ``value``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, count: int = 1) -> None:
        """Count."""
        self.value += count


class Labelled(dict[str, int]):
    """Counts by the value of one label. One that was not declared starts at 0: nothing fails for a forgotten entry."""

    def __missing__(self, value: str) -> int:
        return 0

    def add(self, value: str, count: int = 1) -> None:
        """Count."""
        self[value] += count


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


class Metrics:
    """What one process counts. A name that is declared again is the same metric again."""

    def __init__(self) -> None:
        self._families: dict[str, Callable[[], Iterable[Metric]]] = {}
        self._kept: dict[str, Counter | Labelled | Histogram] = {}
        self.across: dict[str, Across] = dict(THE_CLIENTS_OWN)
        """How to add up the metrics of several processes where it is not by their sum."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(ProcessCollector())
        PlatformCollector(registry=self._registry)
        self._page = b""
        self._made_at = float("-inf")

    def counter(self, name: str, text: str) -> Counter:
        """Declare a counter; ``name`` is without its ``_total``."""
        counter = self._kept.setdefault(name, Counter())
        assert isinstance(counter, Counter)  # noqa: S101  # a name is declared as one kind
        self._families[name] = lambda: [CounterMetricFamily(name, text, value=counter.value)]
        return counter

    def labelled(self, name: str, text: str, label: str, values: Iterable[str]) -> Labelled:
        """Declare a counter with one label and its values; ``name`` is without its ``_total``."""
        counts = self._kept.setdefault(name, Labelled(dict.fromkeys(values, 0)))
        assert isinstance(counts, Labelled)  # noqa: S101  # as above

        def collect() -> Iterable[Metric]:
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family

        self._families[name] = collect
        return counts

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        """Declare a histogram of seconds."""
        histogram = self._kept.setdefault(name, Histogram(bounds))
        assert isinstance(histogram, Histogram)  # noqa: S101  # as above
        self._families[name] = lambda: [
            HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.total)
        ]
        return histogram

    def gauge(self, name: str, text: str, read: Callable[[], float], *, across: Across = Across.SUM) -> None:
        """Declare a value that is read when somebody asks."""
        self._families[name] = lambda: [GaugeMetricFamily(name, text, read())]
        self._note(name, across)

    def info(self, name: str, text: str, label: str, value: str) -> None:
        """Declare a metric that is always 1 and says ``value`` in its label."""

        def collect() -> Iterable[Metric]:
            family = GaugeMetricFamily(name, text, labels=[label])
            family.add_metric([value], 1)
            yield family

        self._families[name] = collect
        self._note(name, Across.HIGHEST)

    def families(self, name: str, collect: Callable[[], Iterable[Metric]]) -> None:
        """Declare several metrics that are read in one go; ``name`` is theirs together."""
        self._families[name] = collect

    def _note(self, name: str, across: Across) -> None:
        if across is not Across.SUM:
            self.across[name] = across

    def collect(self) -> Iterable[Metric]:
        """The metric families (prometheus-client's Collector protocol)."""
        for family in self._families.values():
            yield from family()

    def page(self, now: float) -> bytes:
        """Prometheus text as of ``now`` (seconds of a steady clock), up to `CACHE_S` old."""
        if now - self._made_at >= CACHE_S:
            self._page = self.last_page()
            self._made_at = now
        return self._page

    def last_page(self) -> bytes:
        """Prometheus text of this very moment."""
        return generate_latest(self._registry)


async def probe_loop_lag(metrics: Metrics) -> None:
    """Measure until cancelled how late the event loop wakes a task that slept for `LAG_PROBE_S`."""
    lag = metrics.histogram("gateway_loop_lag_seconds", "How late the event loop woke a sleeper.", LAG_BUCKETS_S)
    while True:
        due = trio.current_time() + LAG_PROBE_S
        await trio.sleep_until(due)
        lag.observe(max(0.0, trio.current_time() - due))
