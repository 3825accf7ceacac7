"""Accepts sockets and gives each one task for its life: TLS, handshake, session, end.

The task is the barrier: whatever goes wrong with one connection ends there.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import trio

from gateway import refusals
from gateway.errors import Refused, StartupError
from gateway.ingress.connection import BLOCKED, Connection, half_close_and_drain
from gateway.ingress.handshake import (
    Disconnected,
    acceptance,
    read_request,
    refusal_answer,
    write_all,
)

if TYPE_CHECKING:
    from gateway.ingress.handshake import Admitted, Handshake
    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Counters

ACCEPTS_PER_TURN: Final = 64
"""Connections accepted before other tasks run."""
OVERFLOW: Final = 256
"""Sockets beyond the connection cap that are still heard, so that they get their 503; more are closed unheard. It is
more than one address may have pending by default: silent sockets of one address leave places for the others."""
NO_DESCRIPTOR_PAUSE_S: Final = 0.1
"""Out of descriptors or memory: give connections that end time to release some."""
REFUSAL_LINGER_S: Final = 1.0
"""How long a refused client may take to read its answer and close."""

_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


C = TypeVar("C", bound=Connection)


class Entry(Protocol[C]):
    """Who makes the connection of an accepted handshake, and takes note of its end."""

    def enter(self, sock: socket.socket, admitted: Admitted, /) -> C:
        """Make the connection; may raise Refused."""

    def leave(self, connection: C, /) -> None:
        """The connection that `enter` made has ended."""


def in_url(host: str) -> str:
    """A host as URLs write it (RFC 3986 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def open_listening_socket(
    host: str, port: int, *, backlog: int, reuse_port: bool, listening: bool = True
) -> socket.socket:
    """A bound, non-blocking socket; port 0 picks a free one. Raises StartupError naming the address.

    Without ``listening`` it only keeps the port for others that share it.
    """
    where = f"listen: {host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(f"{where}: no such address: {error.strerror or error}") from error
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; pongs and notices are small and must not wait for an ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setblocking(False)
        sock.bind(address)
        if listening:
            sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise StartupError(f"{where}: {error.strerror or error}") from error
    return sock


class Listener(Generic[C]):
    """The accept loop of one listening socket (`run`) and the life of each connection."""

    def __init__(
        self,
        sock: socket.socket,
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
        self._sock = sock
        self._handshake = handshake
        self._entry = entry
        self._tls = tls
        self._timeout_s = handshake_timeout_s
        self._max_open = max_connections + OVERFLOW
        self._counters = counters
        self._log_refused = log_refused
        self._log_crash = log_crash
        self._open = 0
        self._max_pending = max_pending_per_address
        self._pending: dict[str, int] = {}

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = self._sock.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop accepting: connections that were not accepted yet are reset by the system."""
        trio.lowlevel.notify_closing(self._sock)  # `run` may be waiting on it
        self._sock.close()

    async def run(self, nursery: trio.Nursery) -> None:
        """Accept until cancelled or closed; each connection becomes a task of ``nursery``."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                exhausted = self._accept(nursery)
            except (trio.ClosedResourceError, ValueError):
                return
            if exhausted:
                await trio.sleep(NO_DESCRIPTOR_PAUSE_S)

    def _accept(self, nursery: trio.Nursery) -> bool:
        """Accept what is waiting; true when the process is out of descriptors or memory."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = self._sock.accept()
            except BLOCKED:
                return False
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._log_crash("accept failed", error=error.strerror)
                    return True
                if error.errno == errno.EBADF:
                    raise ValueError from error
                continue  # the connection died in the backlog (accept(2), "Error handling")
            if self._open >= self._max_open:
                self._counters.handshakes["overflow"] += 1
                sock.close()
                continue
            sock.setblocking(False)
            host = str(address[0])
            pending = self._pending.get(host, 0)
            if self._max_pending and pending >= self._max_pending:
                self._turn_away(sock)
                continue
            self._pending[host] = pending + 1
            self._open += 1
            nursery.start_soon(self._connection, sock, host)
        return False

    def _turn_away(self, sock: socket.socket) -> None:
        """Answer 429 without a task: too many of this address's handshakes are under way."""
        refusal = refusals.TOO_MANY_ATTEMPTS
        self._counters.handshakes[refusal.code] += 1
        with suppress(OSError):
            if self._tls is None:
                sock.send(refusal_answer(refusal, refusal.retry_after_s))
        sock.close()

    def _settled(self, host: str) -> None:
        """A handshake of this address has ended, one way or the other."""
        self._pending[host] -= 1
        if not self._pending[host]:
            del self._pending[host]

    async def _connection(self, sock: socket.socket, address: str) -> None:
        """One connection from accept to close; nothing but cancellation gets out of here."""
        try:
            try:
                try:
                    if self._tls is not None:
                        sock = self._wrap(sock, self._tls)
                    entered = await self._enter(sock, address)
                except OSError:  # wrapping a socket whose peer has gone already
                    self._counters.handshakes["tls_failed"] += 1
                    return
                finally:
                    self._settled(address)
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
        refused: Refused | None = None
        try:
            with trio.move_on_after(self._timeout_s) as deadline:
                if isinstance(sock, ssl.SSLSocket):
                    await _tls_handshake(sock)
                    secured = True
                request = await read_request(sock, buffer)
                admitted = self._handshake.decide(request, address)
                connection = self._entry.enter(sock, admitted)
                try:
                    await write_all(sock, acceptance(admitted))
                except BaseException:
                    self._entry.leave(connection)
                    raise
            if deadline.cancelled_caught:
                refused = Refused(refusals.HANDSHAKE_TIMEOUT) if secured else None
                if refused is None:
                    counters.handshakes["tls_failed"] += 1
                    return None
        except Refused as error:
            refused = error
        except (OSError, Disconnected):
            counters.handshakes["disconnected" if secured else "tls_failed"] += 1
            return None
        if refused is not None:
            await self._refuse(sock, refused, address)
            return None
        assert connection is not None  # noqa: S101  # every other way out returned
        counters.handshakes["accepted"] += 1
        return connection, bytes(buffer)

    async def _refuse(self, sock: socket.socket, refused: Refused, address: str) -> None:
        refusal = refused.refusal
        self._counters.handshakes[refusal.code] += 1
        self._log_refused(
            "handshake refused",
            address=address,
            status=refusal.status,
            code=refusal.code,
            detail=refused.detail,
        )
        with trio.move_on_after(REFUSAL_LINGER_S):
            try:
                await write_all(sock, refusal_answer(refusal, refused.retry_after_s))
                await half_close_and_drain(sock)
            except OSError:
                return


async def _tls_handshake(sock: ssl.SSLSocket) -> None:
    """Handshake without blocking. Raises OSError (ssl.SSLError is one); the caller's deadline bounds it."""
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock.fileno())
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock.fileno())
        else:
            return
