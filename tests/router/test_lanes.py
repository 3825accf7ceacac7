"""A lane settles the message that a report is about, in whatever order reports come."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError

from gateway.core.books import Books
from gateway.core.routes import Routes
from gateway.kafka.producer import KafkaProducer
from gateway.router.delivery import Delivery
from gateway.router.lanes import Lane
from gateway.telemetry.logging import Log, RateLimited
from gateway.telemetry.metrics import Counters
from tests.router.test_delivery import Sender


class Said:
    """What confluent-kafka's report says of a record."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __len__(self) -> int:
        return len(self._value)

    def value(self) -> bytes:
        return self._value

    def topic(self) -> str:
        return "tick-data"

    def latency(self) -> float:
        return 0.001


@pytest.fixture
def delivery() -> Iterator[Delivery]:
    counters = Counters()
    log = Log(counters, level="error")
    producer = KafkaProducer("127.0.0.1:1", {}, counters, log)
    routes = Routes({"tick_data": "tick-data", "user_event": "tick-data"}, "failed-messages")
    quiet = RateLimited(lambda *_, **__: None, lambda: 0.0)
    yield Delivery(producer, routes, Books(), counters, gateway="test/0", log_refused=quiet)
    log.close()


def lane_of(delivery: Delivery, sender: Sender, message_type: str = "tick_data") -> Lane:
    lane = delivery.lane(sender, message_type, sender.lanes.values(), acked=True)
    assert lane is not None
    sender.lanes[message_type] = lane
    return lane


def test_reports_out_of_order_settle_their_own_messages(delivery: Delivery) -> None:
    """After a topic has got more partitions, messages of one key are in two of them."""
    sender = Sender()
    lane = lane_of(delivery, sender)
    for index, (raw, stamp) in enumerate([(b"a", b""), (b"b", b"!"), (b"c", b""), (b"d", b"")], 1):
        delivery.send(lane, sender, raw, stamp, index)
    for value in (b"c", b"b!", b"d", b"a"):
        lane(None, Said(value))
    assert sender.settled == [3, 2, 4, 1]
    assert not lane.waiting
    assert not lane.indices
    assert (lane.tally.delivered, lane.tally.imbalance) == (4, 0)


def test_types_that_share_a_topic_wait_in_one_order_and_count_for_themselves(delivery: Delivery) -> None:
    sender = Sender()
    ticks, events = lane_of(delivery, sender), lane_of(delivery, sender, "user_event")
    assert events.reports_to is ticks
    delivery.send(ticks, sender, b"1", b"", 1)
    delivery.send(events, sender, b"2", b"", 2)
    delivery.send(ticks, sender, b"3", b"", 3)
    assert [report.record for report, _ in ticks.take_back()] == [b"1", b"2", b"3"]
    assert (ticks.tally.received, events.tally.received) == (2, 1)


def test_report_after_everything_was_taken_back_changes_nothing(delivery: Delivery) -> None:
    sender = Sender()
    lane = lane_of(delivery, sender)
    delivery.send(lane, sender, b"1", b"", 1)
    (report, uncertain), *others = lane.take_back()
    assert (report.record, report.index, uncertain, others) == (b"1", 1, True, [])
    lane(None, Said(b"1"))
    assert (sender.settled, lane.tally.delivered, lane.tally.in_flight) == ([], 0, 1)


def test_record_that_two_producers_hand_back_keeps_the_time_it_was_received(delivery: Delivery) -> None:
    sender = Sender()
    lane = lane_of(delivery, sender)
    delivery.send(lane, sender, b"a", b"stamp", 1)
    lane(KafkaError(KafkaError._PURGE_QUEUE), Said(b"astamp"))
    ((report, _),) = lane.take_back()
    first = report.received_at_ms
    time.sleep(0.005)  # two times that a millisecond tells apart
    report.on_delivery(KafkaError(KafkaError._PURGE_QUEUE), Said(b"astamp"))
    assert report.received_at_ms == first > 1_700_000_000_000
