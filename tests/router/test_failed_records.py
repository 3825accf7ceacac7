"""A record that fails, followed to its end, without a Kafka: what it becomes, who is told, what the books say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from confluent_kafka import KafkaError

from gateway.core import catalogue
from gateway.core.books import Books
from gateway.core.routes import Routes
from gateway.router.delivery import Delivery, Room
from gateway.router.lanes import Lane
from gateway.router.spool.segments import Spool, list_segments
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.producer import NOTHING, FakeProducer, FakeRecord
from tests.counted import counted
from tests.router.stand_ins import Recorder, Sender

DEAD = "failed-messages"
REFUSED, GAP, PURGED = KafkaError.INVALID_RECORD, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, KafkaError._PURGE_QUEUE


class World:
    def __init__(self, spool: Spool | None, room: int) -> None:
        self.holds = Recorder()
        self.producer = FakeProducer(room=room, holds=self.holds)
        self.metrics, self.books, self.sender = Metrics(), Books(), Sender()
        producer: Any = self.producer
        self.delivery = Delivery(
            producer,
            Routes({"tick_data": "tick-data", "user_event": "user-events"}, DEAD),
            self.books,
            self.metrics,
            gateway="test/0",
            log_failed=RateLimited(lambda *_, **__: None, trio.current_time),
            spool=spool,
            holds=self.holds,
        )
        self.lanes: dict[str, Lane] = {}
        self.sent = 0

    def send(self, raw: bytes, *, stamp: bytes = b"", message_type: str = "tick_data") -> Room:
        topic = self.delivery.routes.topics[message_type]
        lane = self.lanes.get(topic) or self.delivery.open_lane(self.sender, topic, message_type, acked=True)
        self.lanes[topic] = lane
        room = self.delivery.send(lane, message_type, raw, stamp, self.sent + 1)
        self.sent += room is Room.TAKEN
        return room

    def confirmed(self, topic: str) -> list[bytes]:
        return [record.record_value for record in self.producer.confirmed if record.record_topic == topic]

    def totals(self) -> dict[str, int]:
        totals = self.books.totals()
        assert (totals.imbalance, totals.imbalance_bytes) == (0, 0)
        names = ("received", "delivered", "dead_lettered", "dropped", "spooled", "in_flight")
        return {name: getattr(totals, name) for name in names if getattr(totals, name)}


@asynccontextmanager
async def world(directory: Path | None = None, room: int = 1_000_000) -> AsyncIterator[World]:
    spool = None if directory is None else Spool(directory, 1 << 30)
    it = World(spool, room)
    async with trio.open_nursery() as nursery:
        if it.delivery.spool is not None:
            nursery.start_soon(it.delivery.spool.run)
        with trio.fail_after(20):
            yield it
        nursery.cancel_scope.cancel()
    if spool is not None:
        spool.close()


async def test_refused_record_becomes_a_dead_letter_and_is_settled_when_that_is_confirmed() -> None:
    async with world() as it:
        it.producer.fail(lambda record: REFUSED if record.topic() == "tick-data" else NOTHING)
        it.send(b"one", stamp=b"+stamp")
        it.send(b"two", message_type="user_event")
        it.producer.poll()
        assert (it.sender.settled, it.sender.rejected) == ([2], [(catalogue.REASON_KAFKA_REFUSED, 1)])
        assert it.totals() == {"received": 2, "delivered": 1, "in_flight": 1}
        it.producer.poll()
        assert it.sender.settled == [2, 1]
        assert it.totals() == {"received": 2, "delivered": 1, "dead_lettered": 1}
        assert it.confirmed(DEAD) == [b"one"], "as it was received"
        headers = dict(it.producer.confirmed[-1].headers or ())
        assert (headers["reason"], headers["user_id"], headers["gateway"]) == (b"kafka_refused", b"alice", b"test/0")
        assert counted(it.metrics, "gateway_dead_letters", reason=catalogue.REASON_KAFKA_REFUSED) == 1


async def test_refused_dead_letter_goes_to_the_spool_and_is_settled_when_the_disk_has_it(tmp_path: Path) -> None:
    async with world(tmp_path / "spool") as it:
        it.producer.fail(lambda _: REFUSED)
        it.send(b"one", stamp=b"+stamp")
        it.producer.poll()
        it.producer.poll()
        assert it.sender.settled == []
        while not it.sender.settled:
            await trio.sleep(0.01)
        assert it.totals() == {"received": 1, "spooled": 1}
    (record,) = [record for segment in list_segments(tmp_path / "spool") for record in segment.read()]
    assert (record.topic, record.value, record.reason, record.uncertain) == (DEAD, b"one", "dead_letter_refused", False)
    assert record.headers is not None


async def test_refused_dead_letter_without_a_spool_is_dropped_reported_and_settled() -> None:
    async with world() as it:
        it.producer.fail(lambda _: REFUSED)
        it.delivery.dead_letter(it.sender, b"odd", catalogue.REASON_UNKNOWN_TYPE, 1)
        it.producer.poll()
        assert it.sender.rejected == [
            (catalogue.REASON_UNKNOWN_TYPE, 1),
            (catalogue.GIVEN_UP_DEAD_LETTER_REFUSED, 1),
        ]
        assert it.sender.settled == [1]
        assert it.totals() == {"received": 1, "dropped": 1}
        assert it.delivery.lost == 0, "only a drain loses"


async def test_what_a_gap_hands_back_is_queued_again_in_order_before_anything_new() -> None:
    async with world() as it:
        for number in range(10):
            it.send(b"%d" % number, stamp=b"" if number % 3 else b"!")
        failing = iter([NOTHING, NOTHING, GAP])
        it.producer.fail(lambda _: next(failing, NOTHING))
        it.producer.poll()
        assert it.producer.broken
        assert it.send(b"too early") is Room.NONE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.producer.run)
            while it.totals().get("in_flight"):
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert it.confirmed("tick-data") == [b"%d" % number + (b"" if number % 3 else b"!") for number in range(10)]
        assert it.sender.settled == list(range(1, 11))
        assert it.totals() == {"received": 10, "delivered": 10}


async def test_dead_letter_that_finds_no_room_waits_and_nothing_overtakes_it() -> None:
    async with world(room=2) as it:
        it.producer.fail(lambda record: REFUSED if record.value() == b"bad" and record.topic() != DEAD else NOTHING)
        assert it.send(b"bad") is Room.TAKEN
        assert it.send(b"good") is Room.TAKEN
        assert it.send(b"no room") is Room.NONE
        assert it.producer.full
        while it.totals().get("in_flight"):
            it.producer.poll()
        assert (it.confirmed(DEAD), it.confirmed("tick-data")) == ([b"bad"], [b"good"])
        assert not it.producer.full
        assert it.send(b"no room") is Room.TAKEN


@pytest.mark.parametrize("spooled", [True, False])
async def test_abandoned_messages_are_spooled_in_order_or_dropped_and_lost(tmp_path: Path, spooled: bool) -> None:
    async with world(tmp_path / "spool" if spooled else None) as it:
        for number in range(5):
            it.send(b"%d" % number, stamp=b"!" if number == 2 else b"")
        await it.delivery.abandon()
        assert it.send(b"5") is Room.TAKEN, "what was read goes the same way"
        assert it.delivery.dead_letter(it.sender, b"6", catalogue.REASON_UNKNOWN_TYPE, 7) is Room.TAKEN
        if not spooled:
            assert (it.totals(), it.delivery.lost) == ({"received": 7, "dropped": 7}, 7)
            assert it.sender.settled == [], "never acked"
            return
        writer = it.delivery.spool
        assert writer is not None
        assert await writer.flush(trio.current_time() + 5) == 0
        assert (it.totals(), it.delivery.lost) == ({"received": 7, "spooled": 7}, 0)
        assert it.sender.settled == list(range(1, 8))
    records = [record for segment in list_segments(tmp_path / "spool") for record in segment.read()]
    assert [record.value for record in records] == [b"0", b"1", b"2!", b"3", b"4", b"5", b"6"]
    assert {record.reason for record in records} == {"drain_timeout"}


async def test_disk_that_takes_nothing_lets_kafka_be_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.router.spool import writer

    monkeypatch.setattr(writer, "RETRY_S", 0.01)
    async with world(tmp_path / "spool") as it:
        assert it.delivery.spool is not None
        monkeypatch.setattr(it.delivery.spool._spool, "_max_bytes", 0)
        it.producer.fail(lambda _: REFUSED)
        it.send(b"one")
        faults = set()
        for _ in range(20):
            it.producer.poll()
            await trio.sleep(0.005)
            faults.add(it.delivery.spool.fault.partition("exceed")[2])
        assert " spool.max_bytes" in faults
        assert it.totals() == {"received": 1, "in_flight": 1}
        it.producer.fail(lambda _: NOTHING)
        while not it.sender.settled:
            it.producer.poll()
            await trio.sleep(0.01)
        assert it.totals() == {"received": 1, "dead_lettered": 1}
        assert it.confirmed(DEAD) == [b"one"]
        assert it.sender.rejected == [(catalogue.REASON_KAFKA_REFUSED, 1)], "told once"


async def test_report_on_what_was_taken_back_changes_nothing() -> None:
    async with world() as it:
        it.send(b"one")
        record = FakeRecord("tick-data", b"one", b"alice", None)
        await it.delivery.abandon()
        it.lanes["tick-data"](None, record)
        it.lanes["tick-data"](KafkaError(PURGED), record)
        assert it.totals() == {"received": 1, "dropped": 1}
