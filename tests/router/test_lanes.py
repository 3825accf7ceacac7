"""A lane settles the message that a report is about, in whatever order reports come."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError

from gateway.core.routes import Routes
from gateway.telemetry.logging import Log
from gateway.telemetry.metrics import Metrics
from tests.router.stand_ins import Sender
from tests.router.test_delivery import Side


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
def side() -> Iterator[Side]:
    metrics = Metrics()
    log = Log(metrics, level="error")
    routes = Routes({"tick_data": "tick-data", "user_event": "tick-data"}, "failed-messages")
    yield Side("127.0.0.1:1", log, metrics, routes)
    log.close()


def test_reports_out_of_order_settle_their_own_messages(side: Side) -> None:
    """After a topic has got more partitions, messages of one key are in two of them."""
    sender = Sender()
    lane = side.lane(sender)
    for index, (raw, stamp) in enumerate([(b"a", b""), (b"b", b"!"), (b"c", b""), (b"d", b"")], 1):
        side.send(raw, stamp, index=index, sender=sender)
    for value in (b"c", b"b!", b"d", b"a"):
        lane(None, Said(value))
    assert sender.settled == [3, 2, 4, 1]
    assert not lane.waiting
    assert not lane.indices
    assert (lane.tally.delivered, lane.tally.imbalance) == (4, 0)


def test_types_that_share_a_topic_wait_in_one_order_and_count_for_themselves(side: Side) -> None:
    sender = Sender()
    lane = side.lane(sender)
    assert side.lane(sender, "user_event") is lane, "one lane a topic"
    for index, message_type in enumerate(("tick_data", "user_event", "tick_data"), 1):
        side.send(b"%d" % index, message_type=message_type, index=index, sender=sender)
    assert [(message.value, message.index) for message in lane.reclaim()] == [(b"1", 1), (b"2", 2), (b"3", 3)]
    tallies = [side.books.tally("acme", message_type) for message_type in ("tick_data", "user_event")]
    assert [tally.received for tally in tallies] == [2, 1]


def test_report_after_everything_was_taken_back_changes_nothing(side: Side) -> None:
    sender = Sender()
    lane = side.lane(sender)
    side.send(b"1", index=1, sender=sender)
    message, *others = lane.reclaim()
    assert (message.value, message.index, message.uncertain, others) == (b"1", 1, True, [])
    lane(None, Said(b"1"))
    assert (sender.settled, lane.tally.delivered, lane.tally.in_flight) == ([], 0, 1)


def test_record_that_two_producers_hand_back_keeps_the_time_it_was_received(side: Side) -> None:
    sender = Sender()
    lane = side.lane(sender)
    side.send(b"a", b"stamp", index=1, sender=sender)
    lane(KafkaError(KafkaError._PURGE_QUEUE), Said(b"astamp"))
    (message,) = lane.reclaim()
    first = message.received_at_ms
    time.sleep(0.005)  # two times that a millisecond tells apart
    message.fail(Said(b"astamp"), uncertain=False)
    assert message.received_at_ms == first > 1_700_000_000_000
