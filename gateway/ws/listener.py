"""Accepts sockets and gives each one task for its life: address limits, TLS, handshake, session, end.

The task is the barrier: whatever goes wrong with one connection ends there.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar

import trio

from gateway.core import catalogue
from gateway.core.admission import network
from gateway.errors import Disconnected, Refused, TlsFailed
from gateway.ws.connection import BLOCKED, Connection, half_close_and_drain
from gateway.ws.upgrade import (
    acceptance,
    read_request,
    refusal_answer,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Counters
    from gateway.ws.upgrade import Admitted, Handshake

ACCEPTS_PER_TURN: Final = 64
"""Connections accepted before other tasks run."""
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


C = TypeVar("C", bound=Connection)


class Entry(Protocol[C]):
    """Who makes the connection of an accepted handshake, and takes note of its end."""

    def enter(self, sock: socket.socket, admitted: Admitted, /) -> C:
        """Make the connection; may raise Refused."""

    def leave(self, connection: C, /) -> None:
        """The connection that `enter` made has ended."""


class Listener(Generic[C]):
    """The accept loops of the listening sockets (`run`) and the life of each connection.

    ``tls`` may be replaced while running: the next connections get the new context.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        handshake: Handshake,
        entry: Entry[C],
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
        max_connections: int,
        max_pending_per_address: int,
        counters: Counters,
        log_refused: RateLimited,
        log_crash: RateLimited,
    ) -> None:
        """``max_pending_per_address`` bounds an address's handshakes under way; 0 does not."""
        self._sockets = list(sockets)
        self._port: int = self._sockets[0].getsockname()[1]
        self._handshake = handshake
        self._entry = entry
        self.tls = tls
        self._timeout_s = handshake_timeout_s
        self._max_open = max_connections + OVERFLOW
        self._counters = counters
        self._log_refused = log_refused
        self._log_crash = log_crash
        self._open = 0
        self._max_pending = max_pending_per_address
        self._pending: dict[str, int] = {}
        self._turned_away = 0
        self._quiet: trio.Event | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

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
            self._quiet = trio.Event()
            await self._quiet.wait()

    async def run(self, nursery: trio.Nursery) -> None:
        """Accept until cancelled or closed; each connection becomes a task of ``nursery``."""
        async with trio.open_nursery() as loops:
            for sock in self._sockets:
                loops.start_soon(self._run_one, sock, nursery)

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
            self._counters.handshakes["overflow"] += 1
            self._log_refused("connection closed unheard", address=address, open=self._open, limit=self._max_open)
            sock.close()
            return
        host = network(address)
        pending = self._pending.get(host, 0)
        try:
            if max_pending and pending >= max_pending:
                raise Refused(catalogue.TOO_MANY_ATTEMPTS, f"{pending} handshakes of this address are under way")
            self._handshake.admission.knock(host, trio.current_time())
        except Refused as refused:
            self._turn_away(sock, address, refused, nursery)
            return
        self._pending[host] = pending + 1
        self._open += 1
        nursery.start_soon(self._connection, sock, address)

    def _turn_away(self, sock: socket.socket, address: str, refused: Refused, nursery: trio.Nursery) -> None:
        """Answer without reading; under TLS nothing can be said before a handshake, so the connection just ends."""
        self._count_refusal(refused, address)
        if self.tls is None and self._turned_away < MAX_TURNED_AWAY:
            self._turned_away += 1
            nursery.start_soon(self._see_out, sock, refused)
            return
        with suppress(OSError):
            if self.tls is None:
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
                    if self.tls is not None:
                        sock = self._wrap(sock, self.tls)
                    entered = await self._enter(sock, address)
                except OSError:  # wrapping a socket whose peer has gone already
                    self._counters.handshakes["tls_failed"] += 1
                    return
                finally:
                    self._settled(network(address))
                if entered is None:
                    return
                connection, first = entered
                del entered
                try:
                    await connection.run(first)
                finally:
                    self._entry.leave(connection)
            finally:
                self._open -= 1
                sock.close()
        except Exception as error:  # the barrier around each connection
            self._counters.handshakes["error"] += 1
            self._log_crash("connection failed", address=address, exc_info=error)

    @staticmethod
    def _wrap(sock: socket.socket, tls: ssl.SSLContext) -> ssl.SSLSocket:
        return tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    async def _enter(self, sock: socket.socket, address: str) -> tuple[C, bytes] | None:
        """Do the handshake under its one deadline; None when the connection is over."""
        counters = self._counters
        buffer = bytearray()
        secured = not isinstance(sock, ssl.SSLSocket)
        connection: C | None = None
        try:
            with trio.move_on_after(self._timeout_s) as deadline:
                if isinstance(sock, ssl.SSLSocket):
                    await _tls_handshake(sock)
                    secured = True
                request = await read_request(sock, buffer)
                admitted = self._handshake.decide(request)
                connection = self._entry.enter(sock, admitted)
                try:
                    await write_all(sock, acceptance(admitted))
                except BaseException:
                    self._entry.leave(connection)
                    raise
            if deadline.cancelled_caught:
                if not secured:
                    raise TlsFailed("not finished in time", said=True)
                raise Refused(catalogue.HANDSHAKE_TIMEOUT)
        except Refused as refused:
            self._count_refusal(refused, address)
            await _answer(sock, refused)
            return None
        except TlsFailed as failure:
            counters.handshakes["tls_failed"] += 1
            if failure.said:
                self._log_refused("TLS handshake failed", address=address, error=failure.reason)
            return None
        except (OSError, Disconnected) as error:
            counters.handshakes["disconnected"] += 1
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                # TLS 1.3: what the client has against the certificate may come behind the handshake
                self._log_refused("TLS handshake failed", address=address, error=_reason(error))
            return None
        assert connection is not None  # noqa: S101  # every other way out returned
        counters.handshakes["accepted"] += 1
        return connection, bytes(buffer)

    def _count_refusal(self, refused: Refused, address: str) -> None:
        refusal = refused.refusal
        self._counters.handshakes[refusal.code] += 1
        self._log_refused(
            "handshake refused",
            address=address,
            status=refusal.status,
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


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


async def _tls_handshake(sock: ssl.SSLSocket) -> None:
    """Handshake without blocking. Raises TlsFailed; the caller's deadline bounds it."""
    said = False
    try:
        await trio.lowlevel.wait_readable(sock.fileno())
        said = bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))  # the client speaks first
        while True:
            try:
                sock.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(sock.fileno())
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(sock.fileno())
            else:
                return
    except OSError as error:
        raise TlsFailed(_reason(error), said=said) from None
