"""Whether a connection may come in, before its token is looked at: the cap, its address' rate, bans and connections.

What a token must be known for, the limits of its tenant, is asked afterwards (`gateway.core.tenants`).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from gateway.core import catalogue
from gateway.core.protection import Protection
from gateway.errors import Refused

if TYPE_CHECKING:
    from gateway.core.catalogue import Refusal

MAX_ADDRESSES: Final = 65_536
"""Addresses remembered, about 200 bytes each. When full, the one that was quiet longest is forgotten."""


def network(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that an IPv6 host or site has to itself (RFC 6177 2)."""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64)) + "/64"


class AddressRate:
    """A token bucket for each remote address: ``rate_per_s`` handshakes, ``burst`` at once; a rate of 0 is none."""

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self._rate = rate_per_s
        self._burst = float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, address: str, now: float) -> float:
        """Take one attempt of ``address`` at ``now``; return 0, or the seconds until the next is allowed."""
        if not self._rate:
            return 0.0
        tokens, at = self._buckets.pop(address, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[address] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._rate


class Admission:
    """``closed`` is the refusal while nobody may come in, as at the start."""

    def __init__(
        self,
        max_connections: int,
        addresses: AddressRate,
        protection: Protection | None = None,
        *,
        max_per_address: int = 0,
    ) -> None:
        """``max_per_address`` bounds an address's connections; 0 does not."""
        self._max = max_connections
        self._addresses = addresses
        self._max_per_address = max_per_address
        self._by_address: dict[str, int] = {}
        self.protection = Protection() if protection is None else protection
        self.connections = 0
        self._shed: Refusal | None = None
        self.closed: Refusal | None = catalogue.STARTING

    def open(self) -> None:
        """Let connections in."""
        self.closed = None

    def close(self, refusal: Refusal) -> None:
        """Let nobody in any more, with ``refusal`` for an answer."""
        self.closed = refusal

    def shed(self, refusal: Refusal | None) -> None:
        """Let nobody in for the time being, with ``refusal`` for an answer; None ends that."""
        self._shed = refusal

    def knock(self, address: str, now: float) -> None:
        """Raise Refused unless ``address`` (as `network` gives it) may try now, before anything is read or encrypted.

        ``now`` is in seconds of any steady clock. While nobody may come in anyway, nothing is counted.
        """
        self.protection.check_address(address, now)
        if self._max_per_address and self._by_address.get(address, 0) >= self._max_per_address:
            raise Refused(catalogue.TOO_MANY_CONNECTIONS)
        if self.closed is None:
            wait_s = self._addresses.spend(address, now)
            if wait_s:
                raise Refused(catalogue.TOO_MANY_ATTEMPTS, retry_after_s=max(1, round(wait_s + 0.5)))

    def count(self, address: str, change: int) -> None:
        """So many connections of ``address`` more, or less, those too whose handshake is not done."""
        if self._max_per_address:
            left = self._by_address.get(address, 0) + change
            if left:
                self._by_address[address] = left
            else:
                del self._by_address[address]

    def check(self) -> None:
        """Raise Refused unless somebody may come in now; asked before the token is looked at."""
        if self.closed is not None:
            raise Refused(self.closed)
        if self._shed is not None:
            raise Refused(self._shed)
        if self.connections >= self._max:
            raise Refused(catalogue.AT_CAPACITY)

    def enter(self) -> None:
        """Take a place; raises Refused when the last one went since `check`."""
        if self.connections >= self._max:
            raise Refused(catalogue.AT_CAPACITY)
        self.connections += 1

    def leave(self) -> None:
        """Give the place back."""
        self.connections -= 1
