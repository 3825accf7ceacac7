"""Figures out of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def percentile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the values do not exceed, nan of nothing."""
    ordered = sorted(values)  # costs little where they are sorted already
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")
