"""What a failed record's code means, and that handling many failures, or one that raises, stops nobody."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from confluent_kafka import KafkaError

from gateway.kafka import producer as module
from gateway.kafka.faults import Fault, fault_of, may_be_written, refuses_record
from gateway.telemetry.logging import Log
from gateway.telemetry.metrics import Metrics
from tests.router.stand_ins import Sender
from tests.router.test_delivery import Make, make_side  # noqa: F401  # a fixture


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (KafkaError.INVALID_TIMESTAMP, Fault.RECORD),
        (KafkaError.POLICY_VIOLATION, Fault.RECORD),
        (KafkaError._INVALID_DIFFERENT_RECORD, Fault.NEIGHBOUR),
        (KafkaError.MSG_SIZE_TOO_LARGE, Fault.BATCH),
        (KafkaError._UNKNOWN_TOPIC, Fault.TOPIC),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, Fault.TOPIC),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, Fault.TOPIC),
        (KafkaError._PURGE_QUEUE, Fault.PURGED),
        (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, Fault.PRODUCER),
    ],
)
def test_whose_fault_a_failure_is(code: int, fault: Fault) -> None:
    assert fault_of(code) is fault


def test_only_what_was_on_its_way_may_be_in_kafka() -> None:
    assert may_be_written(KafkaError._PURGE_INFLIGHT)
    assert may_be_written(KafkaError.UNKNOWN_PRODUCER_ID)
    assert not may_be_written(KafkaError._PURGE_QUEUE)
    assert not may_be_written(KafkaError._INVALID_DIFFERENT_RECORD)
    assert refuses_record(KafkaError.INVALID_TIMESTAMP)
    assert not refuses_record(KafkaError.POLICY_VIOLATION), "known only by exclusion"


async def test_purge_of_many_records_is_handled_in_parts(
    make_side: Make,  # noqa: F811  # the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REPORTS_AT_ONCE", 100)
    side = make_side("127.0.0.1:1")
    sender = Sender()
    for number in range(1000):
        side.send(b"x", index=number + 1, sender=sender)
    handled: list[int] = []
    real = side.producer.count_failure

    def count() -> None:
        handled[-1] += 1
        real()

    monkeypatch.setattr(side.producer, "count_failure", count)
    poll = side.producer.poll

    def counted_poll() -> None:
        handled.append(0)
        poll()

    monkeypatch.setattr(side.producer, "poll", counted_poll)
    with trio.fail_after(30):
        await side.delivery.abandon()
    assert sum(handled) == 1000
    assert max(handled) <= 100
    totals = side.books.totals()
    assert (totals.dropped, totals.in_flight, totals.imbalance) == (1000, 0, 0)


async def test_report_that_comes_after_a_drain_has_given_up_is_put_aside_at_once(
    make_side: Make,  # noqa: F811  # the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PURGE_TIMEOUT_S", 0.0)
    side = make_side("127.0.0.1:1")
    real = side.producer._purge
    monkeypatch.setattr(side.producer, "_purge", lambda: None)  # a thread of librdkafka's that hangs
    sender = Sender()
    side.send(b"late", index=1, sender=sender)
    side.send(b"stamped", b"\x12\x00", index=2, sender=sender)
    await side.delivery.abandon()
    assert side.books.totals().in_flight == 2
    real()
    with trio.fail_after(30):
        while side.books.totals().in_flight:
            side.producer.poll()
            await trio.sleep(0.01)
    assert side.books.totals().dropped == 2
    assert len(side.delivery) == 0, "nothing waits for a turn that never comes"


async def test_handler_of_a_report_that_raises_ends_nothing(
    make_side: Make,  # noqa: F811  # the fixture
    capfd: pytest.CaptureFixture[str],
) -> None:
    metrics = Metrics()
    log = Log(metrics, level="error")
    producer = module.KafkaProducer("127.0.0.1:1", {}, metrics, log)

    def raises(_: Any, __: Any) -> None:
        raise ZeroDivisionError("a bug")

    producer.produce("t", b"x", b"k", -1, raises)
    producer.produce("t", b"y", b"k", -1, raises)
    producer._purge()
    with trio.fail_after(30):
        while len(producer):
            producer.poll()
            await trio.sleep(0.01)
    log.close()
    assert capfd.readouterr().err.count("ZeroDivisionError") == 2
