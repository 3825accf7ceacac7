"""A registry over several processes: a backend has the places of all, this process' own tenants those that are here.

While the backend answers it decides; while it does not, the configured answer holds: ``admit`` by what this process
knows, or ``refuse``. When it is back the connections that are open are registered again, whatever the limits are.

Once a third of a lease it is told that this process lives, company by company, and both sides are compared: places that
Redis has lost are registered again, those that it gave to others while we were not listening are taken away here, and
those that nobody holds are given back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from gateway.core import catalogue
from gateway.errors import Refused, leaf
from gateway.registry.port import Place, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from gateway.core.protection import Ban
    from gateway.core.tenants import Company, Holder, Tenants, User
    from gateway.registry.port import Backend, Given, Registry
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Counter, Histogram, Metrics

RETRY_S: Final = 1.0
"""Between two attempts to reach a backend that is away."""
SYNC_POLL_S: Final = 0.005
SECONDS: Final = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)


def declare(metrics: Metrics) -> tuple[Histogram, Counter]:
    """Declare the metrics that are there without a registry of several processes too."""
    return (
        metrics.histogram("gateway_registry_claim_seconds", "Asking the registry for a place.", SECONDS),
        metrics.counter("gateway_registry_failures", "Requests that the registry did not answer."),
    )


def place_of(user: User, holder: Holder) -> Place:
    """A holder's place as a backend knows it."""
    return Place(user.company.id, user.user_id, holder.account, holder.connection_id)


class SharedRegistry:
    """A `gateway.registry.port.Registry`. `run` is its task."""

    def __init__(
        self,
        kind: str,
        tenants: Tenants,
        local: Registry,
        connect: Callable[[], AbstractAsyncContextManager[Backend]],
        metrics: Metrics,
        log: Log,
        *,
        refuse: bool,
        lease_s: float,
    ) -> None:
        """``kind`` names the backend in the log and in health, ``connect`` opens it; ``local`` decides while it is
        away, unless everybody is refused then."""
        self.kind = kind
        self._tenants = tenants
        self._local = local
        self._connect = connect
        self._log = log
        self._refuse = refuse
        self._lease_s = lease_s
        self._backend: Backend | None = None
        self._said_away = False
        self._epochs: dict[str, str] = {}
        self._claiming: set[str] = set()
        self._admitted: set[str] = set()  # connections that the backend does not know of yet
        self._gate: trio.Event | None = None  # while there is one, nobody asks for a place
        self._released: deque[Place] = deque()
        self._unpublished: deque[Ban] = deque(maxlen=1000)
        self._work = trio.Event()
        self._learn_ban: Callable[[Ban], None] = lambda ban: None
        self._claims_s, self._failures = declare(metrics)

    @property
    def up(self) -> bool:
        """The backend answers."""
        return self._backend is not None

    @property
    def refuses(self) -> bool:
        """Nobody is let in, because the backend is away."""
        return self._refuse and not self.up

    def attach(self, learn_ban: Callable[[Ban], None]) -> None:
        """Let ``learn_ban`` know of bans that others pronounce."""
        self._learn_ban = learn_ban

    # Places

    async def claim(self, user: User, holder: Holder) -> None:
        """See `gateway.registry.port.Registry`."""
        while self._gate is not None:
            await self._gate.wait()
        backend = self._backend
        if backend is not None:
            place, began = place_of(user, holder), trio.current_time()
            self._claiming.add(place.connection_id)
            try:
                given = await backend.claim(place, user.company.limits)
            except Unavailable as error:
                self._note_away(error)
            except trio.Cancelled:
                self._give_back(place)
                raise
            else:
                self._enter(user, holder, given)
                return
            finally:
                self._claiming.discard(place.connection_id)
                self._claims_s.observe(trio.current_time() - began)
        try:
            if self._refuse:
                raise Refused(catalogue.REGISTRY_UNAVAILABLE)
            await self._local.claim(user, holder)
        except BaseException:
            if backend is not None:  # it may have taken the place, for all that it did not answer
                self._give_back(place_of(user, holder))
            raise
        self._admitted.add(holder.connection_id)

    def _enter(self, user: User, holder: Holder, given: Given) -> None:
        """The backend has given a place."""
        replaced = self._tenants.enter(user, holder)
        for connection_id in given.replaced:
            replaced += self._leave(user, connection_id)
        for other in replaced:
            if other.connection_id not in given.replaced:
                self._give_back(place_of(user, other))
            other.revoke(catalogue.CLOSE_REPLACED)
        self._epochs[user.company.id] = given.epoch
        self._note_totals(user, given.user_connections, given.company_connections)

    def release(self, user: User, holder: Holder) -> None:
        """See `gateway.registry.port.Registry`."""
        self._local.release(user, holder)
        self._admitted.discard(holder.connection_id)
        self._give_back(place_of(user, holder))

    def _give_back(self, place: Place) -> None:
        """Let the backend know; one that is away is told by `_compare` when it is back."""
        if self._backend is None:
            return
        self._released.append(place)
        self._work.set()

    def _leave(self, user: User, connection_id: str) -> list[Holder]:
        found = [holder for holder in user.places if holder.connection_id == connection_id]
        for holder in found:
            self._tenants.leave(user, holder, trio.current_time())
        return found

    @staticmethod
    def _note_totals(user: User, user_connections: int, company_connections: int) -> None:
        """This process may spend its part of what user and company have: as many parts as there are connections."""
        user.note_share(min(1.0, max(1, len(user.places)) / max(1, user_connections)))
        company = user.company
        company.note_share(min(1.0, max(1, company.connections) / max(1, company_connections)))

    # Bans

    def ban(self, ban: Ban) -> None:
        """Let all processes know of a ban."""
        self._unpublished.append(ban)
        self._work.set()

    # Events (`gateway.registry.port.Events`)

    def revoked(self, company_id: str, user_id: str, connection_id: str) -> None:
        """This connection has lost its place to another process'."""
        user = self._tenants.find(company_id, user_id)
        if user is not None:
            for holder in self._leave(user, connection_id):
                holder.revoke(catalogue.CLOSE_REPLACED)

    def totals(self, company_id: str, user_id: str, user_connections: int, company_connections: int) -> None:
        """So many connections there are in all processes."""
        user = self._tenants.find(company_id, user_id)
        if user is not None and user.places:
            self._note_totals(user, user_connections, company_connections)

    def banned(self, ban: Ban) -> None:
        """Somebody was shut out."""
        self._learn_ban(ban)

    # Its task

    async def run(self) -> None:
        """Keep the backend connected, tell it what happens here, and listen, until cancelled."""
        while True:
            try:
                async with self._connect() as backend:
                    await self._serve(backend)
            except* Unavailable as group:
                self._note_away(leaf(group))
            finally:
                self._backend = None
            await trio.sleep(RETRY_S)

    async def _serve(self, backend: Backend) -> None:
        """Until the backend does not answer: raises Unavailable."""
        for ban in await backend.bans():
            self._learn_ban(ban)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.listen, self)
            await self._compare(backend)
            self._released.clear()  # compared already
            self._backend = backend
            self._said_away = False
            self._log.info("registry reached", kind=self.kind)
            nursery.start_soon(self._publish, backend)
            while self._backend is backend:
                await trio.sleep(self._lease_s / 3)
                await self._compare(backend)
            raise Unavailable("it stopped answering")

    async def _publish(self, backend: Backend) -> None:
        """Tell the backend of places that were given back and of bans."""
        while True:
            self._work = trio.Event()
            while self._released:
                await backend.release(self._released[0])
                self._released.popleft()
            while self._unpublished:
                await backend.ban(self._unpublished[0])
                self._unpublished.popleft()
            await self._work.wait()

    async def _compare(self, backend: Backend) -> None:
        """Renew the lease in every company that is here, and mend what differs."""
        for company in [*self._tenants.companies.values()]:
            if not company.connections:
                self._epochs.pop(company.id, None)
                continue
            state = await backend.renew(company.id)
            unknown = any(place.connection_id in self._admitted for place in _places(company))
            if state.expired or state.epoch != self._epochs.get(company.id) or unknown:
                await self._sync(backend, company)
            elif state.places != company.connections:
                await self._mend(backend, company)

    async def _sync(self, backend: Backend, company: Company) -> None:
        """Register all places of a company anew; nobody is given one meanwhile."""
        self._gate = trio.Event()
        try:
            while self._claiming:  # noqa: ASYNC110  # each for as long as a request may take
                await trio.sleep(SYNC_POLL_S)
            places = _places(company)
            self._epochs[company.id] = await backend.sync(company.id, places)
            self._admitted.difference_update(place.connection_id for place in places)
        finally:
            gate, self._gate = self._gate, None
            gate.set()

    async def _mend(self, backend: Backend, company: Company) -> None:
        """Take away here what others were given, and give back there what nobody holds here."""
        before = {place.connection_id: place for place in _places(company)}
        under_way = self._under_way()
        there = await backend.connections(company.id)
        for connection_id in before.keys() - there:
            self.revoked(company.id, before[connection_id].user_id, connection_id)
        after = {place.connection_id for place in _places(company)}
        for connection_id in there - before.keys() - after - under_way - self._under_way():
            await backend.release(Place(company.id, "", "", connection_id))

    def _under_way(self) -> set[str]:
        return self._claiming | {place.connection_id for place in self._released}

    def _note_away(self, error: BaseException) -> None:
        self._failures.add()
        self._backend = None
        if not self._said_away:
            self._said_away = True
            answer = "everybody is refused" if self._refuse else "places are given by what this process knows"
            self._log.error("registry does not answer", kind=self.kind, error=str(error), meanwhile=answer)


def _places(company: Company) -> list[Place]:
    """The places of a company in this process."""
    return [place_of(user, holder) for user in company.users.values() for holder in user.places]
