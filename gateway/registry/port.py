"""What a registry does: it gives out the places that a tenant's limits allow, and takes them back.

`Registry` is what sessions know. A `Backend` is where several processes keep their places together
(`gateway.registry.redis`); `gateway.registry.shared` makes a registry of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from gateway.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from gateway.core.limits import TierLimits
    from gateway.core.protection import Ban
    from gateway.core.tenants import Holder, User


class Registry(Protocol):
    """Gives out places. What `claim` gave, `release` gives back, whatever happens in between."""

    async def claim(self, user: User, holder: Holder, /) -> None:
        """Give ``holder`` a place among the connections of ``user``. Raises Refused.

        Whom it replaces is told (`Holder.revoke`). Cancelled or refused, nothing was taken.
        """

    def release(self, user: User, holder: Holder, /) -> None:
        """Take the place back; harmless when it is gone already. Never raises, never waits."""


class Unavailable(GatewayError):
    """The backend does not answer, or not as it should; the message says how."""


class Place(NamedTuple):
    """A place as a backend knows it."""

    company_id: str
    user_id: str
    account: str
    connection_id: str


class Given(NamedTuple):
    """A place was given: with whom it is shared."""

    epoch: str
    """Of the company's places: another one means that they were lost, and begun anew."""
    user_connections: int
    """Of the user, in all processes."""
    company_connections: int
    replaced: tuple[str, ...] = ()
    """Connections of any process that have lost their place; others' are told by an event."""


class State(NamedTuple):
    """What a backend has of a process' places in one company."""

    epoch: str
    expired: bool
    """Its lease had run out, and its places were taken."""
    places: int


class Events(Protocol):
    """What a backend tells, that other processes have done."""

    def revoked(self, company_id: str, user_id: str, connection_id: str) -> None:
        """This connection has lost its place."""

    def totals(self, company_id: str, user_id: str, user_connections: int, company_connections: int) -> None:
        """So many connections a user, and its company, have in all processes."""

    def banned(self, ban: Ban) -> None:
        """Somebody was shut out."""


class Backend(Protocol):
    """Where several processes keep their places. Everything raises Unavailable; cancelled, it may have been done."""

    async def claim(self, place: Place, limits: TierLimits, /) -> Given:
        """Take a place if the limits allow it. Raises Refused."""

    async def release(self, place: Place, /) -> None:
        """Give a place back; harmless when it is gone."""

    async def renew(self, company_id: str, /) -> State:
        """Say that this process lives; its places of the company are kept for another lease."""

    async def connections(self, company_id: str, /) -> set[str]:
        """Which of this process' connections have a place."""

    async def sync(self, company_id: str, places: Collection[Place], /) -> str:
        """This process has these places and no others, whatever the limits are. Returns the epoch."""

    async def ban(self, ban: Ban, /) -> None:
        """Shut somebody out everywhere."""

    async def bans(self) -> Iterable[Ban]:
        """The bans in force."""

    async def listen(self, events: Events, /) -> None:
        """Tell ``events`` what others do, until cancelled; raises Unavailable when that ends."""
