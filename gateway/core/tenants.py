"""Who is served at the moment: companies and their users, as objects that their connections share.

A `Company` has the tier, and with it the limits of all its users; a `User` has what its connections spend together.
Both appear with the first connection and are forgotten when they are idle: a user a minute after its last connection,
when its bucket is full and its window empty again, a company when nothing of it is left.

`Tenants.check` and `Tenants.enter` are the limits of a tenant: distinct users, MT5 accounts, connections of an account.
An account belongs to its user, whose token alone says who that is: nobody can take another's place by naming its
account. All times are in seconds of one steady clock but ``utc``, which is a `Moment`.
"""

from __future__ import annotations

import calendar
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from gateway.core import catalogue
from gateway.core.breaker import WINDOW_S, Window
from gateway.core.limits import SURELY, Bucket, TierLimits, capacity
from gateway.core.pairs import Pairs
from gateway.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gateway.core.catalogue import Close, Reason
    from gateway.core.principal import Principal
    from gateway.core.tally import Tally

# long: companies, users and the rules of their places

DAY_S: Final = 86_400
IDLE_S: Final = WINDOW_S
"""How long a user is remembered after its last connection: bursts are no longer than that either."""
NO_TIER: Final = TierLimits()


class Moment(Protocol):
    """A date and time of UTC: a ``datetime``."""

    @property
    def year(self) -> int: ...
    @property
    def month(self) -> int: ...
    @property
    def day(self) -> int: ...
    @property
    def hour(self) -> int: ...
    @property
    def minute(self) -> int: ...
    @property
    def second(self) -> int: ...
    def toordinal(self) -> int: ...


class Holder(Protocol):
    """Who holds a place: a connection."""

    @property
    def connection_id(self) -> str: ...
    @property
    def account(self) -> str: ...
    def revoke(self, close: Close, /) -> None:
        """The place is another's now: the connection is to be closed. Never raises."""


class Over(NamedTuple):
    """The end of a read that was over a limit."""

    reason: Reason
    dropped: int
    """Messages."""
    size: int
    """Their bytes."""
    messages_per_second: float
    """The rate that was exceeded, 0 where it was not a rate of messages."""
    retry_after_ms: int


class Company:
    """What the connections of one company share."""

    __slots__ = (
        "_budget",
        "_bytes",
        "_messages",
        "_tier_since",
        "accounts",
        "connections",
        "id",
        "limits",
        "live_users",
        "share",
        "tallies",
        "tier",
        "users",
    )

    def __init__(self, company_id: str, limits: TierLimits) -> None:
        self.id = company_id
        self.tier = ""
        self.limits = limits
        self.tallies: dict[str, Tally] = {}
        """Its books, by message type."""
        self.users: dict[str, User] = {}
        """By user_id, in the order in which they came; those too that have left a moment ago."""
        self.connections = 0
        self.live_users = 0
        self.accounts = 0
        """Distinct (user, account) that are connected."""
        self.share = 1.0
        """The part of its budgets that this process may spend: as its part of the connections is."""
        self._tier_since = -math.inf
        self._messages: Bucket | None = None
        self._bytes: Bucket | None = None
        self._budget: Budget | None = None

    def learn_tier(self, tier: str, issued_at: float, tiers: Mapping[str, TierLimits]) -> bool:
        """A token issued at ``issued_at`` names this tier; the newest token counts. True when that changed it."""
        if issued_at < self._tier_since:
            return False
        self._tier_since = issued_at
        changed = self.tier != tier
        self.tier = tier
        self.use_limits(tiers.get(tier, NO_TIER))
        return changed

    def use_limits(self, limits: TierLimits) -> None:
        """Go by these limits."""
        self.limits = limits

    def note_share(self, share: float) -> None:
        """This process may spend so much of the company's budgets, 0 to 1."""
        self.share = share

    def grant(self, sizes: Sequence[int], now: float, utc: Moment) -> tuple[int, Reason, float]:
        """How many of the next messages, by their sizes in bytes, the company's budgets take; what stopped the others,
        and in how many seconds one may be taken again."""
        limits, share = self.limits, self.share
        rate, byte_rate = limits.company_messages_per_second * share, limits.company_bytes_per_second * share
        room, room_bytes = math.inf, math.inf
        if rate:
            full = capacity(rate, limits.burst_s)
            self._messages = self._messages or Bucket(full, now)
            room = self._messages.fill(rate, full, now) + SURELY
        if byte_rate:
            full = capacity(byte_rate, limits.burst_s)
            self._bytes = self._bytes or Bucket(full, now)
            room_bytes = self._bytes.fill(byte_rate, full, now)
        left_today, left_s = self._left(utc)
        granted = taken_bytes = 0
        reason, wait_s = catalogue.DROPPED_COMPANY_RATE, 0.0
        for size in sizes:
            if taken_bytes + size > left_today:
                reason, wait_s = catalogue.DROPPED_COMPANY_BUDGET, left_s
                break
            if granted + 1 > room:
                wait_s = (granted + 1 - room) / rate
                break
            if taken_bytes >= room_bytes:  # a big one may be taken in advance
                wait_s = (taken_bytes - room_bytes) / byte_rate
                break
            granted += 1
            taken_bytes += size
        if self._messages is not None:
            self._messages.take(granted)
        if self._bytes is not None:
            self._bytes.take(taken_bytes)
        if self._budget is not None:
            self._budget.spend(taken_bytes)
        return granted, reason, wait_s

    def _left(self, utc: Moment) -> tuple[float, float]:
        """Bytes left of the budgets of this day and month, and seconds until there are more."""
        limits = self.limits
        if not (limits.company_bytes_per_day or limits.company_bytes_per_month):
            return math.inf, 0.0
        self._budget = self._budget or Budget()
        return self._budget.left(limits, self.share, utc)

    def is_idle(self, utc: Moment | None) -> bool:
        """Whether there is nothing that must be remembered of it, its books aside."""
        budget = self._budget
        return not self.connections and not self.users and (budget is None or (utc is not None and budget.is_over(utc)))

    # Counted by `Tenants`

    def count(self, *, connections: int = 0, users: int = 0, accounts: int = 0) -> None:
        """So many more are connected, or less."""
        self.connections += connections
        self.live_users += users
        self.accounts += accounts


class Budget:
    """Bytes of one UTC day and one UTC month.

    A clock that goes back by less than a day goes on with the budget it had; one that goes back further is believed.
    """

    __slots__ = ("day", "day_bytes", "month", "month_bytes")

    def __init__(self) -> None:
        self.day = 0
        self.day_bytes = 0
        self.month = (0, 0)
        self.month_bytes = 0

    def left(self, limits: TierLimits, share: float, utc: Moment) -> tuple[float, float]:
        """Bytes left, and seconds until there are more."""
        self._roll(utc)
        left, left_s = math.inf, 0.0
        day_ends_s = DAY_S - (utc.hour * 60 + utc.minute) * 60 - utc.second
        if limits.company_bytes_per_day:
            left, left_s = limits.company_bytes_per_day * share - self.day_bytes, day_ends_s
        if limits.company_bytes_per_month:
            month = limits.company_bytes_per_month * share - self.month_bytes
            if month < left:
                days = calendar.monthrange(utc.year, utc.month)[1] - utc.day
                left, left_s = month, day_ends_s + days * DAY_S
        return left, left_s

    def spend(self, size: int) -> None:
        """So many bytes were taken."""
        self.day_bytes += size
        self.month_bytes += size

    def is_over(self, utc: Moment) -> bool:
        """Whether another month has begun: nothing needs to be remembered."""
        self._roll(utc)
        return not self.month_bytes

    def _roll(self, utc: Moment) -> None:
        day = utc.toordinal()
        if day == self.day or day == self.day - 1:
            return
        self.day, self.day_bytes = day, 0
        if (utc.year, utc.month) != self.month:
            self.month, self.month_bytes = (utc.year, utc.month), 0


class User(Window):
    """What the connections of one user share. Its window counts messages, and those that were rejected or dropped.

    ``full_at`` is when its bucket will be full again, if nothing more is taken from it: each message puts it off by
    `TierLimits.pace`, and it may be `TierLimits.allowance` ahead. The hot path does that itself, and asks `grant` where
    it does not do.
    """

    __slots__ = ("company", "full_at", "pairs", "places", "user_id", "weight")

    def __init__(self, company: Company, user_id: str) -> None:
        super().__init__()
        self.company = company
        self.user_id = user_id
        self.full_at = 0.0
        self.places: tuple[Holder, ...] = ()
        """Its connections, oldest first."""
        self.weight = 1.0
        """How much of its rate a message takes here: as many as it has connections elsewhere for each one here."""
        self.pairs: Pairs | None = None
        """The pairs it streams, once somebody has looked."""

    def note_pairs(self, symbols: Iterable[str], now: float) -> bool:
        """It has sent ticks of these; whether it streams more pairs than its tier allows."""
        self.pairs = self.pairs or Pairs()
        return self.pairs.note(symbols, self.company.limits.pairs, now)

    @property
    def share(self) -> float:
        """The part of its rate that its connections here may spend."""
        return 1 / self.weight

    def note_share(self, share: float) -> None:
        """Its connections here may spend so much of its rate, above 0 and up to 1."""
        self.weight = 1 / share

    def grant(self, messages: Sequence[bytes], now: float, utc: Moment) -> Over | None:
        """Take ``messages`` from what the user and its company may send: what is over, the last of them, if
        anything."""
        company, limits = self.company, self.company.limits
        pace = limits.pace * self.weight
        ahead, allowance = max(0.0, self.full_at - now), max(pace, limits.burst_s) + SURELY
        ahead = min(ahead, allowance)  # a lower limit, or a clock that went back: what is taken is all there was
        allowed = min(len(messages), int((allowance - ahead) / pace)) if pace else len(messages)
        reason, told, wait_s = catalogue.DROPPED_RATE, limits.messages_per_second, 0.0
        if limits.metered:
            granted, company_reason, company_wait_s = company.grant([len(one) for one in messages[:allowed]], now, utc)
            if granted < allowed:
                allowed, reason, wait_s = granted, company_reason, company_wait_s
                told = limits.company_messages_per_second if reason is catalogue.DROPPED_COMPANY_RATE else 0.0
        ahead += allowed * pace
        self.full_at = now + ahead
        if allowed == len(messages):
            return None
        if reason is catalogue.DROPPED_RATE:
            wait_s = max(0.0, ahead + pace - allowance)
        rest = messages[allowed:]
        return Over(reason, len(rest), sum(map(len, rest)), told, math.ceil(wait_s * 1000))

    def forget(self) -> None:
        """Begin anew, as after a ban."""
        super().forget()
        self.pairs = None

    def use_places(self, places: tuple[Holder, ...]) -> None:
        """Its connections are these from now on."""
        self.places = places

    def accounts(self) -> set[str]:
        """The accounts that its connections are for."""
        return {place.account for place in self.places}


class Tenants:
    """The companies and users that are there."""

    def __init__(self, tiers: Mapping[str, TierLimits] | None = None) -> None:
        """``tiers`` are the limits by tier; one that is not among them has none."""
        self._tiers: Mapping[str, TierLimits] = tiers or {}
        self.companies: dict[str, Company] = {}
        self._idle: OrderedDict[User, float] = OrderedDict()

    def company(self, company_id: str) -> Company:
        """The company, made if need be."""
        company = self.companies.get(company_id)
        if company is None:
            company = self.companies[company_id] = Company(company_id, NO_TIER)
        return company

    def find(self, company_id: str, user_id: str) -> User | None:
        """The user, if it is remembered."""
        company = self.companies.get(company_id)
        return company.users.get(user_id) if company is not None else None

    def use_tiers(self, tiers: Mapping[str, TierLimits], now: float = 0.0) -> list[Holder]:
        """Go by other limits; returns whose places they have taken away."""
        self._tiers = tiers
        excess: list[Holder] = []
        for company in self.companies.values():
            if company.tier:
                company.use_limits(tiers.get(company.tier, NO_TIER))
                excess += self.reduce(company, now)
        return excess

    def learn_tier(self, principal: Principal, now: float = 0.0) -> list[Holder]:
        """A token has been verified: it may change its company's tier. Returns whose places that has taken away."""
        company = self.company(principal.company_id)
        if company.learn_tier(principal.tier, principal.issued_at, self._tiers):
            return self.reduce(company, now)
        return []

    # Places

    def user(self, principal: Principal, now: float) -> User:
        """The user, made if need be; without a place it is forgotten soon."""
        company = self.company(principal.company_id)
        user = company.users.get(principal.user_id)
        if user is None:
            user = company.users[principal.user_id] = User(company, principal.user_id)
            self._idle[user] = now
        elif user in self._idle:  # it is about to come back: it is not forgotten meanwhile
            self._idle[user] = now
            self._idle.move_to_end(user)
        return user

    def check(self, user: User, account: str) -> None:
        """Raise Refused unless the company's limits allow this connection beside those that are there.

        One too many of an account is allowed: it replaces the oldest (`enter`).
        """
        company, accounts = user.company, user.accounts()
        limits = company.limits
        if not accounts and limits.users and company.live_users >= limits.users:
            raise Refused(catalogue.TOO_MANY_USERS, f"{company.live_users} users of {company.id!r}")
        if account in accounts:
            return
        if limits.accounts_per_user and len(accounts) >= limits.accounts_per_user:
            raise Refused(catalogue.TOO_MANY_ACCOUNTS, f"{len(accounts)} accounts of user {user.user_id!r}")
        if limits.accounts and company.accounts >= limits.accounts:
            raise Refused(catalogue.TOO_MANY_ACCOUNTS, f"{company.accounts} accounts of {company.id!r}")

    def enter(self, user: User, holder: Holder) -> list[Holder]:
        """Give ``holder`` a place whatever the limits of users and accounts are; returns whom it replaces: their places
        are gone."""
        company = user.company
        self._idle.pop(user, None)
        allowed = company.limits.connections_per_account
        same = [place for place in user.places if place.account == holder.account]
        replaced = same[: len(same) + 1 - allowed] if allowed else []
        company.count(connections=1, users=not user.places, accounts=not same)
        user.use_places((*user.places, holder))
        for old in replaced:
            self._give_back(user, old)
        return replaced

    def leave(self, user: User, holder: Holder, now: float) -> bool:
        """Give a place back; false when it was gone already."""
        if holder not in user.places:
            return False
        self._give_back(user, holder)
        if not user.places:
            self._idle[user] = now
        return True

    def _give_back(self, user: User, holder: Holder) -> None:
        user.use_places(tuple(place for place in user.places if place is not holder))
        last = holder.account not in user.accounts()
        user.company.count(connections=-1, users=-(not user.places), accounts=-last)

    def reduce(self, company: Company, now: float) -> list[Holder]:
        """Take away the places beyond the company's limits; returns whose they were."""
        excess = self._excess(company)
        for user, place in excess:
            self.leave(user, place, now)
        return [place for _, place in excess]

    @staticmethod
    def _excess(company: Company) -> list[tuple[User, Holder]]:
        """The users and accounts that came last, and an account's oldest connections."""
        limits = company.limits
        found: list[tuple[User, Holder]] = []
        users = accounts = 0
        for user in company.users.values():
            if not user.places:
                continue
            users += 1
            seen: dict[str, list[Holder]] = {}
            for place in user.places:
                seen.setdefault(place.account, []).append(place)
            for number, places in enumerate(seen.values(), 1):
                accounts += 1
                if (
                    _beyond(users, limits.users)
                    or _beyond(number, limits.accounts_per_user)
                    or _beyond(accounts, limits.accounts)
                ):
                    found += [(user, place) for place in places]
                elif limits.connections_per_account:
                    found += [(user, place) for place in places[: -limits.connections_per_account]]
        return found

    def sweep(self, now: float) -> None:
        """Forget the users that have been gone for `IDLE_S`."""
        while self._idle:
            user, left_at = next(iter(self._idle.items()))
            if now - left_at < IDLE_S:
                return
            del self._idle[user]
            company = user.company
            if company.users.get(user.user_id) is user:
                del company.users[user.user_id]
            gone = not company.tallies and company.is_idle(None)  # else it is the books' to forget
            if gone and self.companies.get(company.id) is company:
                del self.companies[company.id]


def _beyond(count: int, limit: int) -> bool:
    return bool(limit) and count > limit
