"""From the producer's queue to the books, against real brokers: the embedded mock and Apache Kafka."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from confluent_kafka import KafkaError, KafkaException

from gateway.core import catalogue
from gateway.core.books import Books
from gateway.core.routes import Routes
from gateway.errors import StartupError
from gateway.kafka.producer import PRODUCE_ERRORS, KafkaProducer
from gateway.router.delivery import Delivery, Room
from gateway.router.lanes import Lane
from gateway.router.spool.replay import Replay
from gateway.router.spool.segments import Spool, list_segments
from gateway.telemetry.logging import Log, RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.daemon import Daemon
from gateway.testing.kafka import create_topics
from gateway.testing.records import Records, headers_of
from tests.conftest import Broker
from tests.counted import counted
from tests.router.stand_ins import Recorder, Sender
from tests.router.test_spool import RECORD as SPOOLED


class QueueFull(Exception):
    """A message was not taken: everybody has to wait."""


class Parked(QueueFull):
    """A message was not taken: its sender has to wait."""


def taken(room: Room) -> None:
    """Raise unless a message was taken."""
    if room is not Room.TAKEN:
        raise (Parked if room is Room.ALONE else QueueFull)


class Side:
    """The Kafka side on its own."""

    def __init__(self, bootstrap: str, log: Log, metrics: Metrics, routes: Routes, **properties: Any) -> None:
        self.metrics = metrics
        self.log = log
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.books = Books()
        self.holds = Recorder()
        self.producer = KafkaProducer(bootstrap, properties, metrics, log, self.holds)
        self.delivery = Delivery(
            self.producer,
            routes,
            self.books,
            metrics,
            gateway="test/0",
            log_failed=RateLimited(lambda event, **fields: self.lines.append((event, fields)), trio.current_time),
            holds=self.holds,
        )

    def lane(self, sender: Sender, message_type: str = "tick_data", *, acked: bool = True) -> Lane:
        """The sender's lane to the topic of a type."""
        topic = self.delivery.routes.topics[message_type]
        if topic not in sender.lanes:
            sender.lanes[topic] = self.delivery.open_lane(sender, topic, message_type, acked=acked)
        return sender.lanes[topic]

    def send(
        self,
        raw: bytes,
        stamp: bytes = b"",
        message_type: str = "tick_data",
        index: int = 0,
        sender: Sender | None = None,
    ) -> None:
        """Hand over one message as a session does. Raises QueueFull."""
        sender = sender or Sender()
        lane = self.lane(sender, message_type, acked=index > 0)
        if not stamp and not lane.parked and message_type == lane.tally.message_type:
            try:
                self.delivery.produce(lane.topic, raw, sender.principal.user_id.encode(), -1, lane)
            except PRODUCE_ERRORS:
                pass
            else:
                lane.waiting.append(raw)
                lane.tally.receive(len(raw))
                if lane.indices is not None:
                    lane.indices.append(index)
                return
        taken(self.delivery.send(lane, message_type, raw, stamp, index))

    def dead_letter(self, sender: Sender, raw: bytes, reason: catalogue.Reason, index: int) -> None:
        """Hand over a rejected message. Raises QueueFull."""
        taken(self.delivery.dead_letter(sender, raw, reason, index))


Make = Callable[..., Side]


@pytest.fixture
def make_side() -> Iterator[Make]:
    metrics = Metrics()
    log = Log(metrics, level="error")
    routes = Routes({"tick_data": "tick-data", "user_event": "user-events"}, "failed-messages")

    def make(bootstrap: str, routes: Routes = routes, **properties: Any) -> Side:
        return Side(bootstrap, log, metrics, routes, **properties)

    yield make
    log.close()


async def settle(side: Side) -> None:
    with trio.fail_after(30):
        while side.books.totals().in_flight:
            side.producer.poll()
            await trio.sleep(0.01)


async def test_messages_go_from_in_flight_to_delivered(broker: Broker, make_side: Make) -> None:
    side = make_side(broker.bootstrap_servers)
    with trio.fail_after(30):
        while not await side.producer.cluster.check(["tick-data", "failed-messages"]):
            await trio.sleep(0.1)
    with Records(broker.bootstrap_servers, "tick-data") as records:
        for number in range(100):
            side.send(b"message %d" % number)
        assert side.books.totals().in_flight == 100
        await settle(side)
        totals = side.books.totals()
        assert (totals.received, totals.delivered, totals.imbalance) == (100, 100, 0)
        assert totals.received_bytes == totals.delivered_bytes
        values = [record.value() for record in records.take(100, key="alice")]
    assert values == [b"message %d" % number for number in range(100)]
    assert counted(side.metrics, "gateway_delivery_seconds") == 96, "one in 16, each for 16"


async def test_stamped_messages_arrive_with_their_stamp(broker: Broker, make_side: Make) -> None:
    side = make_side(broker.bootstrap_servers)
    with Records(broker.bootstrap_servers, "user-events") as records:
        side.send(b"raw", b"+stamp", "user_event")
        await settle(side)
        assert records.take(1, key="alice")[0].value() == b"raw+stamp"


async def test_every_counted_message_is_settled_once_whatever_its_way(broker: Broker, make_side: Make) -> None:
    side = make_side(broker.bootstrap_servers, **{"message.max.bytes": 2000})
    sender = Sender()
    side.send(b"plain", index=1, sender=sender)
    side.send(b"stamped", b"+stamp", index=2, sender=sender)
    side.send(b"r" * 1500, b"s" * 1000, index=3, sender=sender)
    side.dead_letter(sender, b"broken", catalogue.REASON_NOT_AN_ENVELOPE, 4)
    side.send(b"elsewhere", message_type="user_event", index=5, sender=sender)
    assert sender.settled == [], "nothing is settled before Kafka has answered"
    await settle(side)
    assert sorted(sender.settled) == [1, 2, 3, 4, 5]
    assert sender.rejected == [(catalogue.REASON_KAFKA_REFUSED, 3), (catalogue.REASON_NOT_AN_ENVELOPE, 4)]


async def test_dead_letters_carry_their_reason(broker: Broker, make_side: Make) -> None:
    side = make_side(broker.bootstrap_servers)
    with Records(broker.bootstrap_servers, "failed-messages") as records:
        side.dead_letter(Sender(), b"broken", catalogue.REASON_NOT_AN_ENVELOPE, 0)
        await settle(side)
        record = records.take(1, key="alice")[0]
    assert record.value() == b"broken"
    assert headers_of(record)["reason"] == catalogue.REASON_NOT_AN_ENVELOPE
    assert side.books.totals().dead_lettered == 1
    assert counted(side.metrics, "gateway_dead_letters", reason=catalogue.REASON_NOT_AN_ENVELOPE) == 1


async def test_what_librdkafka_refuses_at_once_becomes_a_dead_letter(broker: Broker, make_side: Make) -> None:
    """Larger than message.max.bytes as a record, small enough without the stamp."""
    side = make_side(broker.bootstrap_servers, **{"message.max.bytes": 2000})
    with Records(broker.bootstrap_servers, "failed-messages") as records:
        side.send(b"r" * 1500, b"s" * 1000)
        await settle(side)
        record = records.take(1, key="alice")[0]
    assert record.value() == b"r" * 1500, "the original bytes"
    assert headers_of(record)["reason"] == catalogue.REASON_KAFKA_REFUSED
    assert side.books.totals().dead_lettered == 1
    assert side.books.totals().imbalance == 0


async def test_full_queue_raises_and_room_is_announced(broker: Broker, make_side: Make) -> None:
    side = make_side(broker.bootstrap_servers, **{"queue.buffering.max.messages": 10, "linger.ms": 50})
    room: list[bool] = []
    side.holds.on_release = lambda: room.append(True)
    taken = 0
    with pytest.raises(QueueFull):
        for _ in range(20):
            side.send(b"x")
            taken += 1
    assert taken == 10
    assert side.producer.full
    with pytest.raises(QueueFull):
        side.dead_letter(Sender(), b"x", catalogue.REASON_UNKNOWN_TYPE, 0)
    assert counted(side.metrics, "gateway_reading_pauses") == 1
    await settle(side)
    side.producer.poll()
    assert room == [True]
    assert not side.producer.full
    assert side.books.totals().delivered == 10
    assert side.books.totals().imbalance == 0


async def test_unreachable_kafka_is_not_reached_and_a_flush_ends_in_time(make_side: Make) -> None:
    side = make_side("127.0.0.1:1")
    assert not await side.producer.cluster.check(["tick-data"])
    assert not side.producer.cluster.up
    sender = Sender()
    side.send(b"never", index=1, sender=sender)
    with trio.fail_after(5):
        for _ in range(10):
            side.producer.poll()
            await trio.sleep(0.03)
    assert side.books.totals().in_flight == 1
    await side.delivery.abandon()
    totals = side.books.totals()
    assert (totals.dropped, totals.in_flight, totals.imbalance) == (1, 0, 0)
    assert counted(side.metrics, "gateway_drops", reason=catalogue.GIVEN_UP_DRAIN_TIMEOUT) == 1
    assert sender.settled == [], "what is dropped is never acked"


async def test_nothing_is_left_behind_when_very_much_is_given_up(make_side: Make) -> None:
    """More than is reported in one poll, out of a producer that has taken another one's place."""
    count, senders = 20_000, [Sender() for _ in range(20)]
    side = make_side("127.0.0.1:1")
    for number in range(count):
        side.send(b"%d" % number, index=number // 20 + 1, sender=senders[number % 20])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.producer.run)
        side.producer.note_broken("as a fatal error would")
        with trio.fail_after(30):
            while side.producer.broken or len(side.producer) < count:
                await trio.sleep(0.01)
            await side.delivery.abandon()
        totals = side.books.totals()
        assert (totals.dropped, totals.in_flight, totals.imbalance) == (count, 0, 0)
        nursery.cancel_scope.cancel()


async def test_old_record_for_a_topic_that_is_gone_becomes_a_dead_letter(
    embedded_broker: Broker, make_side: Make
) -> None:
    """No route names it any more, so nobody waits for it to come back."""
    side = make_side(embedded_broker.bootstrap_servers, **{"topic.metadata.propagation.max.ms": 100})
    assert await side.producer.cluster.check(["tick-data", "failed-messages"])
    origin: Any = Sender()
    side.delivery.replay(replace(SPOOLED, topic="old-topic", headers=None), origin)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.producer.run)
        with trio.fail_after(30):
            while side.books.totals().in_flight:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert (side.books.totals().dead_lettered, counted(side.metrics, "gateway_producer_renewals")) == (1, 0)


async def test_bug_in_queueing_again_ends_nothing(embedded_broker: Broker, make_side: Make) -> None:
    side = make_side(embedded_broker.bootstrap_servers)

    def fails() -> None:
        raise RuntimeError("a bug")

    side.holds.on_release = fails
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.producer.run)
        side.producer.note_broken("as a fatal error would")
        with trio.fail_after(30):
            while side.producer.broken or side.producer.full:
                await trio.sleep(0.01)
        side.send(b"goes on")
        await settle(side)
        nursery.cancel_scope.cancel()


async def test_replay_that_is_given_up_is_in_the_books_and_still_in_the_spool(make_side: Make, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 1 << 30)
    spool.append([replace(SPOOLED, value=b"%d" % number) for number in range(10)])
    spool.close()
    side = make_side("127.0.0.1:1")
    spool = Spool(tmp_path / "spool", 1 << 30)
    replay = Replay(spool, side.delivery.replay, side.metrics, side.log)
    async with trio.open_nursery() as nursery:
        await nursery.start(replay.run)
        assert (replay.unsettled, side.books.totals().in_flight) == (10, 10)
        replay.stop()
        await side.delivery.abandon()
        nursery.cancel_scope.cancel()
    spool.close()
    totals = side.books.totals()
    assert (totals.received, totals.spooled, totals.in_flight, totals.imbalance) == (10, 10, 0, 0)
    assert replay.unsettled == 0
    assert side.delivery.lost == 0
    assert sum(len(list(segment.read())) for segment in list_segments(tmp_path / "spool")) == 10


async def test_replay_that_was_stopped_does_nothing_when_it_is_asked_again(make_side: Make, tmp_path: Path) -> None:
    """As by a SIGHUP with new routes in the middle of a drain."""
    spool = Spool(tmp_path / "spool", 1 << 30)
    spool.append([SPOOLED])
    spool.close()
    side = make_side("127.0.0.1:1")
    spool = Spool(tmp_path / "spool", 1 << 30)
    replay = Replay(spool, side.delivery.replay, side.metrics, side.log)
    replay.stop()
    async with trio.open_nursery() as nursery:
        await nursery.start(replay.run)
        await nursery.start(replay.run)
    spool.close()
    assert side.books.totals().received == 0


async def test_bad_property_is_named(make_side: Make) -> None:
    with pytest.raises(StartupError, match=r"no\.such\.thing"):
        make_side("127.0.0.1:1", **{"no.such.thing": 1})


@pytest.mark.apache
async def test_record_the_topic_refuses_becomes_a_dead_letter(apache_broker: Broker, make_side: Make) -> None:
    topic = f"small-{uuid.uuid4().hex[:8]}"
    create_topics(apache_broker.bootstrap_servers, [topic], partitions=1, config={"max.message.bytes": "500"})
    # The broker judges a batch whole; alone in its batch the small record passes.
    side = make_side(
        apache_broker.bootstrap_servers,
        Routes({"tick_data": topic}, "failed-messages"),
        **{"batch.num.messages": 1},
    )
    with Records(apache_broker.bootstrap_servers, "failed-messages") as records:
        side.send(b"fits")
        original = os.urandom(2000)
        side.send(original, b"stamp")
        await settle(side)
        record = records.take(1, key="alice")[0]
    assert record.value() == original, "without the stamp"
    assert headers_of(record)["reason"] == catalogue.REASON_KAFKA_REFUSED
    totals = side.books.totals()
    assert (totals.delivered, totals.dead_lettered, totals.imbalance) == (1, 1, 0)
    assert any(event == "record failed" for event, _ in side.lines)


@pytest.mark.apache
async def test_missing_topic_is_named_and_found_when_it_is_created(apache_broker: Broker, make_side: Make) -> None:
    topic = f"late-{uuid.uuid4().hex[:8]}"
    side = make_side(apache_broker.bootstrap_servers)
    assert not await side.producer.cluster.check(["tick-data", topic])
    assert list(side.producer.cluster.missing_topics) == [topic]
    create_topics(apache_broker.bootstrap_servers, [topic])
    with trio.fail_after(20):
        while not await side.producer.cluster.check(["tick-data", topic]):
            await trio.sleep(0.2)
    assert not side.producer.cluster.missing_topics
    assert side.producer.cluster.up


async def test_dead_letter_topic_that_refuses_at_once_costs_the_message_and_nothing_else(
    embedded_broker: Broker, make_side: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make_side(embedded_broker.bootstrap_servers, **{"message.max.bytes": 2000})

    def denied(*_: object) -> None:
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))

    monkeypatch.setattr(side.producer, "queue", denied)
    sender = Sender()
    side.dead_letter(sender, b"broken", catalogue.REASON_NOT_AN_ENVELOPE, 1)
    side.send(b"refused", b"+stamp", index=2, sender=sender)
    await settle(side)
    totals = side.books.totals()
    assert (totals.received, totals.dropped, totals.in_flight, totals.imbalance) == (2, 2, 0, 0)
    assert sender.settled == [1, 2], "dropped and reported: acks go on behind it"
    assert sender.rejected == [(catalogue.GIVEN_UP_DEAD_LETTER_REFUSED, 1), (catalogue.GIVEN_UP_DEAD_LETTER_REFUSED, 2)]
    assert counted(side.metrics, "gateway_drops", reason=catalogue.GIVEN_UP_DEAD_LETTER_REFUSED) == 2
    assert [event for event, _ in side.lines].count("dead letter failed") == 2


async def test_producer_that_fails_for_good_is_replaced_and_what_it_held_arrives_in_order(make_side: Make) -> None:
    """A record that times out has left a gap in an idempotent producer's sequence."""
    with Daemon(settings={"log.level": "warning"}) as kafka:
        side = make_side(kafka.kafka, **{"message.timeout.ms": 4000})  # long enough for a busy machine afterwards
        sender = Sender()
        broken: list[str] = []
        room: list[bool] = []

        def on_broken() -> None:
            broken.append(side.producer.broken)
            with pytest.raises(QueueFull):
                side.send(b"too early", index=101, sender=sender)

        side.holds.on_hold = on_broken
        side.holds.on_release = lambda: room.append(True)
        with Records(kafka.kafka, "tick-data") as records, trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(side.producer.run)
                side.send(b"0", index=1, sender=sender)
                while not sender.settled:
                    await trio.sleep(0.01)
                kafka.signal(signal.SIGSTOP)
                for number in range(1, 100):
                    side.send(b"%d" % number, index=number + 1, sender=sender)
                while not broken:
                    await trio.sleep(0.01)
                kafka.signal(signal.SIGCONT)
                while not room:
                    await trio.sleep(0.01)
                side.send(b"100", index=101, sender=sender)
                while side.books.totals().in_flight:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            found: list[int] = []
            while 100 not in found:
                found += [int(record.value() or b"") for record in records.take(1, key="alice")]
        assert list(dict.fromkeys(found)) == list(range(101)), "all, in order; twice at most what was under way"
        assert sorted(sender.settled) == list(range(1, 102))
        assert len(broken) == 1
        assert counted(side.metrics, "gateway_producer_renewals") == 1
        totals = side.books.totals()
        assert (totals.received, totals.delivered, totals.imbalance) == (101, 101, 0)


async def test_order_holds_when_a_producer_fails_while_it_is_still_being_refilled(make_side: Make) -> None:
    with Daemon(settings={"log.level": "warning"}) as kafka:
        # Two types share the topic, and every third message is stamped: each waits for its report in its own way.
        side = make_side(kafka.kafka, Routes({"tick_data": "tick-data", "user_event": "tick-data"}, "failed-messages"))
        sender = Sender()

        def send(number: int) -> None:
            message_type = "user_event" if number % 4 == 3 else "tick_data"
            side.send(b"%d" % number, b"" if number % 3 else b" ", message_type, number + 1, sender)

        room: list[bool] = []
        side.holds.on_release = lambda: room.append(True)
        with Records(kafka.kafka, "tick-data") as records, trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                send(0)
                await settle(side)
                kafka.signal(signal.SIGSTOP)
                for number in range(1, 101):
                    send(number)
                side.producer._properties["queue.buffering.max.messages"] = 30  # the next one cannot hold them all
                side.producer._properties["message.max.bytes"] = 1_000_001  # and was not made before
                nursery.start_soon(side.producer.run)
                for times in (1, 2):
                    side.producer.note_broken("the test's")
                    while counted(side.metrics, "gateway_producer_renewals") < times:
                        await trio.sleep(0.01)
                    assert side.books.totals().in_flight == 100
                kafka.signal(signal.SIGCONT)
                while side.books.totals().in_flight:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            found: list[int] = []
            while 100 not in found:
                found += [int(record.value() or b"") for record in records.take(1, key="alice")]
        assert list(dict.fromkeys(found)) == list(range(101)), found
        assert sender.settled == list(range(1, 102))
        assert room == [True], "and nothing new before all of them are queued"
        assert side.books.totals().imbalance == 0


async def test_fatal_error_that_poll_raises_is_noted_once_and_another_producer_goes_on(
    embedded_broker: Broker, make_side: Make
) -> None:
    side = make_side(embedded_broker.bootstrap_servers, **{"linger.ms": 60_000})
    broken: list[str] = []
    side.holds.on_hold = lambda: broken.append(side.producer.broken)
    sender = Sender()
    side.send(b"held", index=1, sender=sender)
    side.producer._properties["linger.ms"] = 5
    with Records(embedded_broker.bootstrap_servers, "tick-data") as records, trio.fail_after(30):
        librdkafka_fails_for_good(side.producer)
        side.producer.poll()
        side.producer.poll()
        assert len(broken) == 1
        assert "fenced" in broken[0]
        assert (side.producer.full, side.producer.cluster.up) == (True, False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.producer.run)
            while not sender.settled:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert records.take(1, key="alice")[0].value() == b"held"
    assert not side.producer.full
    assert side.books.totals().delivered == 1


def librdkafka_fails_for_good(producer: KafkaProducer) -> None:
    """Stands in for a fenced producer: confluent-kafka raises out of poll() then."""
    real = producer._producer

    class Fenced:
        purge = real.purge

        def __len__(self) -> int:
            return len(real)

        def poll(self, timeout: float) -> int:
            real.poll(timeout)
            raise KafkaException(KafkaError(KafkaError._FATAL, "Fatal error: fenced", fatal=True))

    producer._producer = Fenced()  # type: ignore[assignment]  # what it raises is the test
