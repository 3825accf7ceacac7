"""A connection's hard corners: closing under load, handlers that raise while it closes, a system that is exhausted."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from gateway.core import catalogue
from gateway.core.catalogue import Close
from gateway.testing.rawclient import frame
from gateway.ws import frames
from gateway.ws.connection import Connection
from gateway.ws.frames import Payload
from gateway.ws.handler import ConnectionLimits
from gateway.ws.outbox import Full
from gateway.ws.readiness import Readiness
from tests.echo import LIMITS, Echo


class Scripted(Echo):
    """Notes what it is told; raises and closes where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Payload] = []
        self.raises: set[str] = set()
        self.closes: Close | None = None
        self.closings = 0
        self.outcomes: list[str] = []

    def received(self, messages: Sequence[Payload]) -> None:
        self.taken += messages
        if self.closes is not None and self.connection is not None:
            self.connection.close(self.closes)

    def closing(self, close: Close | None, detail: str) -> None:
        self.closings += 1
        if "closing" in self.raises:
            raise ZeroDivisionError

    def crashed(self, error: Exception) -> None:
        if "crashed" in self.raises:
            raise ZeroDivisionError

    def ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)
        super().ended(outcome)


class World:
    def __init__(self, connection: Connection, handler: Scripted, peer: socket.socket, readiness: Readiness) -> None:
        self.connection = connection
        self.handler = handler
        self.peer = peer
        self.readiness = readiness
        self.done = trio.Event()

    def received(self) -> bytes:
        """Everything the peer has got, to its end of file."""
        self.peer.setblocking(True)
        return b"".join(iter(lambda: self.peer.recv(65_536), b""))


@asynccontextmanager
async def world(limits: ConnectionLimits = LIMITS) -> AsyncIterator[World]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    readiness, handler = Readiness(), Scripted()
    it = World(Connection(ours, readiness, limits, handler), handler, theirs, readiness)

    async def live() -> None:
        await it.connection.run()
        it.done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        nursery.start_soon(live)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            yield it
        nursery.cancel_scope.cancel()
    theirs.close()


async def test_messages_behind_a_close_of_the_handler_are_not_taken() -> None:
    async with world() as it:
        it.handler.closes = catalogue.CLOSE_CONTROL_FLOOD
        it.peer.send(frame(0x2, b"1") + frame(0x9, b"") + frame(0x2, b"2") + frame(0x9, b"") + frame(0x2, b"3"))
        it.peer.shutdown(socket.SHUT_WR)
        await it.done.wait()
        assert it.handler.taken == [b"1"]


@pytest.mark.parametrize("when_full", list(Full))
async def test_close_finds_room_in_a_full_outbox(when_full: Full) -> None:
    async with world(replace(LIMITS, when_full=when_full, max_unsent_bytes=65_536)) as it:
        piece = frames.encode(frames.BINARY, bytes(60_000))
        assert it.connection.send(piece)
        await trio.testing.wait_all_tasks_blocked()
        assert it.connection._outbox is not None
        while it.connection._outbox.size_bytes < 65_500:
            assert it.connection.send(frames.encode(frames.BINARY, bytes(20)))
        it.connection.close(catalogue.CLOSE_TOKEN_EXPIRED)
        it.peer.shutdown(socket.SHUT_WR)
        got = await trio.to_thread.run_sync(it.received)
        assert got.endswith(frames.encode_close(4401, "token expired"))


@pytest.mark.parametrize("raises", [{"closing"}, {"closing", "crashed"}])
async def test_handler_that_raises_while_it_closes_is_not_asked_again_and_the_peer_gets_1011(raises: set[str]) -> None:
    async with world() as it:
        it.handler.raises = raises
        try:
            it.connection.close(catalogue.CLOSE_IDLE)
        except ZeroDivisionError as error:  # as the heartbeat's barrier does
            it.connection.crash(error)
        it.peer.shutdown(socket.SHUT_WR)
        await it.done.wait()
        assert it.handler.closings == 1
        assert it.received() == frames.encode_close(1011, "internal error")
        assert it.handler.outcomes == ["internal_error"]


class Exhausted:
    """An epoll that takes no further descriptor."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def register(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches")


async def test_connection_that_cannot_be_watched_still_ends_for_its_handler() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readiness, handler = Readiness(), Scripted()
    readiness._epoll = Exhausted(readiness._epoll)  # type: ignore[assignment]
    with pytest.raises(OSError, match="max_user_watches"):
        await Connection(ours, readiness, LIMITS, handler).run()
    assert len(handler.outcomes) == 1
    assert theirs.recv(10) == b"", "its socket is closed"
    readiness.close()
    theirs.close()


async def test_peer_that_does_not_read_even_a_ping_is_given_the_same_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = replace(LIMITS, unsent_timeout_s=8.0, ping_interval_s=20.0, idle_timeout_s=1000.0)
    async with world(limits) as it:
        start = trio.current_time()
        it.connection.tick(start + 20)  # sends a ping: from now on something waits
        assert it.connection.due <= start + 20 + 8
