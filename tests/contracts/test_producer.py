"""What the router rests on in a producer: the stand-in, the embedded Kafka and Apache Kafka alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from gateway.kafka.faults import Fault, fault_of
from gateway.kafka.producer import KafkaProducer
from gateway.telemetry.logging import Log
from gateway.telemetry.metrics import Metrics
from gateway.testing.producer import FakeProducer
from tests.conftest import Broker
from tests.router.stand_ins import Recorder

Producer = KafkaProducer | FakeProducer
KINDS = ["fake", "embedded", pytest.param("apache", marks=pytest.mark.apache)]


class Owner:
    """Has ``left`` more to queue whenever it is asked."""

    def __init__(self) -> None:
        self.left = False

    def queue_again(self) -> bool:
        return self.left

    def note_unwritable(self, partitions: frozenset[tuple[str, int]]) -> None:
        """Not here."""


class World:
    def __init__(self, producer: Producer, holds: Recorder) -> None:
        self.producer = producer
        self.owner = Owner()
        producer.attach(self.owner)
        self.holds: list[str] = []
        holds.on_hold = lambda: self.holds.append("held")
        holds.on_release = lambda: self.holds.append("released")
        self.reports: list[tuple[Any, bytes]] = []

    def queue(self, value: bytes) -> None:
        self.producer.queue("tick-data", value, b"alice", self.note)

    def note(self, error: Any, reported: Any) -> None:
        self.reports.append((error, reported.value()))

    async def settle(self, count: int) -> None:
        with trio.fail_after(30):
            while len(self.reports) < count:
                self.producer.poll()
                await trio.sleep(0.01)


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    metrics = Metrics()
    log = Log(metrics, level="error")

    def make(room: int = 100_000) -> World:
        holds = Recorder()
        if request.param == "fake":
            return World(FakeProducer(room=room, holds=holds), holds)
        broker: Broker = request.getfixturevalue(f"{request.param}_broker")
        properties = {"queue.buffering.max.messages": room, "linger.ms": 20}
        return World(KafkaProducer(broker.bootstrap_servers, properties, metrics, log, holds), holds)

    yield make
    log.close()


Make = Callable[..., World]


async def test_records_of_one_key_are_reported_in_order_and_count_until_then(world: Make) -> None:
    it = world()
    for number in range(20):
        it.queue(b"%d" % number)
    assert len(it.producer) == 20
    assert it.reports == [], "nothing is reported but by a poll"
    await it.settle(20)
    assert it.reports == [(None, b"%d" % number) for number in range(20)]
    assert len(it.producer) == 0


async def test_report_says_topic_length_and_how_long_it_took(world: Make) -> None:
    it, seen = world(), list[tuple[str, int, bool]]()

    def note(error: Any, reported: Any) -> None:
        it.reports.append((error, reported.value()))
        seen.append((reported.topic(), len(reported), reported.latency() >= 0))

    it.producer.produce("tick-data", b"value", b"alice", -1, note)
    await it.settle(1)
    assert seen == [("tick-data", 5, True)]


async def test_no_room_holds_until_a_quarter_has_gone_and_what_waits_is_queued(world: Make) -> None:
    it = world(room=8)
    for number in range(8):
        it.queue(b"%d" % number)
    with pytest.raises(BufferError):
        it.queue(b"too many")
    it.producer.note_full()
    it.producer.note_full()
    assert it.producer.full
    assert set(it.holds) == {"held"}
    it.owner.left = True
    await it.settle(8)
    assert it.producer.full, "somebody still waits"
    it.owner.left = False
    it.producer.poll()
    assert (it.producer.full, it.holds[-1]) == (False, "released")
    it.producer.produce("tick-data", b"again", b"alice", -1, it.note)
    await it.settle(9)


async def test_purge_reports_on_everything_and_blames_nobody(world: Make) -> None:
    it = world()
    for number in range(50):
        it.queue(b"%d" % number)
    with trio.fail_after(30):
        await it.producer.purge()
    assert len(it.reports) == 50
    assert {fault_of(error.code()) for error, _ in it.reports if error is not None} <= {Fault.PURGED}
    assert len(it.producer) == 0


async def test_broken_producer_takes_nothing_until_another_has_handed_everything_back(world: Make) -> None:
    it = world()
    for number in range(10):
        it.queue(b"%d" % number)
    it.producer.note_broken("the test's")
    with pytest.raises(BufferError):
        it.queue(b"x")
    with pytest.raises(BufferError):
        it.producer.produce("tick-data", b"x", b"alice", -1, it.note)
    assert it.holds == ["held"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.producer.run)
        with trio.fail_after(30):
            while it.producer.broken or it.producer.full:
                await trio.sleep(0.01)
        assert sorted(value for _, value in it.reports) == sorted(b"%d" % number for number in range(10))
        assert it.holds == ["held", "released"]
        it.producer.produce("tick-data", b"goes on", b"alice", -1, it.note)
        with trio.fail_after(30):
            while it.reports[-1][1] != b"goes on":
                await trio.sleep(0.01)
        assert it.reports[-1][0] is None
        nursery.cancel_scope.cancel()


async def test_closed_producer_takes_nothing_new(world: Make) -> None:
    it = world()
    it.producer.take_nothing_new()
    with pytest.raises(BufferError):
        it.producer.produce("tick-data", b"x", b"alice", -1, it.note)
