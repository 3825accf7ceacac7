"""One WebSocket connection after its handshake: bytes in, messages out to its handler, close handshake.

States:

* OPEN: fed by `Readiness`; messages go to the handler.
* CLOSING: the server has sent a close frame in order (drain, idle, token expired); messages that were under way
  are still taken where the close allows it, until the peer's close frame or the deadline.
* ENDED: out of the epoll for good. The connection's own task half-closes, waits for the peer's end of file so
  that the close frame is not lost to a reset, and closes the socket.

Only forward transitions happen. The task that called `run` sleeps through OPEN, owns everything after it, and closes
the socket in any case, cancellation included.

What messages mean is the handler's (`gateway.ws.handler`); pings, closes, timeouts and failures of the protocol are
handled here.
"""

from __future__ import annotations

import math
import random
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from gateway.core import catalogue
from gateway.ws import frames
from gateway.ws.frames import Decoder, Failure, PeerClose, Ping
from gateway.ws.handler import CLOSING, ENDED, FLOOD_S, GONE, OPEN
from gateway.ws.outbox import BLOCKED, Full, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.catalogue import Close
    from gateway.ws.frames import Event, Item, Payload
    from gateway.ws.handler import ConnectionLimits, Handler
    from gateway.ws.readiness import Readiness

# long: one connection's whole life, from its first byte to its closed socket

READ_BYTES: Final = 16_384
"""One read. Exactly a TLS record (RFC 8446 5.1): one SSL read then returns it whole, and nothing stays decrypted inside
OpenSSL where epoll cannot see it. 64 KiB costs 0.8 µs more a read, for the allocation (bench/micro.py)."""

SMALL_READ_BYTES: Final = 448
"""One read of a plain connection until one fills it: with its head such a bytes object comes from Python's own small
blocks (512 bytes at most), while 16 KiB are cut out of malloc's memory and given back in two pieces."""


class Connection:
    """A socket, its frame decoder, its outbox and its close handshake, on behalf of a `Handler`."""

    __slots__ = (
        "_controls",
        "_controls_at",
        "_controls_here",
        "_decoder",
        "_handler",
        "_last_ping",
        "_least_read_bytes",
        "_limits",
        "_outbox",
        "_parting",
        "_read_bytes",
        "_readiness",
        "_takes_while_closing",
        "_task",
        "due",
        "fd",
        "last_heard",
        "outcome",
        "sock",
        "state",
    )

    def __init__(
        self,
        sock: socket.socket,
        readiness: Readiness,
        limits: ConnectionLimits,
        handler: Handler,
        *,
        accept_text: bool = False,
    ) -> None:
        now = trio.current_time()
        self.sock = sock
        self.fd = sock.fileno()
        self.state = OPEN
        self.outcome = "peer_lost"
        """Why it ended, as `Handler.ended` is told."""
        self.last_heard = now
        # Spreads the pings of clients that all came back at the same moment.
        self._last_ping = now - random.random() * limits.ping_interval_s  # noqa: S311  # not a secret
        self.due = math.inf  # not looked after before `run` has started it
        self._readiness = readiness
        self._limits = limits
        self._handler = handler
        self._decoder = Decoder(
            limits.max_message_bytes,
            max_fragments=limits.max_fragments,
            accept_text=accept_text,
            max_text_bytes=limits.max_text_bytes,
        )
        self._least_read_bytes = READ_BYTES if isinstance(sock, ssl.SSLSocket) else SMALL_READ_BYTES
        self._read_bytes = self._least_read_bytes
        self._outbox: Outbox | None = None
        self._parting = False  # the handler has had its last chance to say something
        self._controls = 0.0
        self._controls_at = 0.0
        self._controls_here = 0
        self._takes_while_closing = False
        self._task: trio.lowlevel.Task | None = None

    @property
    def limits(self) -> ConnectionLimits:
        """Its bounds."""
        return self._limits

    @property
    def is_read(self) -> bool:
        """What the peer sends is read at the moment."""
        return not self._readiness.leaves(self)

    @property
    def unsent_bytes(self) -> int:
        """What the peer has not taken yet."""
        return 0 if self._outbox is None else self._outbox.size_bytes

    def want_read(self, wanted: bool) -> None:
        """Say whether the peer is to be read."""
        self._readiness.want_read(self, wanted)

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
        # hot: nearly every read brings nothing but messages, for an open connection
        decoder = self._decoder
        items = decoder.receive(data)
        if decoder.only_messages and self.state == OPEN:
            if items:
                self._handler.received(items)  # type: ignore[arg-type]  # as `only_messages` says
        else:
            self._sort(items)

    def _sort(self, items: list[Item]) -> None:
        """Hand over messages, and handle everything else in its place between them."""
        open_first = self.state == OPEN
        messages: list[Payload] = []
        for item in items:
            if isinstance(item, bytes | str):
                messages.append(item)
                continue
            self._give(messages, open_first=open_first)
            messages = []
            if self._fails(item):
                return  # nothing behind counts (RFC 6455 7.1.7)
        self._give(messages, open_first=open_first)

    def _give(self, messages: list[Payload], *, open_first: bool) -> None:
        """Hand messages of a read over: not those behind a close that takes no rest, of this read either.

        A peer that is gone before it could be answered had sent them before that.
        """
        taken = open_first if self.state == ENDED else self.state == OPEN or self._takes_while_closing
        if messages and taken:
            self._handler.received(messages)

    def _fails(self, event: Event) -> bool:
        """Handle what is no message; true when that failed the connection.

        A peer that is gone before it could be answered has not: what it had sent before is taken.
        """
        alive = self.state != ENDED
        self._event(event)
        return alive and self.state == ENDED and self.outcome not in ("peer_lost", "stalled_peer")

    def flush(self) -> None:
        """Write what is waiting, in one send."""
        outbox = self._outbox
        if outbox is None or self.state == ENDED:
            return  # the connection's own task writes the rest
        try:
            outbox.send(self.sock, trio.current_time())
        except OSError:
            self._end("peer_lost")
            return
        self._readiness.want_write(self, bool(outbox))
        if not outbox:
            self._outbox = None

    def crash(self, error: Exception) -> None:
        """End with 1011 because of ``error``; the other connections never know. Never raises."""
        with suppress(Exception):
            self._handler.crashed(error)
        for _ in range(2):  # the second time without last words, when those have raised
            with suppress(Exception):
                self.fail(catalogue.CLOSE_INTERNAL)
                return
        self._end(catalogue.CLOSE_INTERNAL.name)

    # Sending

    def send(self, frame: bytes) -> bool:
        """Send one encoded frame when the turn ends, or as much of it as the socket takes; the rest when it can.

        False when it was not taken: after a close frame nothing more is sent (RFC 6455 5.5.1), and with `Full.REFUSE`
        nothing that would make more than ``max_unsent_bytes`` wait, which with `Full.END` costs the peer its
        connection. One frame may be longer than that, and the last words and the close frame always find room.
        """
        return self.state == OPEN and self._put(frame)

    def _put(self, frame: bytes) -> bool:
        outbox = self._outbox
        if outbox is None:
            outbox = self._outbox = Outbox(trio.current_time())
            self._readiness.flush_soon(self)
        elif outbox.size_bytes + len(frame) > self._limits.max_unsent_bytes and not self._parting:
            self.flush()  # it may have gathered in this turn alone
            if self.state == ENDED:
                return False
            if self._outbox is None:
                return self._put(frame)
            if outbox.size_bytes + len(frame) > self._limits.max_unsent_bytes:
                if self._limits.when_full is Full.END:
                    self._end("stalled_peer")
                return False
        outbox.put(frame)
        return True

    # Ending

    def close(self, close: Close, *, take_rest: bool = False) -> None:
        """Start the close handshake; ``take_rest`` still takes what the peer sent before it answers."""
        if self.state != OPEN:
            return
        self._part(close, "")
        self._put_close(close.code, close.reason)
        if self.state == OPEN:  # the write may have ended it
            self.outcome = close.name
            self._takes_while_closing = take_rest
            self.state = CLOSING
            self._wake()

    def fail(self, close: Close, detail: str = "") -> None:
        """Fail the connection (RFC 6455 7.1.7): close frame, then nothing the peer sends matters."""
        if self.state == OPEN:
            self._part(close, detail)
            self._put_close(close.code, detail or close.reason)
        self._end(close.name)

    def _part(self, close: Close | None, detail: str) -> None:
        """Let the handler say its last words, once."""
        if not self._parting:
            self._parting = True
            self._handler.closing(close, detail)

    def _put_close(self, code: int, reason: str = "") -> None:
        self._put(frames.encode_close(code, reason))

    def _end(self, outcome: str) -> None:
        if self.state == ENDED:
            return
        if self.state == OPEN:
            self.outcome = outcome
        self.state = ENDED
        self._readiness.remove(self)
        self._wake()

    def _event(self, event: Event) -> None:
        """Handle a control event."""
        if isinstance(event, Failure):
            self.fail(event.close, event.detail)
        elif isinstance(event, PeerClose):
            if self.state == OPEN:  # RFC 6455 5.5.1: answer with the code received
                self._part(None, "")
                self._put_close(event.code)
            self._end("peer_closed")
        else:
            self._count_control()
            if isinstance(event, Ping):
                self.send(frames.encode(frames.PONG, event.payload))

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
            self.fail(catalogue.CLOSE_CONTROL_FLOOD, catalogue.CLOSE_CONTROL_FLOOD.reason)

    # Called by Heartbeat

    def tick(self, now: float) -> None:
        """Do what is due at ``now`` and set ``due`` to when to come back; all in Trio's seconds."""
        limits, outbox = self._limits, self._outbox
        if outbox is not None and now - outbox.waiting_since >= limits.unsent_timeout_s:
            self._end("stalled_peer")
            return
        self.due = self._handler.tick(now)
        if self.state != OPEN:
            return
        silent_since = self.last_heard
        if self._readiness.leaves(self):  # who is not read cannot be judged silent
            silent_since = self.last_heard = now
        if now - silent_since >= limits.idle_timeout_s:
            self.close(catalogue.CLOSE_IDLE)
            return
        if now - self._last_ping >= limits.ping_interval_s:
            self._last_ping = now
            self.send(frames.encode(frames.PING, b""))
        outbox = self._outbox  # the handler may have sent something, as the ping was
        due = min(self._last_ping + limits.ping_interval_s, silent_since + limits.idle_timeout_s)
        if outbox is not None:
            due = min(due, outbox.waiting_since + limits.unsent_timeout_s)
        self.due = min(self.due, due)

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
            handler, self._handler = self._handler, GONE
            try:
                self._readiness.remove(self)
                self.sock.close()
            finally:
                handler.ended(self.outcome)

    def _start(self, first: bytes) -> None:
        """Enter the epoll; take what came with the handshake, behind the same barrier as every feed."""
        self._readiness.add(self)
        self.due = trio.current_time()
        try:
            self._handler.opened(self)
            if first:
                self._sort(self._decoder.receive(first))
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
                self._outbox.send(self.sock, trio.current_time())
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
