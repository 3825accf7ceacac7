"""One /metrics page out of several processes': counters and histograms add up, gauges add up or as they say themselves.

A process that has ended keeps its counters in the sum (`Sum.retire`), so that no counter ever goes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.metrics import THE_CLIENTS_OWN, Across

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Page = dict[str, Metric]
"""The metric families of one process, or of several, by name."""

_RUNNING: Final = ("counter", "histogram", "summary")
_COMBINE: Final[dict[Across, Callable[[float, float], float]]] = {
    Across.SUM: float.__add__,
    Across.LOWEST: min,
    Across.HIGHEST: max,
}


def parse(page: str) -> Page:
    """A /metrics page by family. Raises ValueError for what is no Prometheus text."""
    families: Page = {}
    for found in text_string_to_metric_families(page):
        samples = {(s.name, tuple(s.labels.items())): s.value for s in found.samples if not s.name.endswith("_created")}
        families[found.name] = _metric(found, samples)
    return families


def value(page: Page, name: str) -> float:
    """The sum of a metric's samples on a page, 0 where it is not there."""
    return sum(sample.value for sample in page[name].samples) if name in page else 0.0


class Sum:
    """The sum of the processes that run and of the counters of those that ran."""

    def __init__(self) -> None:
        self._retired: Page = {}
        self._across: dict[str, Across] = dict(THE_CLIENTS_OWN)

    def learn(self, across: Mapping[str, str]) -> None:
        """How metrics of these names make one where it is not by their sum (`Across`), as a process says itself."""
        self._across |= {name: Across(how) for name, how in across.items()}

    def retire(self, page: Page) -> None:
        """Keep the counters of a process that has ended."""
        running = {name: family for name, family in page.items() if family.type in _RUNNING}
        self._retired = self._add([self._retired, running])

    def text(self, pages: Iterable[Page], own: Iterable[Metric]) -> bytes:
        """Prometheus text of the sum, with ``own`` metrics behind it."""
        families = [*self._add([self._retired, *pages]).values(), *own]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families))
        return generate_latest(registry)

    def _add(self, pages: Iterable[Page]) -> Page:
        texts: Page = {}
        sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for page in pages:
            for name, family in page.items():
                texts.setdefault(name, family)
                into = sums.setdefault(name, {})
                combine = _COMBINE[self._across.get(name, Across.SUM)]
                for sample in family.samples:
                    key = (sample.name, tuple(sample.labels.items()))
                    into[key] = combine(into[key], sample.value) if key in into else sample.value
        return {name: _metric(texts[name], samples) for name, samples in sums.items()}


def _metric(like: Metric, samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> Metric:
    metric = Metric(like.name, like.documentation, like.type)
    for (name, labels), number in samples.items():
        metric.add_sample(name, dict(labels), number)
    return metric


class _Families:
    """Metrics as prometheus-client collects them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
