"""The accounts: where every message is that the gateway took.

At every moment, for each company and for the process,
``received = delivered + dead_lettered + dropped + spooled + in_flight``.

``in_flight`` is counted on its own, up when a record is handed to the producer and down when its fate is
reported, so the equation can fail and is worth checking (`Books.totals`, ``gateway_books_imbalance``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

UNKNOWN_TYPE: Final = "unknown"
"""The message type of what has no route; whatever the client wrote there never becomes a label."""


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

    @property
    def imbalance(self) -> int:
        """Messages that the equation cannot place; 0 unless there is a bug."""
        return self.received - (self.delivered + self.dead_lettered + self.dropped + self.spooled + self.in_flight)

    def add(self, other: Tally) -> None:
        """Add every count of ``other`` to this one."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_COUNTS: Final = tuple(count.name for count in fields(Tally) if count.name != "message_type")


@dataclass(slots=True)
class _Company:
    connections: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)


class Books:
    """The tallies of all companies.

    A company without connections and without messages in flight is folded into a common remainder
    (`fold`), so memory follows the companies that are there, not all that ever were.
    """

    def __init__(self) -> None:
        self._companies: dict[str, _Company] = {}
        self._gone: dict[str, Tally] = {}

    def open(self, company_id: str) -> None:
        """Note one more connection of ``company_id``."""
        self._companies.setdefault(company_id, _Company()).connections += 1

    def close(self, company_id: str) -> None:
        """Note one connection of ``company_id`` less."""
        self._companies[company_id].connections -= 1

    def tally(self, company_id: str, message_type: str) -> Tally:
        """The tally to count into; valid while the company is connected or has messages in flight."""
        tallies = self._companies.setdefault(company_id, _Company()).tallies
        return tallies.setdefault(message_type, Tally(message_type))

    def fold(self) -> None:
        """Move the tallies of companies that are gone into the remainder."""
        idle = [
            company_id
            for company_id, company in self._companies.items()
            if not company.connections and not any(tally.in_flight for tally in company.tallies.values())
        ]
        for company_id in idle:
            for message_type, tally in self._companies.pop(company_id).tallies.items():
                self._gone.setdefault(message_type, Tally()).add(tally)

    def by_type(self) -> dict[str, Tally]:
        """Sums over all companies for each message type."""
        sums: dict[str, Tally] = {}
        for message_type, tally in self._all():
            sums.setdefault(message_type, Tally()).add(tally)
        return sums

    def totals(self) -> Tally:
        """Sums over everything."""
        return _sum(tally for _, tally in self._all())

    def company(self, company_id: str) -> Tally:
        """Sums over one connected company's types; zeros for one that is not there."""
        company = self._companies.get(company_id)
        return _sum(company.tallies.values() if company else ())

    def unbalanced_companies(self) -> list[str]:
        """Companies whose books do not balance, for the log: always empty unless there is a bug."""
        return [company_id for company_id in self._companies if self.company(company_id).imbalance]

    @property
    def companies(self) -> int:
        """Companies with a connection or a message in flight."""
        return len(self._companies)

    def _all(self) -> Iterator[tuple[str, Tally]]:
        yield from self._gone.items()
        for company in self._companies.values():
            yield from company.tallies.items()


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
