"""What a process has counted, as its /metrics page says it."""

from __future__ import annotations

from gateway.ops.aggregate import parse
from gateway.telemetry.metrics import Metrics


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels; a histogram's is how much it has observed."""
    family = parse(metrics.last_page().decode())[name]
    samples = [sample for sample in family.samples if not sample.name.endswith(("_bucket", "_sum"))]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
