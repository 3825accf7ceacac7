"""The counts that the books are made of (`gateway.core.books`): one company's messages of one type.

A message is counted up when it is taken (`Tally.receive`, `Tally.drop`) and moves when its fate is known
(`Tally.move`). Nobody else changes a count, but for the two hot paths that say so where they do: a session's loop and a
lane's report.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Collection

Place = Literal["in_flight", "delivered", "dead_lettered", "dropped", "spooled"]
"""Where a message can be that was received."""


@dataclass(slots=True)
class Tally:
    """Counts of one company's messages of one type. Plain ints: the hot path adds to them directly."""

    message_type: str = ""
    received: int = 0
    received_bytes: int = 0
    delivered: int = 0
    delivered_bytes: int = 0
    dead_lettered: int = 0
    dead_lettered_bytes: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    spooled: int = 0
    spooled_bytes: int = 0
    in_flight: int = 0
    in_flight_bytes: int = 0

    def receive(self, size: int) -> None:
        """A message of ``size`` bytes has been taken: it is in flight."""
        self.received += 1
        self.received_bytes += size
        self.in_flight += 1
        self.in_flight_bytes += size

    def drop(self, count: int, size: int) -> None:
        """``count`` messages of ``size`` bytes together have been received and dropped as they came."""
        self.received += count
        self.received_bytes += size
        self.dropped += count
        self.dropped_bytes += size

    def move(self, source: Place, target: Place, size: int) -> None:
        """A message of ``size`` bytes that was at ``source`` is at ``target`` now."""
        for place, change in ((source, -1), (target, 1)):
            setattr(self, place, getattr(self, place) + change)
            name = f"{place}_bytes"
            setattr(self, name, getattr(self, name) + change * size)

    @property
    def imbalance(self) -> int:
        """Messages that the equation cannot place; 0 unless there is a bug."""
        return self.received - (self.delivered + self.dead_lettered + self.dropped + self.spooled + self.in_flight)

    @property
    def imbalance_bytes(self) -> int:
        """Bytes that the equation cannot place; 0 unless there is a bug."""
        placed = self.delivered_bytes + self.dead_lettered_bytes + self.dropped_bytes + self.spooled_bytes
        return self.received_bytes - (placed + self.in_flight_bytes)

    def add(self, others: Collection[Tally]) -> None:
        """Add every count of ``others`` to this one."""
        # hot: for a scrape, over thousands of companies; a column at a time in C takes 0.4 us a tally, adding count by
        # count takes five times that
        for name, get in _COUNTS.items():
            setattr(self, name, sum(map(get, others), getattr(self, name)))


_COUNTS: Final = {count.name: attrgetter(count.name) for count in fields(Tally) if count.name != "message_type"}
