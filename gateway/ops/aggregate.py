"""One /metrics page out of several processes': counters and histograms add up, gauges add up or take the worst.

A process that has ended keeps its counters in the sum (`Sum.retire`), so that no counter ever goes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable

LOWEST: Final = frozenset({"gateway_kafka_up", "gateway_spool_ok", "process_start_time_seconds"})
"""Gauges of which the lowest counts: something is up when it is up everywhere."""
HIGHEST: Final = frozenset({"gateway_ready", "gateway_build_info", "python_info", "process_max_fds"})
"""Gauges of which the highest counts: the host is ready when one of its processes is."""
_RUNNING: Final = ("counter", "histogram", "summary")

Labels = tuple[tuple[str, str], ...]


class Family:
    """One metric of one process or of their sum."""

    __slots__ = ("kind", "samples", "text")

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text
        self.samples: dict[tuple[str, Labels], float] = {}


Page = dict[str, Family]


def parse(page: str) -> Page:
    """A /metrics page by family. Raises ValueError for what is no Prometheus text."""
    families: Page = {}
    for found in text_string_to_metric_families(page):
        family = families[found.name] = Family(found.type, found.documentation)
        for sample in found.samples:
            if not sample.name.endswith("_created"):
                family.samples[sample.name, tuple(sample.labels.items())] = sample.value
    return families


def value(page: Page, name: str) -> float:
    """The sum of a metric's samples on a page, 0 where it is not there."""
    return sum(page[name].samples.values()) if name in page else 0.0


class Sum:
    """The sum of the processes that run and of the counters of those that ran."""

    def __init__(self) -> None:
        self._retired: Page = {}

    def retire(self, page: Page) -> None:
        """Keep the counters of a process that has ended."""
        running = {name: family for name, family in page.items() if family.kind in _RUNNING}
        self._retired = _add([self._retired, running])

    def text(self, pages: Iterable[Page], own: Iterable[tuple[str, str, str, float]]) -> bytes:
        """Prometheus text of the sum; ``own`` are further metrics as (name, kind, text, value)."""
        total = _add([self._retired, *pages])
        for name, kind, text, value in own:
            family = total[name] = Family(kind, text)
            family.samples[name + ("_total" if kind == "counter" else ""), ()] = value
        lines: list[str] = []
        for name, family in total.items():
            shown = name + ("_total" if family.kind == "counter" else "")
            lines += [f"# HELP {shown} {_escaped(family.text)}", f"# TYPE {shown} {family.kind}"]
            for (sample, labels), value in family.samples.items():
                pairs = ",".join(f'{label}="{_escaped(text, quoted=True)}"' for label, text in labels)
                lines.append(f"{sample}{'{' + pairs + '}' if pairs else ''} {value!r}")
        return ("\n".join(lines) + "\n").encode()


def _add(pages: Iterable[Page]) -> Page:
    total: Page = {}
    for page in pages:
        for name, family in page.items():
            into = total.setdefault(name, Family(family.kind, family.text))
            for key, value in family.samples.items():
                if key not in into.samples:
                    into.samples[key] = value
                elif name in LOWEST:
                    into.samples[key] = min(into.samples[key], value)
                elif name in HIGHEST:
                    into.samples[key] = max(into.samples[key], value)
                else:
                    into.samples[key] += value
    return total


def _escaped(text: str, *, quoted: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quoted else text
