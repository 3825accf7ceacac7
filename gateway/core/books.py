"""The accounts: where every message is that the gateway took.

At every moment, for each company and for the process,
``received = delivered + dead_lettered + dropped + spooled + in_flight``, in messages and in bytes. Bytes are those of
the messages as received: what the gateway stamps on them is not counted.

``in_flight`` is counted on its own, up when a message is taken (`Tally.receive`) and down when its fate is known
(`Tally.move`), so the equation can fail and is worth checking (`Books.totals`, ``gateway_books_imbalance``). Nobody
else changes a count, but for the two hot paths that say so where they do: a session's loop and a lane's report.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

Place = Literal["in_flight", "delivered", "dead_lettered", "dropped", "spooled"]
"""Where a message can be that was received."""

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
    in_flight_bytes: int = 0

    def receive(self, size: int) -> None:
        """A message of ``size`` bytes has been taken: it is in flight."""
        self.received += 1
        self.received_bytes += size
        self.in_flight += 1
        self.in_flight_bytes += size

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


@dataclass(frozen=True, slots=True)
class Summary:
    """What the books said at one moment, or each company's at one moment within a second."""

    by_type: dict[str, Tally]
    unbalanced_companies: int
    """Always 0 unless there is a bug."""

    @property
    def totals(self) -> Tally:
        """Sums over everything."""
        return _sum(self.by_type.values())


@dataclass(slots=True)
class _Company:
    connections: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)

    def count(self, change: int) -> None:
        """``change`` connections more, or less."""
        self.connections += change

    @property
    def unbalanced(self) -> bool:
        """Whether either equation fails, for any type."""
        return any(tally.imbalance or tally.imbalance_bytes for tally in self.tallies.values())


FEW_COMPANIES: Final = 256
"""Up to so many companies are summed up whenever somebody asks, which takes a millisecond or two at most."""
SLICE_COMPANIES: Final = 200
"""Companies summed up in one step of `Books.recount`."""


class Books:
    """The tallies of all companies.

    A company without connections and without messages in flight is folded into a common remainder, so memory follows
    the companies that are there, not all that ever were. That, and summing up many companies, is the work of `recount`,
    which somebody steps through once a second; between, `summary` is as old as that with more than `FEW_COMPANIES`.
    """

    def __init__(self) -> None:
        self._companies: dict[str, _Company] = {}
        self._gone: dict[str, Tally] = {}
        self._counted: Summary | None = None

    def open(self, company_id: str) -> None:
        """Note one more connection of ``company_id``."""
        self._companies.setdefault(company_id, _Company()).count(1)

    def close(self, company_id: str) -> None:
        """Note one connection of ``company_id`` less."""
        self._companies[company_id].count(-1)

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
        gone: dict[str, list[Tally]] = {}
        for company_id in idle:
            for message_type, tally in self._companies.pop(company_id).tallies.items():
                gone.setdefault(message_type, []).append(tally)
        for message_type, tallies in gone.items():
            self._gone.setdefault(message_type, Tally()).add(tallies)

    def recount(self) -> Iterator[None]:
        """Fold, and sum everything up in steps of 2 ms or so with 10,000 companies; others may run between two."""
        self.fold()
        if len(self._companies) <= FEW_COMPANIES:
            self._counted = None
            return
        sums: dict[str, Tally] = {}
        unbalanced = 0
        companies = list(self._companies.values())
        _add(sums, self._gone.items())
        for at in range(0, len(companies), SLICE_COMPANIES):
            part = companies[at : at + SLICE_COMPANIES]
            _add(sums, (item for company in part for item in company.tallies.items()))
            unbalanced += sum(company.unbalanced for company in part)
            yield
        self._counted = Summary(sums, unbalanced)

    def summary(self) -> Summary:
        """Sums of this moment; of the last `recount` with many companies."""
        if self._counted is not None and len(self._companies) > FEW_COMPANIES:
            return self._counted
        return Summary(self.by_type(), len(self.unbalanced_companies()))

    def by_type(self) -> dict[str, Tally]:
        """Sums over all companies for each message type."""
        sums: dict[str, Tally] = {}
        _add(sums, self._all())
        return sums

    def totals(self) -> Tally:
        """Sums over everything."""
        return _sum(self.by_type().values())

    def company(self, company_id: str) -> Tally:
        """Sums over one connected company's types; zeros for one that is not there."""
        company = self._companies.get(company_id)
        return _sum(company.tallies.values() if company else [])

    def unbalanced_companies(self) -> list[str]:
        """Companies whose books do not balance, for the log: always empty unless there is a bug."""
        return [company_id for company_id, company in self._companies.items() if company.unbalanced]

    @property
    def companies(self) -> int:
        """Companies with a connection or a message in flight."""
        return len(self._companies)

    def _all(self) -> Iterator[tuple[str, Tally]]:
        yield from self._gone.items()
        for company in self._companies.values():
            yield from company.tallies.items()


def _add(sums: dict[str, Tally], items: Iterable[tuple[str, Tally]]) -> None:
    """Add tallies to the sum of their type."""
    tallies: dict[str, list[Tally]] = {}
    for message_type, tally in items:
        tallies.setdefault(message_type, []).append(tally)
    for message_type, found in tallies.items():
        sums.setdefault(message_type, Tally(message_type)).add(found)


def _sum(tallies: Collection[Tally]) -> Tally:
    total = Tally()
    total.add(tallies)
    return total
