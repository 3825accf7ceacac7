"""A session on a real socket pair with a scripted Kafka side: order under a full queue, the barrier, the close."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.lowlevel

from gateway.core import catalogue, notices
from gateway.core.principal import Principal
from gateway.core.protection import Protection
from gateway.core.routes import Routes
from gateway.core.tally import Tally
from gateway.core.tenants import User
from gateway.router.delivery import Room
from gateway.router.inspection import Inspection
from gateway.router.lanes import Lane
from gateway.router.session import Session, SessionContext
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.rawclient import frame
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.ws.connection import Connection
from gateway.ws.handler import ConnectionLimits
from gateway.ws.outbox import Outbox
from gateway.ws.readiness import Readiness
from tests.router.stand_ins import AnyToken, user_of

LIMITS = ConnectionLimits(
    max_message_bytes=65_536,
    max_controls_per_s=20,
    max_unsent_bytes=65_536,
    unsent_timeout_s=8.0,
    ping_interval_s=20.0,
    idle_timeout_s=40.0,
    close_timeout_s=0.5,
)


class ScriptedDelivery:
    """Takes ``room`` messages, then has none; raises ``bug`` when there is one."""

    edition = 0
    routes = Routes({"tick_data": "tick-data"}, "failed-messages")

    def __init__(self) -> None:
        self.room = 1_000_000
        self.bug: Exception | None = None
        self.parked = False
        self.sent: list[bytes] = []
        self.topics: list[str] = []
        self.dead: list[tuple[bytes, str]] = []
        self.took = trio.Event()

    def produce(
        self, topic: str, value: bytes, key: bytes, partition: int, report: Callable[[Any, Any], None], /
    ) -> None:
        if self.bug is not None:
            raise self.bug
        if not self.room or self.parked:
            raise BufferError
        self.room -= 1
        self.sent.append(value)
        self.topics.append(topic)
        self.took.set()

    def open_lane(self, sender: Any, topic: str, message_type: str, *, acked: bool) -> Lane:
        return Lane(self, sender, topic, Tally(message_type), acked=acked, parked=False)

    def look_again(self, lane: Lane) -> None:
        """Nothing is parked."""

    def sample(self, latency_s: float | None) -> None:
        """Never called: nothing is really sent."""

    def report(self, lane: Lane, error: Any, reported: Any) -> None:
        """Never called: nothing is really sent."""

    def send(self, lane: Lane, message_type: str, raw: bytes, stamp: bytes, index: int) -> Room:
        try:
            self.produce(lane.topic, raw + stamp, b"", -1, lane)
        except BufferError:
            if self.parked:
                lane.sender.wait_alone()
                return Room.ALONE
            return Room.NONE
        return Room.TAKEN

    def dead_letter(self, sender: Any, raw: bytes, reason: str, index: int) -> Room:
        if not self.room:
            return Room.NONE
        self.room -= 1
        self.dead.append((raw, reason))
        self.took.set()
        return Room.TAKEN


class World:
    """A session, its connection, its peer's socket, and what happened."""

    def __init__(
        self, connection: Connection, peer: trio.SocketStream, delivery: ScriptedDelivery, readiness: Readiness
    ) -> None:
        self.connection = connection
        self.session: Session
        self.peer = peer
        self.egress = delivery
        self.readiness = readiness
        self.crashes: list[Exception] = []
        self.lines: list[dict[str, Any]] = []
        self.outcomes: list[str] = []
        self.trips: list[User] = []
        self.done = trio.Event()

    def leave(self, session: Session, outcome: str) -> None:
        self.outcomes.append(outcome)

    def renewed(self, session: Session) -> None:
        """Nobody is told."""


@asynccontextmanager
async def world(subprotocol: str | None = None) -> AsyncIterator[World]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readiness = Readiness()
    delivery = ScriptedDelivery()
    made: list[World] = []
    context = SessionContext(
        readiness=readiness,
        delivery=delivery,  # type: ignore[arg-type]  # a stand-in
        inspection=Inspection(Metrics()),
        throttled=lambda *_: None,
        ack_interval_ms=200,
        reconnect_window_ms=1000,
        notify=lambda session: session.send_notices(),
        tokens=AnyToken(),
        trip=lambda user: made[0].trips.append(user),
        protection=Protection(),
        log_rejected=RateLimited(lambda event, **fields: made[0].lines.append(fields), trio.current_time),
        log_crash=RateLimited(lambda event, **fields: made[0].crashes.append(fields["exc_info"]), trio.current_time),
    )

    class Home:
        def leave(self, session: Session, outcome: str) -> None:
            made[0].leave(session, outcome)

        def renewed(self, session: Session) -> None:
            """Nobody is told."""

    session = Session(
        context,
        Home(),
        connection_id="c-1",
        principal=Principal("alice", "acme", "pro", 4_000_000_000.0),
        user=user_of(),
        account="alice",
        path="/ws/mt5",
        subprotocol=subprotocol,
    )
    connection = Connection(ours, readiness, LIMITS, session)
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    made.append(World(connection, peer, delivery, readiness))
    made[0].session = session

    async def live() -> None:
        await connection.run()
        made[0].done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        nursery.start_soon(live)
        with trio.fail_after(10):  # the test's body runs in it
            yield made[0]
        nursery.cancel_scope.cancel()
    await made[0].peer.aclose()


def tick(number: int) -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id="alice", company_id="acme", payload=str(number).encode()
    ).SerializeToString()


async def test_many_messages_of_one_read_keep_their_order() -> None:
    async with world() as it:
        await it.peer.send_all(b"".join(frame(0x2, tick(number)) for number in range(100)))
        while len(it.egress.sent) < 100:
            await trio.lowlevel.checkpoint()
        assert it.egress.sent == [tick(number) for number in range(100)]
        assert it.session.received_messages == 100


async def test_full_queue_stops_reading_and_loses_and_reorders_nothing() -> None:
    async with world() as it:
        it.egress.room = 10
        await it.peer.send_all(b"".join(frame(0x2, tick(number)) for number in range(50)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert it.readiness.paused
        assert len(it.egress.sent) == 10
        await it.peer.send_all(frame(0x2, tick(50)))
        it.egress.room = 2
        it.readiness.resume()
        assert it.readiness.paused, "still more than there is room for"
        assert len(it.egress.sent) == 12
        it.egress.room = 1000
        it.readiness.resume()
        while len(it.egress.sent) < 51:
            await trio.lowlevel.checkpoint()
        assert it.egress.sent == [tick(number) for number in range(51)]


async def test_dead_letter_without_room_waits_its_turn_too() -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x2, b"\xff") + frame(0x2, tick(1)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (len(it.egress.sent), it.egress.dead) == (1, [])
        it.egress.room = 10
        it.readiness.resume()
        assert it.egress.dead == [(b"\xff", catalogue.REASON_NOT_AN_ENVELOPE)]
        assert it.egress.sent == [tick(0), tick(1)]


async def test_connection_that_ends_while_stalled_still_hands_everything_over() -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x2, tick(1)) + frame(0x8, b"\x03\xe8"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await it.peer.send_eof()
        it.egress.room = 10
        it.readiness.resume()
        await it.done.wait()
        assert it.egress.sent == [tick(0), tick(1)]
        assert it.connection.outcome == "peer_closed"


async def test_connection_that_is_closed_while_stalled_still_hands_over_what_was_read() -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(b"".join(frame(0x2, tick(number)) for number in range(5)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        it.connection.close(catalogue.CLOSE_TOKEN_EXPIRED)
        it.egress.room = 10
        it.readiness.resume()
        await it.done.wait()
        assert it.egress.sent == [tick(number) for number in range(5)]


async def test_connection_that_is_cut_off_while_stalled_keeps_what_it_could_not_hand_over() -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(b"".join(frame(0x2, tick(number)) for number in range(5)))
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert it.egress.sent == [tick(0)]
    assert (it.readiness.stalled, it.readiness.backlog) == (1, 4)
    it.egress.room = 10
    it.readiness.resume()
    assert (it.readiness.stalled, it.readiness.backlog) == (0, 0)
    assert it.egress.sent == [tick(number) for number in range(5)]


async def test_bytes_that_the_peer_takes_during_a_pause_do_not_make_it_a_stalled_peer() -> None:
    async with world() as it:
        await trio.testing.wait_all_tasks_blocked()
        it.readiness.pause()
        it.connection._outbox = Outbox(trio.current_time() - 60)
        it.connection._outbox.put(b"waiting")
        it.readiness.want_write(it.connection, True)
        assert await it.peer.receive_some() == b"waiting"
        it.connection.tick(trio.current_time())
        assert it.connection.state == 0


async def test_pings_behind_data_are_answered_while_nothing_is_handed_over() -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x2, tick(1)) + frame(0x2, tick(2)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert it.readiness.paused
        await it.peer.send_all(frame(0x2, tick(3)) + frame(0x9, b"there?") + frame(0x2, tick(4)))
        assert await it.peer.receive_some() == b"\x8a\x06there?"
        assert len(it.egress.sent) == 1
        it.egress.room = 10
        it.readiness.resume()
        assert it.egress.sent == [tick(number) for number in range(5)]


@pytest.mark.parametrize("parked", [False, True])
async def test_ping_in_the_same_read_as_what_finds_no_room_is_answered(parked: bool) -> None:
    async with world() as it:
        it.egress.room, it.egress.parked = 3, parked
        ticks = b"".join(frame(0x2, tick(number)) for number in range(5))
        await it.peer.send_all(ticks + frame(0x9, b"there?") + frame(0x2, tick(5)))
        assert await it.peer.receive_some() == b"\x8a\x06there?"
        assert it.session.backlog == (6 if parked else 3)
        it.egress.room, it.egress.parked = 10, False
        (it.session.go_on if parked else it.readiness.resume)()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert it.egress.sent == [tick(number) for number in range(6)]


@pytest.mark.parametrize("apart", [False, True])
async def test_close_behind_what_waits_is_answered_and_what_waits_is_handed_over_without_the_connection(
    apart: bool,
) -> None:
    async with world() as it:
        it.egress.room = 1
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x2, tick(1)))
        if apart:
            await trio.testing.wait_all_tasks_blocked(0.05)
        await it.peer.send_all(frame(0x2, tick(2)) + frame(0x8, b"\x03\xe8"))
        assert await it.peer.receive_some() == b"\x88\x02\x03\xe8"
        await it.peer.send_eof()
        await it.done.wait()
        assert (it.readiness.stalled, it.readiness.backlog, it.connection.outcome) == (1, 2, "peer_closed")
        it.egress.room = 10
        it.readiness.resume()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert it.egress.sent == [tick(0), tick(1), tick(2)]
        assert (it.readiness.stalled, it.readiness.held_bytes) == (0, 0)


async def test_connection_that_only_pings_is_read_again_after_others_held_all_there_is_to_hold() -> None:
    async with world() as it:
        await trio.testing.wait_all_tasks_blocked()
        it.readiness.pause()
        it.readiness.held_bytes = 1 << 40
        await it.peer.send_all(frame(0x9, b"1"))
        assert await it.peer.receive_some() == b"\x8a\x011"
        it.readiness.held_bytes = 0
        it.readiness.resume()
        await it.peer.send_all(frame(0x9, b"2"))
        assert await it.peer.receive_some() == b"\x8a\x012"


async def test_connection_that_waited_alone_goes_on_by_itself() -> None:
    """Nobody else has to wake the loop, and what came meanwhile comes behind."""
    async with world("gateway.v1.json") as it:
        await it.peer.receive_some()
        it.egress.parked = True
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x2, tick(1)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        it.session.tell_degraded(False)
        await it.peer.send_all(frame(0x2, tick(2)) + frame(0x9, b""))
        await trio.testing.wait_all_tasks_blocked(0.05)
        told = await it.peer.receive_some()
        assert b"degraded" in told
        assert b"recovered" not in told, "what others may do now it may not"
        assert not it.readiness.paused
        assert (it.readiness.stalled, it.session.backlog) == (0, 3)
        it.egress.parked = False
        it.session.go_on()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert it.egress.sent == [tick(0), tick(1), tick(2)]


async def test_connection_that_ends_while_it_waits_alone_with_nothing_leaves_at_once() -> None:
    async with world() as it:
        await trio.testing.wait_all_tasks_blocked()
        it.session.wait_alone()
        await it.peer.send_eof()
        await it.done.wait()


async def test_what_is_held_during_a_pause_is_bounded_and_then_all_of_it_is_handed_over() -> None:
    async with world() as it:
        it.readiness.pause()
        message = MessageEnvelope(
            message_type="tick_data", user_id="alice", company_id="acme", payload=bytes(4000)
        ).SerializeToString()
        accepted = 0

        async def press() -> None:
            nonlocal accepted
            while True:
                await it.peer.send_all(frame(0x2, message))
                accepted += 1

        it.readiness._max_held_bytes = 200_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(press)
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert 200_000 <= it.readiness.held_bytes < 250_000
            assert it.readiness.leaves(it.connection)
            assert it.egress.sent == []
            it.readiness.resume()
            sent = accepted
            while len(it.egress.sent) < sent:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        while it.readiness.stalled:
            await trio.lowlevel.checkpoint()
        assert it.readiness.held_bytes == 0
        assert not it.readiness.leaves(it.connection)


async def test_messages_behind_a_ping_that_cannot_be_answered_are_still_taken() -> None:
    async with world() as it:
        await trio.testing.wait_all_tasks_blocked()
        with suppress(BlockingIOError):
            while True:
                it.connection.sock.send(bytes(65_536))
        it.connection._outbox = Outbox(trio.current_time())
        it.connection._outbox.put(bytes(LIMITS.max_unsent_bytes))  # a peer that takes nothing: the pong ends it
        await it.peer.send_all(frame(0x2, tick(0)) + frame(0x9) + frame(0x2, tick(1)))
        await it.done.wait()
        assert it.egress.sent == [tick(0), tick(1)]


async def test_messages_behind_a_control_flood_are_not_processed() -> None:
    async with world() as it:
        await it.peer.send_all(frame(0x2, tick(0)))
        for _ in range(10):  # ten reads, each with a second's worth: what one read brings may have gathered
            await it.peer.send_all(frame(0x9) * 25)
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert it.connection.state == 0
        await it.peer.send_all(frame(0x9) * 21 + frame(0x2, tick(1)))
        await it.peer.send_eof()
        await it.done.wait()
        assert it.egress.sent == [tick(0)]
        assert it.connection.outcome == "control_flood"
        assert it.lines[0]["code"] == 1008


async def test_bug_in_handling_a_message_closes_that_connection_with_1011() -> None:
    async with world() as it:
        it.egress.bug = ZeroDivisionError("a bug")
        await it.peer.send_all(frame(0x2, tick(0)))
        answer = await it.peer.receive_some()
        assert answer[2:4] == (1011).to_bytes(2, "big")
        assert it.crashes == [it.egress.bug]
        await it.peer.send_eof()
        await it.done.wait()
        assert it.connection.outcome == "internal_error"


async def test_drain_still_takes_what_was_sent_before_the_peer_answers() -> None:
    async with world(notices.JSON) as it:
        welcome = await it.peer.receive_some()
        assert json.loads(welcome[4:])["type"] == "welcome"
        it.connection.close(catalogue.CLOSE_RESTART, take_rest=True)
        said = await it.peer.receive_some()
        notice = json.loads(said[2 : 2 + said[1]])
        assert (notice["type"], notice["code"]) == ("closing", 1012)
        assert 0 <= notice["reconnect_after_ms"] <= 1000
        assert said[2 + said[1] + 2 :][:2] == (1012).to_bytes(2, "big")
        await it.peer.send_all(frame(0x2, tick(7)) + frame(0x8, b"\x03\xf4"))
        await it.peer.send_eof()
        await it.done.wait()
        assert it.egress.sent == [tick(7)]
        assert it.connection.outcome == "restart"


async def test_messages_after_other_closes_are_not_taken() -> None:
    async with world() as it:
        it.connection.close(catalogue.CLOSE_TOKEN_EXPIRED)
        await it.peer.send_all(frame(0x2, tick(7)) + frame(0x8, b"\x03\xe8"))
        await it.peer.send_eof()
        await it.done.wait()
        assert it.egress.sent == []


async def test_peer_that_never_answers_a_close_is_given_up_in_time() -> None:
    async with world() as it:
        it.connection.close(catalogue.CLOSE_IDLE)
        with trio.fail_after(3):
            await it.done.wait()
        assert it.connection.outcome == "idle"


async def test_cancelled_session_closes_its_socket() -> None:
    async with world() as it:
        pass
    assert it.connection.sock.fileno() == -1
    assert it.connection.outcome == "cancelled"


async def test_new_routes_are_used_for_the_next_message() -> None:
    async with world() as it:
        await it.peer.send_all(frame(0x2, tick(0)))
        await it.egress.took.wait()
        it.egress.routes = Routes({"tick_data": "elsewhere"}, "failed-messages")  # a reload
        it.egress.edition += 1
        it.egress.took = trio.Event()
        await it.peer.send_all(frame(0x2, tick(1)))
        await it.egress.took.wait()
        assert it.egress.sent == [tick(0), tick(1)]
        assert it.egress.topics == ["tick-data", "elsewhere"]


async def test_message_that_begins_like_the_last_one_is_still_judged_as_a_whole() -> None:
    async with world() as it:
        foreign = tick(2) + MessageEnvelope(user_id="mallory").SerializeToString()
        broken = tick(3)[:-1]
        for raw in (tick(0), tick(1), foreign, broken, tick(4)):
            it.egress.took = trio.Event()
            await it.peer.send_all(frame(0x2, raw))
            await it.egress.took.wait()
        assert it.egress.sent == [tick(0), tick(1), tick(4)]
        assert it.egress.dead == [
            (foreign, catalogue.REASON_FOREIGN_USER),
            (broken, catalogue.REASON_NOT_AN_ENVELOPE),
        ]


async def test_message_as_long_as_the_last_one_is_still_judged_as_a_whole() -> None:
    async with world() as it:
        good = MessageEnvelope(
            message_type="tick_data", user_id="alice", company_id="acme", payload=bytes(70), timestamp=1_700_000_000_000
        ).SerializeToString()
        foreign = good[:-7] + b"\x28\x01" + MessageEnvelope(user_id="bob").SerializeToString()
        broken = good[:-1] + b"\x80"
        assert len(foreign) == len(broken) == len(good)
        longer = MessageEnvelope.FromString(good)
        longer.payload = bytes(300)
        sent = [good, good, foreign, good, broken, good, longer.SerializeToString(), good[:-7], good]
        for raw in sent:
            it.egress.took = trio.Event()
            await it.peer.send_all(frame(0x2, raw))
            await it.egress.took.wait()
        assert it.egress.sent == [raw for raw in sent if raw not in (foreign, broken)]
        assert it.egress.dead == [
            (foreign, catalogue.REASON_FOREIGN_USER),
            (broken, catalogue.REASON_NOT_AN_ENVELOPE),
        ]


async def test_session_that_is_closed_before_it_is_open_closes_when_it_is() -> None:
    """A drain may come while the 101 is still being written."""
    async with world(notices.JSON) as it:
        await it.peer.receive_some()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readiness = Readiness()
    session = Session(
        it.session._context,
        it,
        connection_id="c-2",
        principal=it.session.principal,
        user=it.session.user,
        account="alice",
        path="/",
        subprotocol=None,
    )
    session.close_for_restart()
    connection = Connection(ours, readiness, LIMITS, session)
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        nursery.start_soon(connection.run)
        with trio.fail_after(5):
            assert (await peer.receive_some())[2:4] == (1012).to_bytes(2, "big")
        nursery.cancel_scope.cancel()
    await peer.aclose()
