"""What a connection promises its handler, whoever that is: the router's session and the echo server's alike."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from gateway.core import catalogue
from gateway.core.principal import Principal
from gateway.router.inspection import Inspection
from gateway.router.session import Session, SessionContext
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.rawclient import frame
from gateway.ws.connection import Connection
from gateway.ws.handler import ENDED, Handler
from gateway.ws.readiness import Readiness
from tests.echo import LIMITS, Echo
from tests.router.stand_ins import PROTECTION, AnyToken, nobody_trips, user_of
from tests.router.test_session import ScriptedDelivery

MESSAGES = ("opened", "received", "tick", "closing", "crashed", "ended")


class Nowhere:
    def leave(self, session: Session, outcome: str) -> None:
        """Nobody counts."""

    def renewed(self, session: Session) -> None:
        """Nobody is told."""


def session(readiness: Readiness) -> Session:
    quiet = RateLimited(lambda *_, **__: None, trio.current_time)
    context = SessionContext(
        readiness=readiness,
        delivery=ScriptedDelivery(),  # type: ignore[arg-type]  # a stand-in
        inspection=Inspection(Metrics()),
        throttled=lambda *_: None,
        ack_interval_ms=200,
        reconnect_window_ms=1000,
        tokens=AnyToken(),
        trip=nobody_trips,
        protection=PROTECTION,
        notify=lambda one: one.send_notices(),
        log_rejected=quiet,
        log_crash=quiet,
    )
    return Session(
        context,
        Nowhere(),
        connection_id="c-1",
        principal=Principal("alice", "acme", "pro", 4_000_000_000.0),
        user=user_of(),
        account="alice",
        path="/",
        subprotocol="gateway.v1.json",
    )


MAKE: dict[str, Callable[[Readiness], Handler]] = {"session": session, "echo": lambda _: Echo()}


class Watched:
    """A handler that notes what is called, and raises where it is told to."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.calls: list[str] = []
        self.outcome = ""
        self.raises = ""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._handler, name)
        if name not in MESSAGES:
            return method

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "ended":
                self.outcome = arguments[0]
            if name == self.raises:
                raise ZeroDivisionError(name)
            return method(*arguments)

        return called


class World:
    def __init__(self, connection: Connection, watched: Watched, peer: trio.SocketStream) -> None:
        self.connection = connection
        self.watched = watched
        self.peer = peer
        self.done = trio.Event()


@pytest.fixture(params=sorted(MAKE))
def world(request: pytest.FixtureRequest) -> Callable[..., Any]:
    @asynccontextmanager
    async def open_world(raises: str = "") -> AsyncIterator[World]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        readiness = Readiness()
        watched = Watched(MAKE[request.param](readiness))
        watched.raises = raises
        connection = Connection(ours, readiness, LIMITS, watched)
        it = World(connection, watched, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))

        async def live() -> None:
            await connection.run()
            it.done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            nursery.start_soon(live)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                yield it
            nursery.cancel_scope.cancel()
        await it.peer.aclose()

    return open_world


World_ = Callable[..., Any]


async def test_is_opened_first_and_ended_last_and_once(world: World_) -> None:
    async with world() as it:
        await it.peer.send_all(frame(0x2, b"one") + frame(0x2, b"two") + frame(0x8, b"\x03\xe8"))
        await it.peer.send_eof()
        await it.done.wait()
    assert it.watched.calls == ["opened", "received", "closing", "ended"]
    assert it.watched.outcome == "peer_closed"


async def test_hears_of_its_own_close_once_and_of_its_end(world: World_) -> None:
    async with world() as it:
        it.connection.close(catalogue.CLOSE_IDLE)
        it.connection.close(catalogue.CLOSE_RESTART)
        await it.peer.send_all(frame(0x8, b"\x03\xe8"))
        await it.peer.send_eof()
        await it.done.wait()
    assert it.watched.calls == ["opened", "closing", "ended"]
    assert it.watched.outcome == "idle"


async def test_peer_that_is_gone_closes_nothing(world: World_) -> None:
    async with world() as it:
        await it.peer.aclose()
        await it.done.wait()
    assert it.watched.calls == ["opened", "ended"]
    assert it.watched.outcome == "peer_lost"


async def test_broken_protocol_closes_and_ends(world: World_) -> None:
    async with world() as it:
        await it.peer.send_all(frame(0x2, b"x", rsv=7))
        await it.peer.send_eof()
        await it.done.wait()
    assert it.watched.calls == ["opened", "closing", "ended"]
    assert it.watched.outcome == "protocol_error"


async def test_cancellation_ends_it_without_a_close(world: World_) -> None:
    async with world() as it:
        pass
    assert it.watched.calls == ["opened", "ended"]
    assert it.watched.outcome == "cancelled"
    assert it.connection.state == ENDED


@pytest.mark.parametrize("where", ["opened", "received", "tick", "closing"])
async def test_what_raises_ends_its_connection_and_says_so(world: World_, where: str) -> None:
    async with world(raises=where) as it:
        await it.peer.send_all(frame(0x2, b"one"))
        await trio.testing.wait_all_tasks_blocked()
        if where == "tick":
            try:
                it.connection.tick(trio.current_time())
            except ZeroDivisionError as error:  # as the heartbeat's barrier does
                it.connection.crash(error)
        if where == "closing":
            await it.peer.send_all(frame(0x8, b"\x03\xe8"))
        await it.peer.send_eof()
        await it.done.wait()
    assert it.watched.calls[0] == "opened"
    assert it.watched.calls.count("crashed") == 1
    assert it.watched.calls[-1] == "ended"
    assert it.watched.calls.count("ended") == 1
    assert it.watched.outcome == "internal_error"
