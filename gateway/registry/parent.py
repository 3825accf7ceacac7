"""A worker's side of the places that its parent holds (`gateway.registry.host`)."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.core.catalogue import Refusal
from gateway.core.protection import Ban
from gateway.errors import Refused
from gateway.registry.lines import Lines
from gateway.registry.port import Given, Place, State, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable

    from gateway.core.limits import TierLimits
    from gateway.registry.port import Events


LIMITS: Final = ("users", "accounts", "accounts_per_user", "connections_per_account")
"""What of a tier's limits says who may have a place."""


class ParentBackend:
    """A `gateway.registry.port.Backend`. Use `connected`."""

    def __init__(self, lines: Lines, timeout_s: float) -> None:
        self._lines = lines
        self._timeout_s = timeout_s
        self._number = 0
        self._answers: dict[int, trio.MemorySendChannel[list[Any]]] = {}
        self._events, self._heard = trio.open_memory_channel[list[Any]](math.inf)

    async def hear(self) -> None:
        """Take answers and events until the parent ends the connection: raises Unavailable."""
        try:
            while (message := await self._lines.receive()) is not None:
                kind, *fields = message
                if kind == "event":
                    self._events.send_nowait(fields)
                elif fields[0] in self._answers:
                    self._answers[fields[0]].send_nowait(fields[1:])
        except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError) as error:
            raise Unavailable(str(error)) from error
        raise Unavailable("the parent has closed the connection")

    async def _ask(self, kind: str, *arguments: Any) -> list[Any]:
        self._number += 1
        number, (answers, answer) = self._number, trio.open_memory_channel[list[Any]](1)
        self._answers[number] = answers
        try:
            with trio.move_on_after(self._timeout_s, shield=True) as sending:  # half a line ends the connection
                await self._lines.send(number, kind, *arguments)
            if sending.cancelled_caught:
                await self._lines.aclose()
                raise Unavailable("the parent reads nothing")
            with trio.fail_after(self._timeout_s):
                return await answer.receive()
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unavailable(str(error) or type(error).__name__) from error
        finally:
            del self._answers[number]

    async def claim(self, place: Place, limits: TierLimits) -> Given:
        """See `gateway.registry.port.Backend`."""
        code, *given = await self._ask("claim", place, {name: getattr(limits, name) for name in LIMITS})
        if code:
            raise Refused(Refusal.registered[code], "on this host")
        epoch, user, company, replaced = given
        return Given(epoch, user, company, tuple(replaced))

    async def release(self, place: Place) -> None:
        """See `gateway.registry.port.Backend`."""
        await self._ask("release", place)

    async def renew(self, company_id: str) -> State:
        """See `gateway.registry.port.Backend`."""
        epoch, expired, places = await self._ask("renew", company_id)
        return State(epoch, bool(expired), places)

    async def connections(self, company_id: str) -> set[str]:
        """See `gateway.registry.port.Backend`."""
        (found,) = await self._ask("connections", company_id)
        return set(found)

    async def sync(self, company_id: str, places: Collection[Place]) -> str:
        """See `gateway.registry.port.Backend`."""
        (epoch,) = await self._ask("sync", company_id, [*places])
        return str(epoch)

    async def ban(self, ban: Ban) -> None:
        """See `gateway.registry.port.Backend`."""
        await self._ask("ban", ban)

    async def bans(self) -> Iterable[Ban]:
        """See `gateway.registry.port.Backend`."""
        (found,) = await self._ask("bans")
        return [Ban(kind, tuple(who), remaining_s, length_s) for kind, who, remaining_s, length_s in found]

    async def listen(self, events: Events) -> None:
        """See `gateway.registry.port.Backend`."""
        async for kind, *fields in self._heard:
            if kind == "revoked":
                events.revoked(*fields)
            elif kind == "totals":
                events.totals(*fields)
            elif kind == "banned":
                events.banned(Ban(fields[0], tuple(fields[1]), fields[2], fields[3]))


@asynccontextmanager
async def connected(path: str, *, timeout_s: float) -> AsyncIterator[ParentBackend]:
    """A backend at the parent's socket. Raises Unavailable, also in groups."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as error:
        raise Unavailable(str(error)) from error
    async with stream, trio.open_nursery() as nursery:
        backend = ParentBackend(Lines(stream), timeout_s)
        nursery.start_soon(backend.hear)
        yield backend
        nursery.cancel_scope.cancel()
