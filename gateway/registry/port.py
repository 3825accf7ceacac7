"""What a registry does: it gives out the places that a tenant's limits allow, and takes them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gateway.core.tenants import Holder, User


class Registry(Protocol):
    """Gives out places. What `claim` gave, `release` gives back, whatever happens in between."""

    async def claim(self, user: User, holder: Holder, /) -> None:
        """Give ``holder`` a place among the connections of ``user``. Raises Refused.

        Whom it replaces is told (`Holder.revoke`). Cancelled or refused, nothing was taken.
        """

    def release(self, user: User, holder: Holder, /) -> None:
        """Take the place back; harmless when it is gone already. Never raises, never waits."""
