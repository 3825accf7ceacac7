"""What a session does with limits: the tail of a read dropped in its order, behind what waits; control messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from gateway.core import catalogue
from gateway.core.admission import AddressRate, Admission
from gateway.core.breaker import BreakerRules
from gateway.core.catalogue import Close
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.protection import Protection
from gateway.core.tenants import Tenants
from gateway.errors import InvalidToken, Refused
from gateway.router.bans import BanOffice
from gateway.router.endpoint import Identity
from gateway.router.inspection import Inspection
from gateway.router.session import Session, SessionContext
from gateway.router.sessions import Sessions
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.ticks_pb2 import BatchTickData, Tick
from gateway.ws.endpoints import Granted
from gateway.ws.handler import CLOSING, ENDED, OPEN, ConnectionLimits
from gateway.ws.readiness import Readiness
from tests.counted import counted
from tests.router.test_session import LIMITS, ScriptedDelivery

JSON = "gateway.v1.json"


class Tokens:
    """Tokens are names of users; those that begin with "bad" are none."""

    leeway_s = 0.0

    def __init__(self) -> None:
        self.revoked = False

    def verify(self, token: str) -> Principal:
        if token.startswith("bad"):
            raise InvalidToken("bad")
        return Principal(token, "acme", "pro", 5e9, issued_at=7.0)

    def is_revoked(self, principal: Principal) -> bool:
        return self.revoked


class Link:
    """A connection that keeps what it is given."""

    limits: ConnectionLimits = LIMITS

    def __init__(self, session: Session) -> None:
        self.state = OPEN
        self.due = 0.0
        self.unsent_bytes = 0
        self.frames: list[bytes] = []
        self.closes: list[Close] = []
        self.is_read = True
        self._session = session

    def tick(self, now: float) -> None:
        self._session.tick(now)

    def send(self, frame: bytes) -> bool:
        self.frames.append(frame)
        return True

    def want_read(self, wanted: bool) -> None:
        self.is_read = wanted

    def close(self, close: Close, *, take_rest: bool = False) -> None:
        if self.state == OPEN:
            self._session.closing(close, "")
            self.closes.append(close)
            self.state = CLOSING

    def crash(self, error: Exception) -> None:
        raise error

    def said(self, kind: str | None = None) -> list[dict[str, Any]]:
        texts = [frame[frame.index(b"{") :] for frame in self.frames]
        return [message for message in map(json.loads, texts) if kind in (None, message["type"])]


class Activity:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def connected(self, session: Session) -> None:
        self.events.append(("connected", session.principal.user_id))

    def disconnected(self, session: Session, outcome: str) -> None:
        self.events.append(("disconnected", session.principal.user_id, outcome))

    def refused(self, identity: Identity, code: str) -> None:
        self.events.append(("refused", identity.principal.user_id, code))

    def banned(self, ban: Any) -> None:
        self.events.append(("banned", *ban.subject))


class Delivery(ScriptedDelivery):
    """Counts what is dropped, where it stands among what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[tuple[int, str, int, int]] = []

    def drop(self, sender: Any, reason: str, count: int, size: int) -> None:
        self.dropped.append((len(self.sent), reason, count, size))


class Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def warning(self, event: str, **fields: object) -> None:
        self.events.append(event)


class World:
    def __init__(self, limits: TierLimits, *, inspect: bool = False) -> None:
        quiet = RateLimited(lambda *_, **__: None, trio.current_time)
        self.delivery, self.readiness, self.tokens, self.activity = Delivery(), Readiness(), Tokens(), Activity()
        self.readiness.now = trio.current_time()
        self.metrics, self.log = Metrics(), Log()
        self.tenants = Tenants({"pro": limits})
        self.admission = Admission(10, AddressRate(0, 1), Protection(BreakerRules()))
        self.admission.open()
        self.throttled: list[tuple[str, int, str]] = []
        context = SessionContext(
            readiness=self.readiness,
            delivery=self.delivery,  # type: ignore[arg-type]  # a stand-in
            inspection=Inspection(self.metrics, wanted=inspect),
            throttled=lambda user, count, reason: self.throttled.append((user.user_id, count, reason)),
            ack_interval_ms=200,
            reconnect_window_ms=0,
            tokens=self.tokens,
            trip=lambda user: self.bans.ban_user(user),
            protection=self.admission.protection,
            notify=lambda session: None,
            log_rejected=quiet,
            log_crash=RateLimited(lambda event, **_: self.crashes.append(event), trio.current_time),
        )
        self.crashes: list[str] = []
        self.sessions = Sessions(
            context,
            self.admission,
            self.tenants,
            self.metrics,
            self.activity,  # type: ignore[arg-type]  # a stand-in
        )
        self.bans = BanOffice(
            self.admission.protection,
            self.sessions,
            self.activity,  # type: ignore[arg-type]  # stand-ins
            self.metrics,
            self.log,  # type: ignore[arg-type]  # as above
        )

    async def open(
        self, user: str = "alice", account: str = "", subprotocol: str | None = JSON, tier: str = "pro"
    ) -> tuple[Session, Link]:
        who = Principal(user, "acme", tier, 4e9)
        session = await self.sessions.open(Granted(Identity(who, account or user, "/"), subprotocol))
        link = Link(session)
        session.opened(link)
        return session, link


@pytest.fixture
def world() -> Callable[..., Any]:
    @asynccontextmanager
    async def open_world(inspect: bool = False, **limits: float) -> AsyncIterator[World]:
        it = World(TierLimits(**limits), inspect=inspect)  # type: ignore[arg-type]  # whole where they must be
        yield it
        it.readiness.close()

    return open_world


Open = Callable[..., Any]


def tick(number: int, payload: bytes = b"") -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id="alice", company_id="acme", timestamp=number, payload=payload
    ).SerializeToString()


async def test_tail_of_a_read_is_dropped_settled_and_told_once_a_second(
    world: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with world(messages_per_second=10) as it:
        session, link = await it.open()
        session.received([tick(number) for number in range(25)])
        assert it.delivery.sent == [tick(number) for number in range(20)]
        assert it.delivery.dropped == [(20, "rate_limited", 5, sum(len(tick(number)) for number in range(20, 25)))]
        assert session.received_messages == 25
        session.send_notices()
        session.received([tick(25)])
        await trio.sleep(0.5)
        session.send_notices()
        assert [notice["dropped"] for notice in link.said("throttle")] == [5]
        await trio.sleep(0.6)
        session.send_notices()
        assert [notice["dropped"] for notice in link.said("throttle")] == [5, 1]
        assert it.throttled == [("alice", 5, "rate_limited"), ("alice", 1, "rate_limited")]


async def test_what_is_dropped_stays_behind_what_waits_for_room(world: Open) -> None:
    async with world(messages_per_second=10) as it:
        session, link = await it.open()
        it.delivery.room = 3
        session.received([tick(number) for number in range(25)])
        assert it.readiness.paused
        assert it.delivery.dropped == [], "not before those that came first"
        it.readiness.now += 0.2
        session.received([tick(number) for number in range(25, 30)])
        it.delivery.room = 100
        it.readiness.resume()
        while it.readiness.stalled:
            it.readiness.resume()
        assert it.delivery.sent == [*(tick(number) for number in range(20)), tick(25), tick(26)]
        assert [(at, count) for at, _, count, _ in it.delivery.dropped] == [(20, 5), (22, 3)]
        assert session.received_messages == 30
        assert not link.said("rejected")


async def test_user_that_floods_is_told_closed_and_refused_and_its_other_connections_too(world: Open) -> None:
    async with world(messages_per_second=10) as it:
        (session, link), (_, other) = await it.open(), await it.open(account="2")
        _, bystander = await it.open("bob")
        session.received([tick(number) for number in range(60)])
        assert link.closes == other.closes == [catalogue.CLOSE_BANNED]
        assert [message["type"] for message in link.said()] == ["welcome", "throttle", "closing"]
        assert not bystander.closes
        with pytest.raises(Refused) as refused:
            await it.open()
        assert refused.value.refusal is catalogue.BANNED
        assert it.log.events == ["banned"]
        assert it.activity.events[-2:] == [("banned", "acme", "alice"), ("refused", "alice", "banned")]
        assert counted(it.metrics, "gateway_bans", kind="user") == 1


async def test_places_are_taken_replaced_and_given_back(world: Open) -> None:
    async with world(users=1, connections_per_account=1) as it:
        session, link = await it.open()
        with pytest.raises(Refused):
            await it.open("bob")
        assert it.admission.connections == 1
        newer, _ = await it.open()
        assert link.closes == [catalogue.CLOSE_REPLACED]
        session.ended("replaced")
        newer.ended("peer_closed")
        assert (it.admission.connections, len(it.sessions)) == (0, 0)
        await it.open("bob")


async def test_tier_of_a_newer_token_takes_places_away(world: Open) -> None:
    async with world(users=2) as it:
        it.tenants.use_tiers({"pro": TierLimits(users=2), "free": TierLimits(users=1)})
        _, first = await it.open("alice")
        _, second = await it.open("bob")
        session, _ = await it.open("alice", "2")
        session.renew(Principal("alice", "acme", "free", 4e9, issued_at=9.0))
        assert (first.closes, second.closes) == ([], [catalogue.CLOSE_REPLACED])


async def test_control_messages_are_answered_beside_the_others(world: Open) -> None:
    async with world() as it:
        session, link = await it.open()
        session.received([tick(0), '{"type":"ping","id":1}', tick(1), '{"type":"authenticate","token":"alice","id":2}'])
        session.received(['{"type":"authenticate","token":"bob"}', '{"type":"authenticate","token":"bad"}'])
        answers = [message for message in link.said() if message["type"] != "welcome"]
        assert [(one["type"], one.get("id"), one.get("code")) for one in answers] == [
            ("pong", 1, None),
            ("authenticated", 2, None),
            ("error", None, "other_user"),
            ("error", None, "invalid_token"),
        ]
        assert it.delivery.sent == [tick(0), tick(1)]
        assert session.principal.expires_at == 5e9
        session.received(["nonsense"] * 20)
        assert link.closes == [catalogue.CLOSE_BAD_MESSAGES]
        assert len(link.said("error")) == 12, "nothing is answered behind the close"


async def test_revoked_token_closes_when_somebody_looks(world: Open) -> None:
    async with world() as it:
        _, link = await it.open()
        await it.sessions.look_at_tokens()
        assert not link.closes
        it.tokens.revoked = True
        await it.sessions.look_at_tokens()
        assert link.closes == [catalogue.CLOSE_TOKEN_REVOKED]


async def test_pairs_are_looked_at_once_a_second_and_a_minute_over_the_limit_is_too_long(world: Open) -> None:
    async with world(inspect=True, pairs=2) as it:
        session, link = await it.open()
        ticks = BatchTickData(ticks=[Tick(symbol=name) for name in ("a", "b", "c")]).SerializeToString()
        for second in range(61):
            it.readiness.now += 1
            session.received([tick(second, ticks)])
            session.received([tick(second, ticks)])
            assert bool(link.closes) == (second == 60)
        assert link.closes == [catalogue.CLOSE_BANNED]
        assert counted(it.metrics, "gateway_pairs_over_limit") == 61
        assert link.said("throttle")[0]["scope"] == "pairs"
        assert it.delivery.dropped == []


async def test_crash_of_what_an_ended_session_left_behind_is_said(world: Open) -> None:
    async with world() as it:
        session, link = await it.open()
        it.delivery.room = 0
        session.received([tick(0)])
        link.state = ENDED
        session.ended("peer_lost")
        it.delivery.bug = RuntimeError("a bug")
        it.readiness.resume()
        assert it.crashes == ["session crashed"]


async def test_pause_of_kafka_shuts_nobody_out_for_what_is_judged_late(world: Open) -> None:
    async with world() as it:
        session, link = await it.open()
        it.delivery.room = 0
        session.received([tick(number) if number % 5 else b"\xff" for number in range(200)])
        for _ in range(30):
            it.readiness.now += 5
        it.delivery.room = 1000
        it.readiness.resume()
        while it.readiness.stalled:
            it.readiness.resume()
        assert len(it.delivery.dead) == 40
        assert not link.closes
        assert session.user.totals(it.readiness.now) == (200, 40)


async def test_user_that_is_shut_out_while_it_asks_for_a_place_gets_none(world: Open) -> None:
    async with world() as it:
        user = it.tenants.user(Principal("alice", "acme", "pro", 4e9), 0.0)

        class Slow:
            async def claim(self, *_: object) -> None:
                it.bans.ban_user(user)

            def release(self, *_: object) -> None:
                released.append(True)

        released: list[bool] = []
        it.sessions._registry = Slow()
        with pytest.raises(Refused) as refused:
            await it.open()
        assert refused.value.refusal is catalogue.BANNED
        assert (released, it.admission.connections, len(it.sessions)) == ([True], 0, 0)
