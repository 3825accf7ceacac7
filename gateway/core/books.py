"""The accounts: where every message is that the gateway took.

At every moment, for each company and for the process,
``received = delivered + dead_lettered + dropped + spooled + in_flight``, in messages and in bytes. Bytes are those of
the messages as received: what the gateway stamps on them is not counted.

``in_flight`` is counted on its own (`gateway.core.tally.Tally`), so the equation can fail and is worth checking
(`Books.totals`, ``gateway_books_imbalance``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.core.tally import Tally
from gateway.core.tenants import Tenants

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from gateway.core.tenants import Company, Moment

UNKNOWN_TYPE: Final = "unknown"
"""The message type of what has no route; whatever the client wrote there never becomes a label."""


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


def _is_unbalanced(company: Company) -> bool:
    """Whether either equation fails, for any type."""
    return any(tally.imbalance or tally.imbalance_bytes for tally in company.tallies.values())


FEW_COMPANIES: Final = 256
"""Up to so many companies are summed up whenever somebody asks, which takes a millisecond or two at most."""
SLICE_COMPANIES: Final = 200
"""Companies summed up in one step of `Books.recount`."""


class Books:
    """The tallies of all companies.

    They are the companies' own (`gateway.core.tenants.Company`). A company that is idle and has no messages in flight
    is folded into a common remainder, so memory follows the companies that are there, not all that ever were. That, and
    summing up many companies, is the work of `recount`, which somebody steps through once a second; between, `summary`
    is as old as that with more than `FEW_COMPANIES`.
    """

    def __init__(self, tenants: Tenants | None = None) -> None:
        self.tenants = Tenants() if tenants is None else tenants
        self._companies = self.tenants.companies
        self._gone: dict[str, Tally] = {}
        self._remembered = 0  # companies that are kept for their budgets or for users who have just left
        self._counted: Summary | None = None

    def tally(self, company_id: str, message_type: str) -> Tally:
        """The tally to count into; valid while the company is connected or has messages in flight."""
        tallies = self.tenants.company(company_id).tallies
        return tallies.setdefault(message_type, Tally(message_type))

    def fold(self, utc: Moment | None = None) -> None:
        """Move the tallies of companies that are gone into the remainder; ``utc`` tells whose budgets are over."""
        idle, remembered = [], 0
        for company_id, company in self._companies.items():
            if company.connections or any(tally.in_flight for tally in company.tallies.values()):
                continue
            if company.is_idle(utc):
                idle.append(company_id)
            else:
                remembered += 1
        self._remembered = remembered
        gone: dict[str, list[Tally]] = {}
        for company_id in idle:
            for message_type, tally in self._companies.pop(company_id).tallies.items():
                gone.setdefault(message_type, []).append(tally)
        for message_type, tallies in gone.items():
            self._gone.setdefault(message_type, Tally()).add(tallies)

    def recount(self, utc: Moment | None = None) -> Iterator[None]:
        """Fold, and sum everything up in steps of 2 ms or so with 10,000 companies; others may run between two."""
        self.fold(utc)
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
            unbalanced += sum(map(_is_unbalanced, part))
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
        return [company_id for company_id, company in self._companies.items() if _is_unbalanced(company)]

    @property
    def companies(self) -> int:
        """Companies with a connection or a message in flight; as of the last `fold`, others may be among them."""
        return len(self._companies) - self._remembered

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
