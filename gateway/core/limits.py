"""What a tier allows, and the buckets that measure it.

Every number is of a `TierLimits`; 0 is no limit. A company's budgets are `Bucket` s. A user's rate is kept as the time
at which its bucket would be full again (the generic cell rate algorithm of ITU-T I.371): that is exact, and one
addition and one comparison a read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

NO_LIMIT: Final = 0
SURELY: Final = 1e-9
"""A token that is short of one by less than this is one: seconds times a rate are not exact."""


@dataclass(frozen=True, slots=True)
class TierLimits:
    """What one tier allows; 0 is no limit. One instance a tier is shared by all companies that have it."""

    messages_per_second: float = NO_LIMIT
    """Of one user, over all its connections."""
    burst_s: float = 2.0
    """So many seconds' worth may come at once, of every rate here; one message in any case."""
    company_messages_per_second: float = NO_LIMIT
    company_bytes_per_second: float = NO_LIMIT
    company_bytes_per_day: int = NO_LIMIT
    """Of messages as received; days and months are UTC's."""
    company_bytes_per_month: int = NO_LIMIT
    users: int = NO_LIMIT
    """Distinct users of a company that are connected."""
    accounts: int = NO_LIMIT
    """MT5 accounts of a company that are connected; each belongs to its user."""
    accounts_per_user: int = NO_LIMIT
    connections_per_account: int = NO_LIMIT
    """One more replaces the oldest (4429)."""
    pairs: int = NO_LIMIT
    """Symbols that a user streams."""
    pace: float = field(init=False)
    """Seconds of the rate that one message of a user takes; 0 without a rate."""
    allowance: float = field(init=False)
    """Seconds by which a user may be ahead of its rate; below 0 where the company's budgets have to be asked first."""

    def __post_init__(self) -> None:
        """Work out what the hot path needs."""
        rate = self.messages_per_second
        allowance = max(1 / rate, self.burst_s) + SURELY if rate else math.inf
        object.__setattr__(self, "pace", 1 / rate if rate else 0.0)
        object.__setattr__(self, "allowance", -1.0 if self.metered else allowance)

    @property
    def metered(self) -> bool:
        """Whether the company as a whole has a budget that every message must be taken from."""
        return bool(
            self.company_messages_per_second
            or self.company_bytes_per_second
            or self.company_bytes_per_day
            or self.company_bytes_per_month
        )

    @property
    def told_rate(self) -> float:
        """The rate that holds for a user's messages, the company's counted in; 0 for none."""
        rates = [rate for rate in (self.messages_per_second, self.company_messages_per_second) if rate]
        return min(rates, default=NO_LIMIT)


def capacity(rate: float, burst_s: float) -> float:
    """Tokens that a bucket of ``rate`` a second holds: one at least, or nothing could ever be taken."""
    return max(1.0, rate * burst_s)


class Bucket:
    """Tokens of one rate. ``level`` may be below 0: what was taken in advance is paid back first."""

    __slots__ = ("_at", "level")

    def __init__(self, level: float, now: float) -> None:
        self.level = level
        self._at = now

    def fill(self, rate: float, full: float, now: float) -> float:
        """Add what has come in since the last time, up to ``full``; return the level."""
        # a clock that went back brings nothing, and what it shows is the time from now on
        self.level = min(full, self.level + max(0.0, now - self._at) * rate)
        self._at = now
        return self.level

    def take(self, tokens: float) -> None:
        """Take tokens out."""
        self.level -= tokens
