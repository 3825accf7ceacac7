"""Who is connected: by id, by user, by company, by account.

A `Member` is on the roster from the moment its place was taken until it is given back, so it is there before its
connection is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.core.principal import Principal
    from gateway.ws.handler import Link


class Member(Protocol):
    """Somebody who is connected, or about to be."""

    @property
    def connection(self) -> Link | None:
        """None before it is open."""

    @property
    def connection_id(self) -> str: ...
    @property
    def principal(self) -> Principal: ...
    @property
    def account(self) -> str:
        """The MT5 account, the user_id when none was named."""


M = TypeVar("M", bound=Member)


class Roster(Generic[M]):
    """The members. Iterating is over those of that moment: members may come and go meanwhile."""

    def __init__(self) -> None:
        self._members: dict[str, M] = {}
        self._empty: trio.Event | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[M]:
        return iter(tuple(self._members.values()))

    def add(self, member: M) -> None:
        """Note a member."""
        self._members[member.connection_id] = member

    def discard(self, member: M) -> None:
        """Forget a member."""
        self._members.pop(member.connection_id, None)
        if self._empty is not None and not self._members:
            self._empty.set()
            self._empty = None

    def get(self, connection_id: str) -> M | None:
        """The member of a connection, None when it is not there (any more)."""
        return self._members.get(connection_id)

    def find(self, *, user_id: str | None = None, company_id: str | None = None, account: str | None = None) -> list[M]:
        """The members that fit everything that is given; looks at each of them."""
        # No index: it would cost each connection some 100 bytes a key, and who asks is an operator.
        return [
            member
            for member in self._members.values()
            if (user_id is None or member.principal.user_id == user_id)
            and (company_id is None or member.principal.company_id == company_id)
            and (account is None or member.account == account)
        ]

    def slices(self, count: int, at_least: int) -> list[list[M]]:
        """All members in ``count`` slices at most, of ``at_least`` each but the last."""
        members = list(self._members.values())
        size = max(at_least, -(-len(members) // count))
        return [members[at : at + size] for at in range(0, len(members), size)]

    async def wait_empty(self) -> None:
        """Wait until nobody is left."""
        if self._members:
            self._empty = self._empty or trio.Event()
            await self._empty.wait()
