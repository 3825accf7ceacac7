"""One WebSocket connection after its handshake: bytes in, items out, close handshake.

States:

* OPEN: fed by `Readiness`; items go to `_take`.
* CLOSING: the server has sent a close frame in order (drain, idle, token expired); items that were under way
  are still taken where the close allows it, until the peer's close frame or the deadline.
* ENDED: out of the epoll for good. The connection's own task half-closes, waits for the peer's end of file so
  that the close frame is not lost to a reset, and closes the socket.

Only forward transitions happen. The task that called `run` sleeps through OPEN, owns everything after it, and closes
the socket in any case, cancellation included.
"""

from __future__ import annotations

import math
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from gateway.core import catalogue
from gateway.ws import frames
from gateway.ws.frames import Decoder, Failure, PeerClose, Ping, Pong

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.catalogue import Close
    from gateway.ws.frames import Item
    from gateway.ws.readiness import Readiness

READ_BYTES: Final = 16_384
"""One read. Exactly a TLS record (RFC 8446 5.1): one SSL read then returns it whole, and nothing stays decrypted inside
OpenSSL where epoll cannot see it. 64 KiB costs 0.8 µs more a read, for the allocation (bench/micro.py)."""

SMALL_READ_BYTES: Final = 448
"""One read of a plain connection until one fills it: with its head such a bytes object comes from Python's own small
blocks (512 bytes at most), while 16 KiB are cut out of malloc's memory and given back in two pieces."""

FLOOD_S: Final = 10
"""How long control frames may come faster than allowed. What one read brings counts as one second's worth at most: it
may have gathered while the gateway or the network stood still."""

OPEN: Final = 0
CLOSING: Final = 1
ENDED: Final = 2

BLOCKED: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError)
WRITE_BLOCKED: Final = (*BLOCKED, ssl.SSLWantWriteError)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one connection; one instance is shared by all."""

    max_message_bytes: int
    max_controls_per_s: int
    """Control frames a second, over `FLOOD_S` of reading, before the connection is closed with 1008."""
    max_unsent_bytes: int
    """Bytes the peer has not taken yet; more ends the connection."""
    unsent_timeout_s: float
    """How long bytes may wait for the peer to take them."""
    ping_interval_s: float
    idle_timeout_s: float
    """Silence, pongs included, after which the connection is closed with 4408."""
    close_timeout_s: float
    """How long the peer may take for its part of the close, and again for its end of file."""
    max_fragments: int = frames.MAX_FRAGMENTS


class Connection:
    """A socket, its frame decoder and its close handshake. Subclasses decide what messages mean (`_take`)."""

    __slots__ = (
        "_controls",
        "_controls_at",
        "_controls_here",
        "_decoder",
        "_least_read_bytes",
        "_limits",
        "_outbox",
        "_read_bytes",
        "_readiness",
        "_takes_while_closing",
        "_task",
        "_unsent_since",
        "due",
        "fd",
        "last_heard",
        "last_ping",
        "outcome",
        "sock",
        "state",
    )

    def __init__(
        self,
        sock: socket.socket,
        readiness: Readiness,
        limits: ConnectionLimits,
        *,
        accept_text: bool = False,
    ) -> None:
        now = trio.current_time()
        self.sock = sock
        self.fd = sock.fileno()
        self.state = OPEN
        self.outcome = "peer_lost"
        """Why it ended: a close's name, ``peer_closed``, ``peer_lost``, ``stalled_peer`` or ``cancelled``."""
        self.last_heard = now
        self.last_ping = now
        self.due = math.inf  # not looked after before `run` has started it
        self._readiness = readiness
        self._limits = limits
        self._decoder = Decoder(limits.max_message_bytes, max_fragments=limits.max_fragments, accept_text=accept_text)
        self._least_read_bytes = READ_BYTES if isinstance(sock, ssl.SSLSocket) else SMALL_READ_BYTES
        self._read_bytes = self._least_read_bytes
        self._outbox: bytearray | None = None
        self._unsent_since = 0.0
        self._controls = 0.0
        self._controls_at = 0.0
        self._controls_here = 0
        self._takes_while_closing = False
        self._task: trio.lowlevel.Task | None = None

    @property
    def backlog(self) -> int:
        """Messages read and not handed over yet; none in a connection that hands over nothing."""
        return 0

    # What a subclass provides

    def _take(self, items: list[Item]) -> None:
        """Handle what one read completed; `_event` is for everything but messages."""
        raise NotImplementedError

    def _greet(self) -> None:
        """Say the first words of the connection; by default nothing."""

    def _log_failure(self, close: Close, detail: str) -> None:
        """Say that the peer broke the protocol; by default nothing."""

    def _log_crash(self, error: Exception) -> None:
        """Say that handling this connection's input raised."""
        raise NotImplementedError

    def _last_words(self) -> None:
        """Say what has gathered, before any close frame is sent; by default nothing."""

    def _announce(self, close: Close, reason: str) -> None:
        """Say in the connection's own language that it is about to be closed; by default nothing."""

    # Called by Readiness

    def feed(self) -> None:
        """Read once and handle what arrived."""
        try:
            data = self.sock.recv(self._read_bytes)
        except BLOCKED:
            return
        except OSError:  # reset, TLS failure, or a TLS read that must write first to a peer that does not read
            self._end("peer_lost")
            return
        if not data:
            self._end("peer_lost")
            return
        if len(data) >= SMALL_READ_BYTES:
            self._read_bytes = READ_BYTES
        elif self._read_bytes != self._least_read_bytes:
            self._read_bytes = self._least_read_bytes
        self.last_heard = self._readiness.now
        items = self._decoder.receive(data)
        if items:
            self._take(items)

    def flush(self) -> None:
        """Write what is waiting."""
        outbox = self._outbox
        if outbox is None:
            return
        try:
            sent = self.sock.send(outbox)
        except WRITE_BLOCKED:
            return
        except OSError:
            self._end("peer_lost")
            return
        del outbox[:sent]
        self._unsent_since = trio.current_time()
        if not outbox:
            self._outbox = None
            self._readiness.want_write(self, False)

    def resume(self) -> None:
        """Hand over what could not be handed over before; nothing in a connection that hands over nothing."""

    def crash(self, error: Exception) -> None:
        """End with 1011 because of ``error``; the other connections never know. Never raises."""
        try:
            self._log_crash(error)
            self.fail(catalogue.CLOSE_INTERNAL)
        except Exception:  # the barrier's own last resort
            self._end(catalogue.CLOSE_INTERNAL.name)

    # Sending

    def send(self, opcode: int, payload: bytes) -> None:
        """Send one frame, or as much of it as the socket takes now; the rest follows when it can.

        A peer that has left more than ``max_unsent_bytes`` untaken loses its connection. After a close
        frame nothing more is sent (RFC 6455 5.5.1).
        """
        if self.state == OPEN:
            self._write(frames.encode(opcode, payload))

    def _write(self, data: bytes) -> None:
        if self._outbox is not None:
            self._outbox += data
            if len(self._outbox) > self._limits.max_unsent_bytes:
                self._end("stalled_peer")
            return
        try:
            sent = self.sock.send(data)
        except WRITE_BLOCKED:
            sent = 0
        except OSError:
            self._end("peer_lost")
            return
        if sent < len(data):
            self._outbox = bytearray(data[sent:])
            self._unsent_since = trio.current_time()
            self._readiness.want_write(self, True)

    # Ending

    def close(self, close: Close, *, take_rest: bool = False) -> None:
        """Start the close handshake; ``take_rest`` still takes what the peer sent before it answers."""
        if self.state != OPEN:
            return
        self._last_words()
        self._announce(close, close.reason)
        self._write(frames.encode_close(close.code, close.reason))
        if self.state == OPEN:  # the write may have ended it
            self.outcome = close.name
            self._takes_while_closing = take_rest
            self.state = CLOSING
            self._wake()

    def fail(self, close: Close, detail: str = "") -> None:
        """Fail the connection (RFC 6455 7.1.7): close frame, then nothing the peer sends matters."""
        if self.state == OPEN:
            self._last_words()
            self._announce(close, detail or close.reason)
            self._write(frames.encode_close(close.code, detail or close.reason))
        self._end(close.name)

    def _end(self, outcome: str) -> None:
        if self.state == ENDED:
            return
        if self.state == OPEN:
            self.outcome = outcome
        self.state = ENDED
        self._readiness.remove(self)
        self._wake()

    def _event(self, item: Item) -> None:
        """Handle a control event."""
        if isinstance(item, Failure):
            self._log_failure(item.close, item.detail)
            self.fail(item.close, item.detail)
        elif isinstance(item, PeerClose):
            if self.state == OPEN:  # RFC 6455 5.5.1: answer with the code received
                self._last_words()
                self._write(frames.encode_close(item.code))
            self._end("peer_closed")
        elif isinstance(item, Ping | Pong):
            self._count_control()
            if isinstance(item, Ping):
                self.send(frames.PONG, item.payload)

    def _count_control(self) -> None:
        """A leaky bucket of `FLOOD_S` seconds' worth."""
        now, limit = self._readiness.now, self._limits.max_controls_per_s
        if now != self._controls_at:  # another read
            self._controls = max(0.0, self._controls - (now - self._controls_at) * limit)
            self._controls_at, self._controls_here = now, 0
        self._controls_here += 1
        if self._controls_here <= limit:
            self._controls += 1
        if self._controls > limit * FLOOD_S:
            self._log_failure(catalogue.CLOSE_CONTROL_FLOOD, catalogue.CLOSE_CONTROL_FLOOD.reason)
            self.fail(catalogue.CLOSE_CONTROL_FLOOD)

    # Called by Heartbeat

    def tick(self, now: float) -> None:
        """Do what is due at ``now`` and set ``due`` to when to come back; all in Trio's seconds."""
        limits = self._limits
        if self._outbox is not None and now - self._unsent_since >= limits.unsent_timeout_s:
            self._end("stalled_peer")
            return
        silent_since = self.last_heard
        if self._readiness.leaves(self):  # who is not read cannot be judged silent
            silent_since = self.last_heard = now
        if now - silent_since >= limits.idle_timeout_s:
            self.close(catalogue.CLOSE_IDLE)
            return
        if now - self.last_ping >= limits.ping_interval_s:
            self.last_ping = now
            self.send(frames.PING, b"")
        self.due = min(self.last_ping + limits.ping_interval_s, silent_since + limits.idle_timeout_s)
        if self._outbox is not None:
            self.due = min(self.due, self._unsent_since + limits.unsent_timeout_s)

    # The connection's own task

    async def run(self, first: bytes = b"") -> None:
        """Live until the connection has ended and its socket is closed.

        ``first`` is what arrived with the handshake's last bytes. Cancellation closes the socket at once.
        """
        try:
            self._start(first)
            while self.state == OPEN:
                await self._park()
            if self.state == CLOSING:
                await self._await_peer_close()
            if self.outcome not in ("peer_lost", "stalled_peer"):
                with trio.move_on_after(self._limits.close_timeout_s):
                    await self._half_close_and_drain()
        except trio.Cancelled:
            self.outcome = "cancelled"
            raise
        finally:
            self.state = ENDED
            self._readiness.remove(self)
            self.sock.close()

    def _start(self, first: bytes) -> None:
        """Enter the epoll; take what came with the handshake, behind the same barrier as every feed."""
        self._readiness.add(self)
        self.due = trio.current_time()
        try:
            self._greet()
            items = self._decoder.receive(first) if first else None
            if items:
                self._take(items)
        except Exception as error:  # the barrier around each connection
            self.crash(error)

    async def _await_peer_close(self) -> None:
        with trio.move_on_after(self._limits.close_timeout_s):
            while self.state == CLOSING:
                await self._park()
        self._end(self.outcome)

    async def _half_close_and_drain(self) -> None:
        """Write the rest, send FIN, read to the end of file.

        Closing at once would answer bytes still in flight with a reset, and a reset makes the peer's
        system discard a close frame it has not read yet.
        """
        try:
            while self._outbox:
                await trio.lowlevel.wait_writable(self.sock)
                try:
                    del self._outbox[: self.sock.send(self._outbox)]
                except WRITE_BLOCKED:
                    continue
            await half_close_and_drain(self.sock)
        except OSError:
            return

    async def _park(self) -> None:
        """Sleep until `_wake`."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: Callable[[], None]) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)


async def half_close_and_drain(sock: socket.socket) -> None:
    """Send FIN, then read and discard until the peer's; bounded only by the caller's deadline. Raises OSError."""
    if isinstance(sock, ssl.SSLSocket):
        with suppress(OSError, ValueError):
            sock.unwrap()  # sends close_notify, then reports that the peer's is not here yet
    # socket.socket's own methods, under TLS too: what still comes is discarded, not decrypted
    socket.socket.shutdown(sock, socket.SHUT_WR)
    while True:
        await trio.lowlevel.wait_readable(sock.fileno())
        try:
            if not socket.socket.recv(sock, READ_BYTES):
                return
        except BLOCKED:
            continue
