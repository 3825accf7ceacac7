"""What a connection has to say: in one send a turn, bounded, and what happens when the bound is reached."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import trio
import trio.testing

from gateway.core.catalogue import CLOSE_RESTART
from gateway.ws import frames
from gateway.ws.connection import Connection
from gateway.ws.handler import ConnectionLimits, Link
from gateway.ws.outbox import Full, Outbox
from gateway.ws.readiness import Readiness
from tests.echo import LIMITS, Echo

SMALL = replace(LIMITS, max_unsent_bytes=1000)


class Counted:
    """A socket that counts how often it is written to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.sends = 0

    def send(self, data: bytes) -> int:
        self.sends += 1
        return self._sock.send(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


@asynccontextmanager
async def connected(limits: ConnectionLimits = LIMITS) -> AsyncIterator[tuple[Connection, Counted, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    readiness = Readiness()
    counted = Counted(ours)
    connection = Connection(counted, readiness, limits, Echo())  # type: ignore[arg-type]  # a socket that counts
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        nursery.start_soon(connection.run)
        await trio.testing.wait_all_tasks_blocked()
        yield connection, counted, theirs
        nursery.cancel_scope.cancel()
    theirs.close()


def fill(sock: Counted) -> None:
    """The peer takes nothing more."""
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))


async def test_frames_of_one_turn_go_out_in_one_send_and_in_order() -> None:
    async with connected() as (connection, sock, peer):
        for number in range(100):
            assert connection.send(frames.encode(frames.BINARY, b"%02d" % number))
        await trio.testing.wait_all_tasks_blocked()
        assert sock.sends == 1
        assert peer.recv(10_000) == b"".join(b"\x82\x02%02d" % number for number in range(100))


async def test_answers_to_one_read_go_out_in_one_send() -> None:
    async with connected() as (_, sock, peer):
        peer.send(b"".join(b"\x82\x81\0\0\0\0x" for _ in range(50)))
        await trio.testing.wait_all_tasks_blocked()
        assert sock.sends == 1
        assert peer.recv(10_000) == b"\x82\x01x" * 50


async def test_one_frame_encoded_once_serves_many_connections() -> None:
    frame = frames.encode(frames.BINARY, b"published")
    async with connected() as (one, _, first), connected() as (two, _, second):
        assert one.send(frame)
        assert two.send(frame)
        await trio.testing.wait_all_tasks_blocked()
        assert first.recv(100) == second.recv(100) == frame


async def test_peer_that_takes_nothing_loses_its_connection_beyond_the_bound() -> None:
    async with connected(SMALL) as (connection, sock, _):
        fill(sock)
        assert connection.send(bytes(600))
        assert connection.send(bytes(400))
        assert not connection.send(bytes(1))
        assert connection.outcome == "stalled_peer"


async def test_frame_beyond_the_bound_is_refused_where_that_is_the_policy() -> None:
    async with connected(replace(SMALL, when_full=Full.REFUSE)) as (connection, sock, peer):
        fill(sock)
        assert connection.send(b"\x82\x01a" * 200)
        assert not connection.send(bytes(401))
        assert connection.send(b"\x82\x01b" * 100), "what still fits is taken"
        await trio.testing.wait_all_tasks_blocked()
        received = b""
        while b"b" not in received:
            with suppress(BlockingIOError):
                received += peer.recv(1 << 20)
            await trio.testing.wait_all_tasks_blocked()
        assert received.endswith(b"\x82\x01a" * 200 + b"\x82\x01b" * 100)
        assert connection.send(frames.encode(frames.BINARY, b"goes on"))


async def test_burst_of_one_turn_beyond_the_bound_costs_nobody_who_takes_it() -> None:
    async with connected(SMALL) as (connection, _, peer):
        for _ in range(50):
            assert connection.send(bytes(100))
        await trio.testing.wait_all_tasks_blocked()
        assert len(peer.recv(10_000)) == 5000


async def test_nothing_is_sent_behind_a_close_frame() -> None:
    class Talker(Echo):
        def opened(self, connection: Link) -> None:
            super().opened(connection)
            connection.close(CLOSE_RESTART)
            assert not connection.send(b"late")

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readiness = Readiness()
    connection = Connection(ours, readiness, LIMITS, Talker())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        nursery.start_soon(connection.run)
        with trio.fail_after(5):
            assert (await trio.to_thread.run_sync(theirs.recv, 100))[:2] == b"\x88\x11"
        nursery.cancel_scope.cancel()
    theirs.close()


def test_partly_sent_frames_keep_their_place() -> None:
    class Slow:
        def __init__(self) -> None:
            self.took = b""

        def send(self, data: bytes) -> int:
            taken = data[:3]
            self.took += taken
            return len(taken)

    outbox, slow = Outbox(0.0), Slow()
    for frame in (b"abcd", b"ef", b"g"):
        outbox.put(frame)
    while outbox:
        outbox.send(slow, 1.0)  # type: ignore[arg-type]  # all that is asked of a socket
    assert (slow.took, outbox.size_bytes) == (b"abcdefg", 0)
    assert not math.isnan(outbox.waiting_since)
