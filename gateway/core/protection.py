"""Who is shut out: users whose messages are mostly refused, addresses whose handshakes mostly fail.

`Protection` counts the handshakes of addresses and keeps the bans of both kinds; a user's messages are counted where
they are received (`gateway.core.tenants.User`). What it decides goes to ``tell``, so that other processes learn it
(`learn`). All times are in seconds of one steady clock.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from gateway.core import catalogue
from gateway.core.breaker import Bans, BreakerRules, Window
from gateway.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.core.tenants import User

MAX_WINDOWS: Final = 65_536
"""Addresses whose handshakes are counted, about 250 bytes each. When full, the one that was quiet longest goes."""

Kind = Literal["user", "address"]
Subject = tuple[str, ...]
"""Who: ``(company_id, user_id)``, or ``(address,)`` as `gateway.core.admission.network` gives it."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Ban(NamedTuple):
    """Somebody has been shut out."""

    kind: Kind
    subject: Subject
    remaining_s: float
    length_s: float
    """What the next ban doubles."""


class Protection:
    """The bans of this process, and of those that tell it of theirs."""

    def __init__(self, rules: BreakerRules = BreakerRules(), exempt: Sequence[Network] = ()) -> None:  # noqa: B008
        """``exempt`` are networks whose addresses are never shut out: balancers behind which everybody has one."""
        self.rules = rules
        self._exempt = tuple(exempt)
        self._users: Bans[Subject] = Bans(rules)
        self._addresses: Bans[Subject] = Bans(rules)
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._tell: Callable[[Ban], None] = lambda ban: None
        self._looked_at = 0.0

    def use_rules(self, rules: BreakerRules, exempt: Sequence[Network]) -> None:
        """Go by other rules; bans that run go on."""
        self.rules, self._exempt = rules, tuple(exempt)
        self._users.use_rules(rules)
        self._addresses.use_rules(rules)

    def tell(self, tell: Callable[[Ban], None]) -> None:
        """Let somebody know of every ban that is pronounced here."""
        self._tell = tell

    # Users

    def check_user(self, user: User, now: float) -> None:
        """Raise Refused while the user is banned."""
        self._check(self._users, (user.company.id, user.user_id), now)

    def trips(self, user: User, now: float) -> bool:
        """Whether too much of what the user sent within the last minute was rejected or dropped; not again while it is
        shut out for that."""
        return self.rules.trips(*user.totals(now)) and not self._users.remaining_s((user.company.id, user.user_id), now)

    def ban_user(self, user: User, now: float) -> Ban:
        """Shut the user out; its connections are the caller's to close."""
        user.forget()
        return self._pronounce("user", self._users, (user.company.id, user.user_id), now)

    # Addresses

    def check_address(self, address: str, now: float) -> None:
        """Raise Refused while the address is banned."""
        if self._addresses:
            self._check(self._addresses, (address,), now)

    def note_handshake(self, address: str, now: float, *, failed: bool) -> Ban | None:
        """A handshake of the address has ended; returns the ban that this brought about, if any."""
        window = self._windows.pop(address, None) or Window()
        self._windows[address] = window
        if len(self._windows) > MAX_WINDOWS:
            self._windows.popitem(last=False)
        window.count(now, came=1, failed=failed)
        if not failed or not self.rules.trips(*window.totals(now)) or self._is_exempt(address):
            return None
        if self._addresses.remaining_s((address,), now):
            return None  # it was under way
        window.forget()
        return self._pronounce("address", self._addresses, (address,), now)

    def _is_exempt(self, address: str) -> bool:
        try:
            network = ipaddress.ip_network(address)
        except ValueError:
            return False  # a Unix socket's, or a scope of its own
        return any(
            network.version == exempt.version and network.subnet_of(exempt)  # type: ignore[arg-type]  # of one version
            for exempt in self._exempt
        )

    # Both

    @staticmethod
    def _check(bans: Bans[Subject], subject: Subject, now: float) -> None:
        remaining_s = bans.remaining_s(subject, now)
        if remaining_s:
            raise Refused(catalogue.BANNED, retry_after_s=math.ceil(remaining_s))

    def _pronounce(self, kind: Kind, bans: Bans[Subject], subject: Subject, now: float) -> Ban:
        remaining_s = bans.pronounce(subject, now)
        ban = Ban(kind, subject, remaining_s, bans.length_s(subject))
        self._tell(ban)
        return ban

    def learn(self, ban: Ban, now: float) -> None:
        """Somebody has been shut out elsewhere."""
        bans = self._users if ban.kind == "user" else self._addresses
        bans.learn(ban.subject, ban.remaining_s, ban.length_s, now)

    def sweep(self, now: float) -> None:
        """Forget what is over and forgiven; called about once a second."""
        self._looked_at = now
        self._users.forgive(now)
        self._addresses.forgive(now)

    def running(self) -> dict[str, int]:
        """How many bans hold, by kind, as of the last `sweep`; looks at each of them."""
        now = self._looked_at
        return {"user": self._users.running(now), "address": self._addresses.running(now)}
