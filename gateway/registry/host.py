"""The places of all workers of a host, held by their parent: no Redis is needed for one view.

Workers connect to a Unix socket that serves processes of this user alone, and ask as `gateway.registry.parent` does. A
worker that ends, however it ends, gives its places back by that.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.core.catalogue import CLOSE_REPLACED
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.tenants import Tenants
from gateway.errors import Refused
from gateway.registry.lines import Lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.core.catalogue import Close
    from gateway.core.tenants import User

EPOCH: Final = "parent"
"""What is here is lost with the parent alone, and the workers are too."""
MAX_BANS: Final = 65_536
MAX_EVENTS: Final = 10_000
"""Events that a worker has not taken yet; those beyond are lost, and `gateway.registry.shared` mends that when it
compares."""


class _Far:
    """A connection of a worker."""

    def __init__(self, worker: _Worker, connection_id: str, account: str, user: User) -> None:
        self.worker = worker
        self.connection_id = connection_id
        self.account = account
        self.user = user

    def revoke(self, _: Close, /) -> None:
        """Its worker closes it."""
        self.worker.tell("revoked", self.user.company.id, self.user.user_id, self.connection_id)


class _Worker:
    """One worker that is connected."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.places: dict[str, dict[str, _Far]] = {}
        """By company and connection."""
        self.known: set[str] = set()
        """Companies in which it has told of its places since it connected."""
        self._events: deque[tuple[Any, ...]] = deque()
        self._totals: dict[tuple[str, str], tuple[int, int]] = {}
        self._news = trio.Event()

    def tell(self, *event: Any) -> None:
        """Let it know of something, if it takes what it is told."""
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
            self._news.set()

    def tell_totals(self, company_id: str, user_id: str, user_connections: int, company_connections: int) -> None:
        """Let it know of numbers: the latest count."""
        self._totals[company_id, user_id] = (user_connections, company_connections)
        self._news.set()

    async def tell_all(self) -> None:
        """Send what it is to know, until cancelled."""
        while True:
            self._news = trio.Event()
            events, self._events = self._events, deque()
            totals, self._totals = self._totals, {}
            for event in events:
                await self.lines.send("event", *event)
            for who, counts in totals.items():
                await self.lines.send("event", "totals", *who, *counts)
            await self._news.wait()

    async def answer(self, number: int, *answer: Any) -> None:
        """Answer one request."""
        await self.lines.send("answer", number, *answer)


class PlacesHost:
    """The parent's side. Use `serving`."""

    def __init__(self) -> None:
        self._tenants = Tenants()
        self._workers: set[_Worker] = set()
        self._bans: deque[tuple[float, list[Any]]] = deque(maxlen=MAX_BANS)

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one worker until it ends."""
        worker = _Worker(Lines(stream))
        self._workers.add(worker)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.tell_all)
                await self._hear(worker)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it has ended
        except* (ValueError, TypeError, KeyError, IndexError):
            pass  # it is none of ours
        finally:
            self._workers.discard(worker)
            for company_id in [*worker.places]:
                self._drop(worker, company_id)

    async def _hear(self, worker: _Worker) -> None:
        while (message := await worker.lines.receive()) is not None:
            number, kind, *arguments = message
            method = getattr(self, f"_do_{kind}", None)
            if method is not None:
                await worker.answer(number, *method(worker, *arguments))

    # Requests; each returns the fields of its answer

    def _do_claim(self, worker: _Worker, place: list[str], limits: dict[str, Any]) -> tuple[Any, ...]:
        company_id, user_id, account, connection_id = place
        now = trio.current_time()
        self._tenants.sweep(now)
        user = self._tenants.user(Principal(user_id, company_id, "", 0.0), now)
        user.company.use_limits(TierLimits(**limits))
        try:
            self._tenants.check(user, account)
        except Refused as refused:
            return (refused.refusal.code,)
        replaced = self._enter(worker, user, account, connection_id)
        if worker.places[company_id].keys() == {connection_id}:
            worker.known.add(company_id)  # it has no others
        self._tell_totals(user)
        own = [far.connection_id for far in replaced if far.worker is worker]
        return ("", EPOCH, len(user.places), user.company.connections, own)

    def _enter(self, worker: _Worker, user: User, account: str, connection_id: str) -> list[_Far]:
        far = _Far(worker, connection_id, account, user)
        replaced = [one for one in self._tenants.enter(user, far) if isinstance(one, _Far)]
        worker.places.setdefault(user.company.id, {})[connection_id] = far
        for old in replaced:
            self._forget(old)
            if old.worker is not worker:
                old.revoke(CLOSE_REPLACED)
        return replaced

    def _do_release(self, worker: _Worker, place: list[str]) -> tuple[Any, ...]:
        company_id, _, _, connection_id = place
        far = worker.places.get(company_id, {}).get(connection_id)
        if far is not None:
            self._tenants.leave(far.user, far, trio.current_time())
            self._forget(far)
            self._tell_totals(far.user)
        return ()

    def _do_renew(self, worker: _Worker, company_id: str) -> tuple[Any, ...]:
        lost = company_id not in worker.known  # with the connection that it had before
        return (EPOCH, int(lost), len(worker.places.get(company_id, ())))

    def _do_connections(self, worker: _Worker, company_id: str) -> tuple[Any, ...]:
        return ([*worker.places.get(company_id, ())],)

    def _do_sync(self, worker: _Worker, company_id: str, places: list[list[str]]) -> tuple[Any, ...]:
        self._drop(worker, company_id)
        worker.known.add(company_id)
        now = trio.current_time()
        for _, user_id, account, connection_id in places:
            user = self._tenants.user(Principal(user_id, company_id, "", 0.0), now)
            user.company.use_limits(TierLimits())
            self._enter(worker, user, account, connection_id)
            self._tell_totals(user)
        return (EPOCH,)

    def _do_ban(self, worker: _Worker, ban: list[Any]) -> tuple[Any, ...]:
        kind, subject, remaining_s, length_s = ban
        self._bans.append((trio.current_time() + remaining_s, [kind, subject, length_s]))
        for other in self._workers - {worker}:
            other.tell("banned", kind, subject, remaining_s, length_s)
        return ()

    def _do_bans(self, worker: _Worker) -> tuple[Any, ...]:
        now = trio.current_time()
        return ([[kind, who, until - now, length_s] for until, (kind, who, length_s) in self._bans if until > now],)

    # What follows

    def _forget(self, far: _Far) -> None:
        of_company = far.worker.places.get(far.user.company.id, {})
        of_company.pop(far.connection_id, None)
        if not of_company:
            far.worker.places.pop(far.user.company.id, None)

    def _drop(self, worker: _Worker, company_id: str) -> None:
        for far in worker.places.pop(company_id, {}).values():
            self._tenants.leave(far.user, far, trio.current_time())
            self._tell_totals(far.user)

    def _tell_totals(self, user: User) -> None:
        company = user.company
        for worker in self._workers:
            if company.id in worker.places and len(self._workers) > 1:
                worker.tell_totals(company.id, user.user_id, len(user.places), company.connections)


async def run(task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Hold places until cancelled; starts with the address of the socket."""
    async with serving() as address:
        task_status.started(address)
        await trio.sleep_forever()


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """A host of places while the context lasts; yields the address of its socket.

    The address is abstract (unix(7)): there may be no place to write. Processes of other users are turned away.
    """
    address = f"\0gateway-places-{secrets.token_hex(16)}"
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(address)
    sock.listen(64)
    host = PlacesHost()

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            if _peer(stream) == os.getuid():
                await host.handle(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, handle, [trio.SocketListener(sock)]))
        yield address
        nursery.cancel_scope.cancel()


def _peer(stream: trio.SocketStream) -> int:
    """The user of the process at the other end (unix(7), SO_PEERCRED)."""
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("3i", credentials)
    return int(user)
