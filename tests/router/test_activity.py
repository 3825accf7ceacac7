"""Activity events are given up first: when the queue is half full, when they pile up, when their topic refuses them."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from gateway.core.protection import Ban
from gateway.router.activity import CALM_S, MAX_WAITING, Activity
from gateway.telemetry.metrics import Metrics
from gateway.v1.activity_pb2 import ActivityEvent
from tests.counted import counted
from tests.router.stand_ins import user_of

BAN = Ban("user", ("acme", "alice"), 60.0, 60.0)


class Producer:
    """Keeps what it is given; ``queued`` messages of others are in its queue."""

    def __init__(self) -> None:
        self.full = False
        self.queued = 0
        self.records: list[tuple[bytes, bytes, Any]] = []
        self.cluster = self
        self.missing: tuple[str, ...] | None = ()

    async def unusable(self, topics: list[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        return self.missing, ()

    def __len__(self) -> int:
        return self.queued

    def queue(self, topic: str, value: bytes, key: bytes, report: Any, *_: Any) -> bool:
        self.records.append((key, value, report))
        return True

    def poll(self) -> None:
        """Reports are made by the tests."""


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.producer, self.metrics, self.bytes = Producer(), Metrics(), 0
        self.activity = Activity(
            "user-activity",
            self.producer,  # type: ignore[arg-type]  # a stand-in
            self.producer,  # type: ignore[arg-type]  # and for the other one
            self.metrics,
            self,  # type: ignore[arg-type]  # a log
            gateway="test",
            max_messages=1000,
            max_bytes=1000,
        )
        nursery.start_soon(self.activity.run, lambda: self.bytes)

    def warning(self, event: str, **fields: object) -> None:
        """Nobody reads it."""

    def counts(self) -> tuple[float, float, float]:
        made, delivered, given_up = (
            counted(self.metrics, "gateway_activity_events", outcome=outcome)
            for outcome in ("made", "delivered", "given_up")
        )
        assert made == delivered + given_up + self.activity.waiting
        return made, delivered, given_up


async def test_events_are_given_up_when_the_queue_is_half_full(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    it = World(nursery)
    it.activity.banned(BAN)
    assert it.counts() == (1, 0, 1), "the topic has not been found yet"
    await trio.sleep(2)
    it.producer.queued = 499
    it.activity.banned(BAN)
    assert it.counts() == (2, 0, 1)
    it.producer.queued = 500
    it.activity.banned(BAN)
    assert it.counts() == (3, 0, 2)
    it.producer.queued, it.bytes = 0, 500
    await trio.sleep(2)
    it.activity.banned(BAN)
    assert it.counts() == (4, 0, 3)
    it.bytes, it.producer.full = 0, True
    await trio.sleep(2)
    it.activity.banned(BAN)
    assert it.counts() == (5, 0, 4)
    it.producer.full = False
    it.producer.records[0][2](None, None)
    assert it.counts() == (5, 1, 4)
    assert it.producer.records[0][0] == b"acme"


async def test_no_more_than_a_thousand_wait_and_a_refused_one_makes_it_look_for_the_topic_again(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    it = World(nursery)
    it.activity._max_messages = 10_000
    await trio.sleep(2)
    for _ in range(MAX_WAITING + 5):
        it.activity.banned(BAN)
    assert it.counts() == (MAX_WAITING + 5, 0, 5)
    it.producer.records[0][2]("no such topic", None)
    it.producer.missing = ("user-activity",)
    it.activity.banned(BAN)
    assert it.counts() == (MAX_WAITING + 6, 0, 7)
    it.producer.missing = ()
    await trio.sleep(60)
    it.activity.banned(BAN)
    assert it.counts() == (MAX_WAITING + 7, 0, 7)


async def test_throttle_has_a_beginning_and_an_end(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    it, user = World(nursery), user_of()
    await trio.sleep(2)
    for _ in range(10):
        it.activity.throttled(user, 3, "rate_limited")
        await trio.sleep(1)
    await trio.sleep(CALM_S + 2)
    it.activity.throttled(user, 1, "rate_limited")
    events = [ActivityEvent.FromString(value) for _, value, _ in it.producer.records]
    assert [event.activity for event in events] == [5, 6, 5]
    assert events[1].messages == 30
