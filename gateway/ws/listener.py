"""Accepts sockets and gives each one task for its life: address limits, TLS, handshake, session, end.

The task is the barrier: whatever goes wrong with one connection ends there.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

import trio

from gateway.core import catalogue
from gateway.core.admission import network
from gateway.errors import Disconnected, Refused, TlsFailed
from gateway.ws import tls
from gateway.ws.connection import Connection, half_close_and_drain
from gateway.ws.outbox import BLOCKED
from gateway.ws.turnstile import Turnstile
from gateway.ws.upgrade import acceptance, read_request, refusal_answer, write_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Metrics
    from gateway.ws.handler import Handler
    from gateway.ws.readiness import Readiness
    from gateway.ws.upgrade import Accepted, Upgrade

# long: one connection from accept to its own task

ACCEPTS_PER_TURN: Final = 4
"""Connections accepted before other tasks run: a storm waits in the backlog, and does not hold up what is open."""
OVERFLOW: Final = 256
"""Sockets beyond the connection cap that are still heard, so that they get their 503; more are closed unheard. It is
more than one address may have pending by default: silent sockets of one address leave places for the others."""
NO_DESCRIPTOR_PAUSE_S: Final = 0.1
"""Out of descriptors or memory: give connections that end time to release some."""
REFUSAL_LINGER_S: Final = 1.0
"""How long a refused client may take to read its answer and close."""
MAX_TURNED_AWAY: Final = 64
"""Clients over their address's limits that may take `REFUSAL_LINGER_S` to read why; further ones are closed at once."""
LAST_ACCEPTS: Final = 65_536
"""Connections taken out of the backlog when the listener closes: as long as a backlog can be."""

_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


HANDSHAKE_OUTCOMES: Final = (
    "accepted",
    "disconnected",
    "tls_failed",
    "overflow",
    "error",
    *catalogue.refusal_codes(),
)
"""Label values: what a handshake can come to."""


class Listener:
    """The accept loops of the listening sockets (`run`) and the life of each connection."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        upgrade: Upgrade,
        readiness: Readiness,
        tls_context: ssl.SSLContext | None,
        handshake_timeout_s: float,
        max_connections: int,
        max_pending_per_address: int,
        metrics: Metrics,
        log_refused: RateLimited,
        log_crash: RateLimited,
    ) -> None:
        """``max_pending_per_address`` bounds an address's handshakes under way; 0 does not."""
        self._sockets = list(sockets)
        self._port: int = self._sockets[0].getsockname()[1]
        self._upgrade = upgrade
        self._readiness = readiness
        self._tls = tls_context
        self._timeout_s = handshake_timeout_s
        self._max_open = max_connections + OVERFLOW
        self._handshakes = metrics.labelled("gateway_handshakes", "Handshakes.", "outcome", HANDSHAKE_OUTCOMES)
        self._log_refused = log_refused
        self._log_crash = log_crash
        self._turnstile = Turnstile()
        self._open = 0
        self._max_pending = max_pending_per_address
        self._pending: dict[str, int] = {}
        self._turned_away = 0
        self._quiet: trio.Event | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

    def use_tls(self, context: ssl.SSLContext | None) -> None:
        """Secure the next connections with another context."""
        self._tls = context

    def close(self, nursery: trio.Nursery) -> None:
        """Stop accepting; what waits in the backlog is accepted first and becomes tasks of ``nursery``.

        A client whose TCP handshake the system finishes in this very moment is reset.
        """
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            for _ in range(LAST_ACCEPTS // ACCEPTS_PER_TURN):
                if self._accept(sock, nursery, last=True) != "more":
                    break
            trio.lowlevel.notify_closing(sock)  # `run` may be waiting on it
            sock.close()

    async def wait_answered(self) -> None:
        """Wait until no handshake is under way."""
        if self._pending or self._turned_away:
            self._quiet = self._quiet or trio.Event()
            await self._quiet.wait()

    async def run(self, nursery: trio.Nursery) -> None:
        """Accept until closed, each connection becomes a task of ``nursery``; let handshakes go on until cancelled."""
        try:
            async with trio.open_nursery() as loops:
                loops.start_soon(self._turnstile.run)
                for sock in self._sockets:
                    loops.start_soon(self._run_one, sock, nursery)
        finally:
            self._turnstile.close()

    async def _run_one(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        while sock in self._sockets:
            try:
                await trio.lowlevel.wait_readable(sock)
            except trio.ClosedResourceError:
                return
            try:
                state = self._accept(sock, nursery)
            except Exception as error:  # one connection's, and never the loop's
                self._log_crash("accept failed", exc_info=error)
                state = "exhausted"
            if state == "exhausted":
                await trio.sleep(NO_DESCRIPTOR_PAUSE_S)

    def _accept(
        self, listening: socket.socket, nursery: trio.Nursery, *, last: bool = False
    ) -> Literal["none", "more", "exhausted"]:
        """Accept what is waiting: nothing more is, more may be, or the process is out of descriptors or memory.

        The ``last`` ones have gathered: how many there are of one address says nothing.
        """
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listening.accept()
            except BLOCKED:
                return "none"
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._log_crash("accept failed", error=error.strerror)
                    return "exhausted"
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return "none"  # it has just been closed
                continue  # the connection died in the backlog (accept(2), "Error handling")
            try:
                sock.setblocking(False)
                self._receive(sock, str(address[0]), nursery, 0 if last else self._max_pending)
            except BaseException:
                sock.close()
                raise
        return "more"

    def _receive(self, sock: socket.socket, address: str, nursery: trio.Nursery, max_pending: int) -> None:
        """Judge a connection by its address alone, before any cryptography, and give it a task."""
        if self._open >= self._max_open:
            self._handshakes.add("overflow")
            self._log_refused("connection closed unheard", address=address, open=self._open, limit=self._max_open)
            sock.close()
            return
        host = network(address)
        pending = self._pending.get(host, 0)
        try:
            if max_pending and pending >= max_pending:
                raise Refused(catalogue.TOO_MANY_ATTEMPTS, f"{pending} handshakes of this address are under way")
            self._upgrade.admission.knock(host, trio.current_time())
        except Refused as refused:
            self._turn_away(sock, address, refused, nursery)
            return
        self._pending[host] = pending + 1
        self._open += 1
        self._upgrade.admission.count(host, 1)
        nursery.start_soon(self._connection, sock, address)

    def _turn_away(self, sock: socket.socket, address: str, refused: Refused, nursery: trio.Nursery) -> None:
        """Answer without reading; under TLS nothing can be said before a handshake, so the connection just ends."""
        self._count_refusal(refused, address)
        if self._tls is None and self._turned_away < MAX_TURNED_AWAY:
            self._turned_away += 1
            nursery.start_soon(self._see_out, sock, refused)
            return
        with suppress(OSError):
            if self._tls is None:
                sock.send(refusal_answer(refused.refusal, refused.retry_after_s))
        sock.close()

    async def _see_out(self, sock: socket.socket, refused: Refused) -> None:
        """Let the answer be read: closing on a request that was not read would reset the connection under it."""
        try:
            await _answer(sock, refused)
        finally:
            sock.close()
            self._turned_away -= 1
            self._check_quiet()

    def _settled(self, host: str) -> None:
        """A handshake of this address has ended, one way or the other."""
        self._pending[host] -= 1
        if not self._pending[host]:
            del self._pending[host]
        self._check_quiet()

    def _check_quiet(self) -> None:
        if self._quiet is not None and not self._pending and not self._turned_away:
            self._quiet.set()

    async def _connection(self, sock: socket.socket, address: str) -> None:
        """One connection from accept to close; nothing but cancellation gets out of here."""
        try:
            try:
                try:
                    if self._tls is not None:
                        sock = tls.wrap(sock, self._tls)
                    entered = await self._enter(sock, address)
                except OSError:  # wrapping a socket whose peer has gone already
                    self._handshakes.add("tls_failed")
                    return
                finally:
                    self._settled(network(address))
                if entered is None:
                    return
                connection, first = entered
                del entered
                await connection.run(first)
            finally:
                self._open -= 1
                self._upgrade.admission.count(network(address), -1)
                sock.close()
        except Exception as error:  # the barrier around each connection
            self._handshakes.add("error")
            self._log_crash("connection failed", address=address, exc_info=error)

    def _connect(self, sock: socket.socket, accepted: Accepted, handler: Handler) -> Connection:
        endpoint = accepted.endpoint
        return Connection(sock, self._readiness, endpoint.limits, handler, accept_text=accepted.granted.text)

    async def _enter(self, sock: socket.socket, address: str) -> tuple[Connection, bytes] | None:
        """Do the handshake under its one deadline; None when the connection is over."""
        buffer = bytearray()
        secured = not isinstance(sock, ssl.SSLSocket)
        connection: Connection | None = None
        try:
            with trio.move_on_after(self._timeout_s) as deadline:
                if isinstance(sock, ssl.SSLSocket):
                    await tls.handshake(sock, self._turnstile)
                    secured = True
                request = await read_request(sock, buffer, self._turnstile)
                accepted = self._upgrade.decide(request)
                handler = await accepted.endpoint.open(accepted.granted)
                try:
                    connection = self._connect(sock, accepted, handler)
                    await write_all(sock, acceptance(accepted))
                except BaseException:
                    handler.ended("peer_lost")
                    raise
            if deadline.cancelled_caught:
                if not secured:
                    raise TlsFailed("not finished in time", said=True)
                raise Refused(catalogue.HANDSHAKE_TIMEOUT)
        except Refused as refused:
            self._count_refusal(refused, address)
            self._note(address, failed=refused.refusal.blames_client)
            await _answer(sock, refused)
            return None
        except TlsFailed as failure:
            self._count_tls_failure(failure, address)
            return None
        except (OSError, Disconnected) as error:
            self._handshakes.add("disconnected")
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                # TLS 1.3: what the client has against the certificate may come behind the handshake
                self._log_refused("TLS handshake failed", address=address, error=tls.reason(error))
            return None
        assert connection is not None  # noqa: S101  # every other way out returned
        self._handshakes.add("accepted")
        self._note(address, failed=False)
        return connection, bytes(buffer)

    def _note(self, address: str, *, failed: bool) -> None:
        """A handshake of this address has come to its end."""
        self._upgrade.admission.protection.note_handshake(network(address), trio.current_time(), failed=failed)

    def _count_tls_failure(self, failure: TlsFailed, address: str) -> None:
        self._handshakes.add("tls_failed")
        self._note(address, failed=failure.said)
        if failure.said:
            self._log_refused("TLS handshake failed", address=address, error=failure.reason)

    def _count_refusal(self, refused: Refused, address: str) -> None:
        refusal = refused.refusal
        self._handshakes.add(refusal.code)
        self._log_refused(
            "handshake refused",
            address=address,
            status=refusal.status.value,
            code=refusal.code,
            detail=refused.detail,
        )


async def _answer(sock: socket.socket, refused: Refused) -> None:
    """Send the refusal and let the client read it, for `REFUSAL_LINGER_S` at most."""
    with trio.move_on_after(REFUSAL_LINGER_S):
        try:
            await write_all(sock, refusal_answer(refused.refusal, refused.retry_after_s))
            await half_close_and_drain(sock)
        except OSError:
            return
