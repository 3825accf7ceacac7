"""Delays between attempts that grow while they fail."""

from __future__ import annotations


class Doubling:
    """Delays from ``first_s``, doubling up to ``max_s``, until `reset`."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def reset(self) -> None:
        """An attempt succeeded: the next delay is the first one again."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """The next delay, in seconds."""
        delay_s, self._next_s = self._next_s, min(self._max_s, self._next_s * 2)
        return delay_s
