"""The registry of one process: its own tenants are all there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.catalogue import CLOSE_REPLACED

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.tenants import Holder, Tenants, User


class MemoryRegistry:
    """A `gateway.registry.port.Registry` without I/O: nothing happens between the check and the place."""

    def __init__(self, tenants: Tenants, clock: Callable[[], float]) -> None:
        """``clock`` is steady and in seconds."""
        self._tenants = tenants
        self._clock = clock

    async def claim(self, user: User, holder: Holder) -> None:
        """See `gateway.registry.port.Registry`; does not wait for anything."""
        self._tenants.check(user, holder.account)
        for replaced in self._tenants.enter(user, holder):
            replaced.revoke(CLOSE_REPLACED)

    def release(self, user: User, holder: Holder) -> None:
        """See `gateway.registry.port.Registry`."""
        self._tenants.leave(user, holder, self._clock())
