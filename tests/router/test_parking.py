"""Partitions that take nothing: where keys belong, who waits, and what goes first when they are whole again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from confluent_kafka import Message, Producer

from gateway.core import catalogue
from gateway.core.principal import Principal
from gateway.kafka.partitioner import partition_of
from gateway.router.parking import Parking
from gateway.testing.records import Records
from tests.conftest import Broker
from tests.router.stand_ins import Sender
from tests.router.test_delivery import Make, Parked, QueueFull, make_side  # noqa: F401  # a fixture


def test_keys_belong_where_librdkafka_puts_them(embedded_broker: Broker) -> None:
    producer = Producer({"bootstrap.servers": embedded_broker.bootstrap_servers, "partitioner": "murmur2_random"})
    found: list[Message] = []
    keys = ["a", "ab", "abc", "alice", "trader-0042", "ålice", "x" * 255, *map(str, range(50))]
    for key in keys:
        producer.produce("tick-data", b"", key.encode(), -1, lambda _, message: found.append(message))
    producer.flush(20)
    count = len(producer.list_topics("tick-data", timeout=10).topics["tick-data"].partitions)
    assert {message.key(): message.partition() for message in found} == {
        key.encode(): partition_of(key.encode(), count) for key in keys
    }


def test_murmur2_is_the_one_of_kafkas_own_tests() -> None:
    """org.apache.kafka.common.utils.UtilsTest.testMurmur2."""
    for key, value in {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536}.items():
        assert partition_of(key.encode(), 1 << 31) == value & 0x7FFFFFFF


def test_who_waits_for_two_partitions_goes_on_when_both_are_open() -> None:
    parking = Parking({"t": 2, "u": 2})
    assert not parking
    assert parking.find("t", b"alice") is None
    sender = Sender()
    mine = [(topic, partition_of(b"alice", 2)) for topic in ("t", "u")]
    for partition in mine:
        parking.park(partition)
        parking.add_waiter(partition, sender)
    assert parking.find("t", b"alice") == mine[0]
    assert sender.waiting_alone
    assert parking.reopen(mine[0]) == []
    assert parking.reopen(mine[1]) == [sender]
    assert not parking


async def test_topic_with_no_partition_that_takes_anything_is_named(
    embedded_broker: Broker,
    make_side: Make,  # noqa: F811  # the fixture
) -> None:
    producer = make_side(embedded_broker.bootstrap_servers).producer
    producer.cluster.partition_counts.update({"tick-data": 2, "user-events": 1, "notifications": 1})
    producer.cluster.unwritable = frozenset({("tick-data", 0), ("user-events", 0)})
    assert producer.cluster.unwritable_topics == ["user-events"]
    producer.cluster.unwritable |= {("tick-data", 1)}
    assert producer.cluster.unwritable_topics == ["tick-data", "user-events"]


class Other(Sender):
    """A user of another partition."""

    principal = Principal("bob", "acme", "pro", 0.0)


async def test_users_of_other_partitions_go_on_and_what_waits_goes_first_and_in_order(
    embedded_broker: Broker,
    make_side: Make,  # noqa: F811  # the fixture
) -> None:
    side = make_side(embedded_broker.bootstrap_servers)
    edition = side.delivery.edition
    assert await side.producer.cluster.check(["tick-data", "failed-messages"])
    side.producer.cluster.partition_counts.update({"tick-data": 4, "failed-messages": 4})
    stuck = partition_of(b"alice", 4)
    assert stuck != partition_of(b"bob", 4)
    alice, bob = Sender(), Other()
    with (
        Records(embedded_broker.bootstrap_servers, "tick-data") as records,
        Records(embedded_broker.bootstrap_servers, "failed-messages") as dead,
        trio.fail_after(30),
    ):
        side.producer.note_broken("as when the queue is full")
        side.delivery.note_unwritable(frozenset({("tick-data", stuck), ("failed-messages", stuck)}))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.producer.run)
            while side.producer.broken:
                await trio.sleep(0.01)
            side.send(b"bob 1", index=1, sender=bob)
            with pytest.raises(Parked):
                side.send(b"alice 1", index=1, sender=alice)
            with pytest.raises(Parked):
                side.dead_letter(alice, b"broken", catalogue.REASON_NOT_AN_ENVELOPE, 2)
            assert alice.waiting_alone
            while not bob.settled:
                await trio.sleep(0.01)
            assert side.books.totals().received == 1, "what is parked was not taken"
            side.delivery.note_unwritable(frozenset())
            assert not alice.waiting_alone
            alice.lanes.clear()  # as a session does when it is told
            send_when_there_is_room(lambda: side.send(b"alice 1", index=1, sender=alice))
            send_when_there_is_room(lambda: side.dead_letter(alice, b"broken", catalogue.REASON_NOT_AN_ENVELOPE, 2))
            while sorted(alice.settled) != [1, 2]:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert [record.value() for record in records.take(1, key="alice")] == [b"alice 1"]
        assert dead.take(1, key="alice")
    assert side.delivery.edition == edition + 2, "sessions look twice"
    assert side.books.totals().imbalance == 0


def send_when_there_is_room(send: Callable[[], None]) -> None:
    try:
        send()
    except QueueFull as error:
        raise AssertionError("nothing is parked any more") from error


async def test_what_the_producer_hands_back_is_parked_and_sent_first_when_the_partition_is_whole(
    embedded_broker: Broker,
    make_side: Make,  # noqa: F811  # the fixture
) -> None:
    side = make_side(embedded_broker.bootstrap_servers, **{"linger.ms": 60_000})
    side.producer.cluster.partition_counts["tick-data"] = 4
    partition = ("tick-data", partition_of(b"alice", 4))
    alice = Sender()
    with Records(embedded_broker.bootstrap_servers, "tick-data") as records, trio.fail_after(30):
        for number in range(100):
            side.send(b"%d" % number, index=number + 1, sender=alice)
        side.producer._properties["linger.ms"] = 5
        side.producer.note_broken("as when the queue is full")
        side.delivery.note_unwritable(frozenset({partition}))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.producer.run)
            while side.producer.broken or not alice.waiting_alone:
                await trio.sleep(0.01)
            assert len(side.delivery) == 100
            assert len(side.producer) == 0, "the queue is free for others"
            assert side.books.totals().in_flight == 100
            side.delivery.note_unwritable(frozenset())
            while len(alice.settled) < 100:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert [int(record.value() or b"") for record in records.take(100, key="alice")] == list(range(100))
    assert side.books.totals().imbalance == 0


async def test_what_is_parked_when_a_drain_gives_up_is_counted(
    embedded_broker: Broker,
    make_side: Make,  # noqa: F811  # the fixture
) -> None:
    side = make_side(embedded_broker.bootstrap_servers, **{"linger.ms": 60_000})
    side.producer.cluster.partition_counts["tick-data"] = 4
    alice = Sender()
    side.send(b"held", index=1, sender=alice)
    side.producer.note_broken("as when the queue is full")
    side.delivery.note_unwritable(frozenset({("tick-data", partition_of(b"alice", 4))}))
    await side.delivery.abandon()
    totals = side.books.totals()
    assert (totals.in_flight, totals.dropped, totals.imbalance, side.delivery.lost) == (0, 1, 0, 1)
    assert len(side.delivery) == 0
