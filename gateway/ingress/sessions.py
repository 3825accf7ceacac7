"""The sessions that are there: who enters, who leaves, and what is done to all of them."""

from __future__ import annotations

import itertools
import secrets
from typing import TYPE_CHECKING

import trio

from gateway import refusals
from gateway.ingress.session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from gateway.core.admission import Admission
    from gateway.core.books import Books
    from gateway.ingress.handshake import Admitted
    from gateway.ingress.session import SessionContext
    from gateway.telemetry.metrics import Counters


class Sessions:
    """The set of open sessions. A session is in it from `enter` to `leave`, and holds its place meanwhile."""

    def __init__(self, context: SessionContext, admission: Admission, books: Books, counters: Counters) -> None:
        self._context = context
        self._admission = admission
        self._books = books
        self._counters = counters
        self._sessions: set[Session] = set()
        self._empty: trio.Event | None = None
        self.abandoned = 0
        """Messages of sessions that were cut off with something read and not handed over."""
        # Unique over restarts and over processes on one port, and short: it is in every dead letter.
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions))

    def enter(self, sock: socket.socket, admitted: Admitted) -> Session:
        """Make the session of an accepted handshake; raises Refused when the last place is gone."""
        self._admission.enter()
        self._books.open(admitted.principal.company_id)
        session = Session(
            sock,
            self._context,
            connection_id=f"{self._prefix}-{next(self._numbers)}",
            principal=admitted.principal,
            path=admitted.path,
            subprotocol=admitted.subprotocol,
        )
        self._sessions.add(session)
        return session

    def leave(self, session: Session) -> None:
        """Give back what `enter` took and count how it ended."""
        self._sessions.discard(session)
        self._admission.leave()
        self._books.close(session.principal.company_id)
        self._counters.closes[session.outcome] += 1
        self.abandoned += session.abandoned
        if self._empty is not None and not self._sessions:
            self._empty.set()

    def forget_routes(self) -> None:
        """Let every session look its routes up anew."""
        for session in self._sessions:
            session.forget_routes()

    def tell_degraded(self, degraded: bool) -> None:
        """Tell every session, those too that came since the last time."""
        for session in self:
            session.tell_degraded(degraded)

    def announce_restart(self) -> int:
        """Tell every session that it will be closed soon; how many understood."""
        return sum(session.announce_restart() for session in self)

    async def close_all(self) -> None:
        """Close every session with 1012 and wait until all have left.

        What clients sent before they answer the close is still taken. Bounded by each connection's close
        timeouts and by the caller's deadline.
        """
        for session in self:
            session.close(refusals.CLOSE_RESTART, take_rest=True)
        if self._sessions:
            self._empty = trio.Event()
            await self._empty.wait()
