"""One level-triggered epoll for all connections, its own descriptor waited on by Trio.

A turn takes the sockets that are ready, calls each connection's synchronous `feed`, and yields to Trio. One
wake of Trio so serves many sockets, and no task is scheduled for a message.

States: handing over, or paused (`pause`, when the producer has no room). While paused connections are still read, so
that a ping behind data is answered and an end is seen, but their messages wait in each connection's backlog; who has
filled its share of ``max_held_bytes`` is not read any more, and TCP pushes back to that client. The handler of a
connection that has something left to hand over waits in ``_stalled``, even when the connection has ended by then; after
a pause these go first, a slice at a time.

Invariant: an exception out of one connection's `feed` reaches that connection's `crash` and nobody else.
"""

from __future__ import annotations

import os
import select
from collections import OrderedDict
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKETS_PER_TURN: Final = 256
"""Sockets asked for at once: at 10-20 µs each about 4 ms of work when each has brought one message."""
TURN_S: Final = 0.005
"""Other tasks run after this long, whatever is left of a turn: a read can bring thousands of small messages. One
read is not interrupted."""
BUSY_SOCKETS: Final = 8
"""A turn that served this many is followed by a pause, a quieter one is not: latency stays low when quiet."""
SAMPLE_MASK: Final = 15
"""One turn in 16 is timed, read by read."""
GATHER_S: Final = 0.001
"""The pause after a busy turn, so that reads gather: costs 2-5 ms at p50 under load, saves a fifth of the CPU. None
after a turn that could not serve everybody: reads have gathered already, and librdkafka's thread would use the pause
to send many small batches."""


MIN_SHARE_BYTES: Final = 65_536
"""What a connection may hold during a pause however many others there are, while the sum allows it: a few reads."""
MAX_SHARE_BYTES: Final = 8 * 1024 * 1024
"""What a connection may hold however few others there are: ten minutes of 50 messages of 130 bytes a second."""
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""The sum's bound unless told otherwise."""


class Feedable(Protocol):
    """A connection as this module sees it; all methods are synchronous."""

    fd: int

    def feed(self) -> None:
        """Read what has arrived and handle it."""

    def flush(self) -> None:
        """Write what is waiting to be written."""

    def crash(self, error: Exception) -> None:
        """End the connection because one of the above raised."""


class Stalled(Protocol):
    """Who has something left to hand over: a connection's handler, or what is left of it."""

    @property
    def backlog(self) -> int:
        """Messages read and not handed over yet."""

    def resume(self) -> None:
        """Hand over some of what was read and not yet handed over; `Readiness.stall` or `Readiness.defer`
        when more is left."""

    def crash(self, error: Exception) -> None:
        """End the connection because `resume` raised."""


class Readiness:
    """The shared epoll. `run` is its task; everything else is called from the Trio thread."""

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # ends `run`'s wait for a backlog
        self._epoll.register(self._bell, select.EPOLLIN)
        self._connections: dict[int, Feedable] = {}
        self._unread: set[int] = set()  # descriptors that are not read: their connection holds its share
        self._writing: set[int] = set()  # descriptors that wait to write
        self._stalled: OrderedDict[Stalled, None] = OrderedDict()
        self._unflushed: list[Feedable] = []  # they have put something into their outbox
        self._turning = False
        self._left: list[tuple[int, int]] = []  # of a turn that took too long: they go first in the next
        self._max_held_bytes = max_held_bytes
        self.held_bytes = 0
        """What all backlogs hold, about."""
        self.paused = False
        """True while nobody's messages are handed over."""
        self.now = 0.0
        """Trio's clock at the start of the current turn, in seconds: one reading a turn, not one a message."""
        self.paused_at = 0.0
        """When handing over last paused."""
        self.turns = 0
        self._timing: Callable[[float], None] | None = None

    def time_turns(self, timing: Callable[[float], None]) -> None:
        """Tell ``timing`` how many seconds one `Feedable.feed` took, in turns that are sampled."""
        self._timing = timing

    @property
    def stalled(self) -> int:
        """Connections, ended ones too, that have something left to hand over."""
        return len(self._stalled)

    @property
    def backlog(self) -> int:
        """Messages those have."""
        return sum(connection.backlog for connection in self._stalled)

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Feedable) -> None:
        """Start feeding ``connection``; its descriptor must be non-blocking and stay open until `remove`. Raises
        OSError when the system watches no more descriptors."""
        self._epoll.register(connection.fd, select.EPOLLIN)  # may raise: ENOSPC beyond fs.epoll.max_user_watches
        self._connections[connection.fd] = connection

    def remove(self, connection: Feedable) -> None:
        """Stop feeding ``connection``; harmless when it is not there."""
        if self._connections.get(connection.fd) is connection:
            del self._connections[connection.fd]
            self._unread.discard(connection.fd)
            self._writing.discard(connection.fd)
            self._epoll.unregister(connection.fd)

    def want_write(self, connection: Feedable, wanted: bool) -> None:
        """Say whether ``connection.flush`` is to be called when its socket takes bytes again."""
        self._want(connection, self._writing, wanted)

    def want_read(self, connection: Feedable, wanted: bool) -> None:
        """Say whether ``connection`` is to be read: not while its backlog is full."""
        self._want(connection, self._unread, not wanted)

    def leaves(self, connection: Feedable) -> bool:
        """Whether what the peer sends is left in its socket for now."""
        return connection.fd in self._unread

    def _want(self, connection: Feedable, descriptors: set[int], listed: bool) -> None:
        fd = connection.fd
        if self._connections.get(fd) is connection and listed != (fd in descriptors):
            (descriptors.add if listed else descriptors.discard)(fd)
            reading = 0 if fd in self._unread else select.EPOLLIN
            self._epoll.modify(fd, reading | (select.EPOLLOUT if fd in self._writing else 0))

    def may_hold(self, held_bytes: int) -> bool:
        """Whether a connection whose backlog is ``held_bytes`` may go on reading."""
        share = min(MAX_SHARE_BYTES, self._max_held_bytes // max(1, len(self._connections)))
        return self.held_bytes < self._max_held_bytes and held_bytes < max(MIN_SHARE_BYTES, share)

    def note_held(self, change: int) -> None:
        """The backlogs hold ``change`` bytes more, or less."""
        self.held_bytes += change

    def stall(self, stalled: Stalled) -> None:
        """Pause everybody; ``stalled`` has something left to hand over."""
        self.pause()
        self.defer(stalled)

    def defer(self, stalled: Stalled) -> None:
        """``stalled`` has something left to hand over, and room for it: its turn comes again."""
        self._stalled[stalled] = None
        if not self.paused:
            self._ring()

    def flush_soon(self, connection: Feedable) -> None:
        """Let ``connection`` write at the end of this turn, or now where there is no turn: all it has in one send."""
        if not self._unflushed and not self._turning:
            self._ring()
        self._unflushed.append(connection)

    def _ring(self) -> None:
        """Let `run` go on with what is stalled, or not written yet."""
        if not self._epoll.closed:
            os.eventfd_write(self._bell, 1)

    def pause(self) -> None:
        """Hand over nothing more."""
        if not self.paused:
            self.paused = True
            self.paused_at = trio.current_time()

    def resume(self) -> None:
        """Hand over again. Stalled connections go first; if one finds no room, everybody pauses again."""
        self.paused = False
        self._catch_up()
        if self._stalled and not self.paused:
            self._ring()

    def _catch_up(self) -> None:
        """Let stalled connections hand over, for `TURN_S` at most."""
        until = perf_counter() + TURN_S
        while self._stalled and not self.paused:
            connection, _ = self._stalled.popitem(last=False)
            try:
                connection.resume()
            except Exception as error:  # the barrier around each connection
                connection.crash(error)
            if perf_counter() > until:
                return

    async def run(self) -> None:
        """Feed connections until cancelled; closes the epoll then."""
        try:
            while True:
                if self._stalled and not self.paused:
                    self._catch_up()
                self._flush()
                events, self._left = self._left or self._epoll.poll(0, SOCKETS_PER_TURN), []
                if not events:
                    if self._stalled and not self.paused:
                        await trio.lowlevel.checkpoint()
                    else:
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                    continue
                self._turn(events)
                self._flush()
                # hot: gathering reads under load; bench/ingest.py
                behind = self._left or len(events) == SOCKETS_PER_TURN
                if len(events) >= BUSY_SOCKETS and not behind:
                    await trio.sleep(GATHER_S)
                else:
                    await trio.lowlevel.checkpoint()
        finally:
            self.close()

    def close(self) -> None:
        """Give the epoll back. Connections may end after that, and call `remove`; harmless when repeated."""
        if not self._epoll.closed:
            self._connections.clear()
            self._epoll.close()
            os.close(self._bell)

    def _flush(self) -> None:
        """Let everybody write who has put something into its outbox since the last time."""
        while self._unflushed:
            unflushed, self._unflushed = self._unflushed, []
            for connection in unflushed:
                try:
                    connection.flush()
                except Exception as error:  # the barrier around each connection
                    connection.crash(error)

    def _turn(self, events: list[tuple[int, int]]) -> None:
        self.now = trio.current_time()
        self._turning = True
        self.turns += 1
        connections = self._connections
        timing = self._timing if not self.turns & SAMPLE_MASK else None
        now = perf_counter()
        until = now + TURN_S
        done = 0
        for fd, event in events:
            done += 1
            connection = connections.get(fd)
            if connection is None:
                if fd == self._bell:
                    os.eventfd_read(fd)
                continue  # ended earlier in this turn
            try:
                if event & select.EPOLLOUT:
                    connection.flush()
                if event & ~select.EPOLLOUT:
                    connection.feed()
            except Exception as error:  # the barrier around each connection
                connection.crash(error)
            began, now = now, perf_counter()
            if timing is not None:
                timing(now - began)
            if now > until:
                self._left = events[done:]
                break
        self._turning = False
