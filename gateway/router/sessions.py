"""The sessions that are there: who enters, who leaves, and what is done to all of them."""

from __future__ import annotations

import itertools
import secrets
from typing import TYPE_CHECKING, Final

import trio

from gateway.core import catalogue
from gateway.errors import Refused
from gateway.registry.memory import MemoryRegistry
from gateway.router.session import Session
from gateway.ws.handler import OPEN
from gateway.ws.roster import Roster

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gateway.core.admission import Admission
    from gateway.core.tenants import Tenants, User
    from gateway.registry.port import Registry
    from gateway.router.activity import Activity
    from gateway.router.endpoint import Identity
    from gateway.router.inspection import Inspection
    from gateway.router.session import SessionContext
    from gateway.telemetry.metrics import Metrics
    from gateway.ws.endpoints import Granted

MIN_SLICE: Final = 100
"""Sessions closed at once in any case: their clients' handshakes take the next process a tenth of a second."""
NOTICE_S: Final = 0.3
"""How long a closing notice has to reach its client, and what the client sent before it to reach the gateway."""
SETTLE_S: Final = 2.0
"""How long a drain waits for Kafka's answers before it closes: what is answered by then is acked and not sent again."""
SETTLE_POLL_S: Final = 0.02
LOOKED_AT: Final = 1000
"""Sessions whose tokens are looked at in one go: about a millisecond."""

OUTCOMES: Final = ("peer_closed", "peer_lost", "stalled_peer", "cancelled", *catalogue.close_names())
"""Label values: how a connection can end."""


class Sessions:
    """The open sessions. A session is among them from `open` to `leave`, and holds its place meanwhile."""

    def __init__(
        self,
        context: SessionContext,
        admission: Admission,
        tenants: Tenants,
        metrics: Metrics,
        activity: Activity,
        registry: Registry | None = None,
    ) -> None:
        """Places come from ``registry``; without one, from ``tenants`` alone."""
        self._activity = activity
        self._context = context
        self._admission = admission
        self._tenants = tenants
        self._registry = MemoryRegistry(tenants, trio.current_time) if registry is None else registry
        self._closed = metrics.labelled("gateway_connections_closed", "Connections ended.", "outcome", OUTCOMES)
        self.roster: Roster[Session] = Roster()
        # Unique over restarts and over processes on one port, and short: it is in every dead letter.
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self.roster)

    def __iter__(self) -> Iterator[Session]:
        return iter(self.roster)

    async def open(self, granted: Granted) -> Session:
        """Make the session of an accepted handshake; raises Refused when it may have no place.

        In this order: bans, the cap, the limits of its tenant. Cancelled, it has taken nothing.
        """
        try:
            session = await self._open(granted.identity, granted.subprotocol)
        except Refused as refused:
            self._activity.refused(granted.identity, refused.refusal.code)
            raise
        self.roster.add(session)
        self._activity.connected(session)
        return session

    async def _open(self, identity: Identity, subprotocol: str | None) -> Session:
        principal, now = identity.principal, trio.current_time()
        user = self._tenants.user(principal, now)
        self._context.protection.check_user(user, now)
        for holder in self._tenants.learn_tier(principal, now):
            holder.revoke(catalogue.CLOSE_REPLACED)
        session = Session(
            self._context,
            self,
            connection_id=f"{self._prefix}-{next(self._numbers)}",
            principal=principal,
            user=user,
            account=identity.account,
            path=identity.path,
            subprotocol=subprotocol,
        )
        self._admission.enter()
        try:
            await self._registry.claim(user, session)
            try:
                self._context.protection.check_user(user, trio.current_time())  # it may have been shut out meanwhile
            except Refused:
                self._registry.release(user, session)
                raise
        except BaseException:
            self._admission.leave()
            raise
        return session

    def leave(self, session: Session, outcome: str) -> None:
        """Give back what `open` took and count how it ended."""
        self._admission.leave()
        self._registry.release(session.user, session)
        self._closed.add(outcome)
        self._activity.disconnected(session, outcome)
        self.roster.discard(session)

    @property
    def inspection(self) -> Inspection:
        """Whether messages are looked into."""
        return self._context.inspection

    def renewed(self, session: Session) -> None:
        """A session has a newer token, which may say that its company has another tier."""
        for holder in self._tenants.learn_tier(session.principal, trio.current_time()):
            holder.revoke(catalogue.CLOSE_REPLACED)

    async def look_at_tokens(self) -> None:
        """Close those whose tokens have been ended early; others run between slices of them."""
        for sessions in self.slices(max(1, len(self) // LOOKED_AT)):
            now = trio.current_time()
            for session in sessions:
                if session.connection is not None and session.connection.state == OPEN:
                    try:
                        session.connection.tick(now)
                    except Exception as error:  # the barrier around each connection
                        session.crash(error)
            await trio.lowlevel.checkpoint()

    def close_banned(self, user: User) -> None:
        """Close all connections of a user that was shut out."""
        for holder in user.places:
            holder.revoke(catalogue.CLOSE_BANNED)

    def close_user(self, company_id: str, user_id: str) -> None:
        """The same of a user that was shut out elsewhere, if it is here."""
        user = self._tenants.find(company_id, user_id)
        if user is not None:
            self.close_banned(user)

    def tell_degraded(self, *, unconfirmed_only: bool) -> None:
        """Tell every session that Kafka takes nothing, those too that came since the last time.

        ``unconfirmed_only`` leaves out those that Kafka owes no answer: they may be going to partitions that are well.
        """
        for session in self:
            if not unconfirmed_only or session.unsettled:
                session.tell_degraded(True)

    def tell_recovered(self) -> None:
        """Tell every session that was told otherwise."""
        for session in self:
            session.tell_degraded(False)

    def slices(self, count: int) -> list[list[Session]]:
        """All sessions in ``count`` slices at most, of at least `MIN_SLICE` each."""
        return self.roster.slices(count, MIN_SLICE)

    async def close_all(self) -> None:
        """Close every session with 1012 and wait until all have left, those too that are not open yet.

        What clients sent before they answer the close is still taken. Bounded by each connection's close
        timeouts and by the caller's deadline.
        """
        close(self)
        await self.roster.wait_empty()


async def close_gracefully(sessions: Sequence[Session]) -> None:
    """Announce the restart to some sessions, let what they sent settle, close them with 1012.

    A client that understands notices sends nothing more after it, so that it is told of everything it sent before the
    close. Takes up to `SETTLE_S` where somebody understands, else no time.
    """
    understood = [session for session in sessions if _announce(session)]
    if understood:
        with trio.move_on_after(SETTLE_S):
            await trio.sleep(NOTICE_S)
            while any(session.unsettled for session in understood):  # noqa: ASYNC110  # their acks are no events
                await trio.sleep(SETTLE_POLL_S)
    close(sessions)


def _announce(session: Session) -> bool:
    try:
        return session.announce_restart()
    except Exception as error:  # the barrier around each connection
        session.crash(error)
        return False


def close(sessions: Iterable[Session]) -> None:
    """Close sessions for a restart; what was under way is still taken."""
    for session in sessions:
        try:
            session.close_for_restart()
        except Exception as error:  # the barrier around each connection
            session.crash(error)
