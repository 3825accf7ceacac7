"""One level-triggered epoll for all connections, its own descriptor waited on by Trio.

A turn takes the sockets that are ready, calls each connection's synchronous `feed`, and yields to Trio. One
wake of Trio so serves many sockets, and no task is scheduled for a message.

States: polling, or paused (`pause`, when the producer has no room). While paused nothing is read from
anybody: TCP pushes back to the clients. A connection that could not hand over everything it had read
waits in ``_stalled`` and goes first when reading resumes, even when it has ended by then.

Invariant: an exception out of one connection's `feed` reaches that connection's `crash` and nobody else.
"""

from __future__ import annotations

import select
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
GATHER_S: Final = 0.001
"""The pause after a busy turn, so that reads gather: costs 2-5 ms at p50 under load, saves a fifth of the CPU. None
after a turn that could not serve everybody: reads have gathered already, and librdkafka's thread would use the pause
to send many small batches."""


class Feedable(Protocol):
    """A connection as this module sees it; all methods are synchronous."""

    fd: int

    @property
    def backlog(self) -> int:
        """Messages read and not handed over yet."""

    def feed(self) -> None:
        """Read what has arrived and handle it."""

    def flush(self) -> None:
        """Write what is waiting to be written."""

    def resume(self) -> None:
        """Hand over what was read and not yet handed over."""

    def crash(self, error: Exception) -> None:
        """End the connection because one of the above raised."""


class Readiness:
    """The shared epoll. `run` is its task; everything else is called from the Trio thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Feedable] = {}
        self._stalled: list[Feedable] = []
        self._left: list[tuple[int, int]] = []  # of a turn that took too long: they go first in the next
        self._resumed: trio.Event | None = None
        self.now = 0.0
        """Trio's clock at the start of the current turn, in seconds: one reading a turn, not one a message."""
        self.paused_at = 0.0
        """When reading last paused."""
        self.resumed_at = 0.0
        """When reading last resumed after a pause; silence before that is not the client's."""
        self.turns = 0
        self.timing: Callable[[float, int], None] | None = None

    @property
    def paused(self) -> bool:
        """True while nobody is read."""
        return self._resumed is not None

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
        """Start feeding ``connection``; its descriptor must be non-blocking and stay open until `remove`."""
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)

    def remove(self, connection: Feedable) -> None:
        """Stop feeding ``connection``; harmless when it is not there."""
        if self._connections.get(connection.fd) is connection:
            del self._connections[connection.fd]
            self._epoll.unregister(connection.fd)

    def want_write(self, connection: Feedable, wanted: bool) -> None:
        """Say whether ``connection.flush`` is to be called when its socket takes bytes again."""
        if self._connections.get(connection.fd) is connection:
            interest = select.EPOLLIN | (select.EPOLLOUT if wanted else 0)
            self._epoll.modify(connection.fd, interest)

    def stall(self, connection: Feedable) -> None:
        """Pause everybody; ``connection`` has something left to hand over."""
        self._stalled.append(connection)
        self.pause()

    def pause(self) -> None:
        """Stop reading from every connection."""
        if self._resumed is None:
            self._resumed = trio.Event()
            self.paused_at = trio.current_time()

    def resume(self) -> None:
        """Read again. Stalled connections hand over first; if one stalls again, so does everybody."""
        if self._resumed is None:
            return
        resumed, self._resumed = self._resumed, None
        stalled, self._stalled = self._stalled, []
        for connection in stalled:
            if self.paused:
                self._stalled.append(connection)
                continue
            try:
                connection.resume()
            except Exception as error:  # the barrier around each connection
                connection.crash(error)
        if self._resumed is None:
            self.resumed_at = trio.current_time()
        resumed.set()

    async def run(self) -> None:
        """Feed connections until cancelled; closes the epoll then."""
        try:
            while True:
                if self._resumed is not None:
                    await self._resumed.wait()
                    continue
                events, self._left = self._left or self._epoll.poll(0, SOCKETS_PER_TURN), []
                if not events:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    continue
                self._turn(events)
                # hot: gathering reads under load; bench/ingest.py
                behind = self._left or len(events) == SOCKETS_PER_TURN
                if len(events) >= BUSY_SOCKETS and not behind:
                    await trio.sleep(GATHER_S)
                else:
                    await trio.lowlevel.checkpoint()
        finally:
            self._connections.clear()  # their tasks may end after this one, and call `remove`
            self._epoll.close()

    def _turn(self, events: list[tuple[int, int]]) -> None:
        self.now = trio.current_time()
        self.turns += 1
        connections = self._connections
        began = perf_counter()
        until = began + TURN_S
        done = 0
        for fd, event in events:
            done += 1
            connection = connections.get(fd)
            if connection is None:
                continue  # ended earlier in this turn
            try:
                if event & select.EPOLLOUT:
                    connection.flush()
                if event & ~select.EPOLLOUT:
                    connection.feed()
            except Exception as error:  # the barrier around each connection
                connection.crash(error)
            if self._resumed is not None:
                return  # paused: level-triggered, so the rest is reported again
            if perf_counter() > until:
                self._left = events[done:]
                break
        if self.timing is not None:
            self.timing(perf_counter() - began, done)
