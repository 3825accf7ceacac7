"""What ``[kafka.properties]`` may not change, aliases included, and the promise of README.md that would break.

librdkafka's names and meanings are those of its CONFIGURATION.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

Property = str | int | float | bool
"""A value of a librdkafka property."""


class Promise(NamedTuple):
    """Why a property is the gateway's own. ``value`` is what it is set to, None where it is not set, or by a setting
    of its own; the same value in ``[kafka.properties]`` is no fault.
    """

    text: str
    value: Property | None = None


STATISTICS_INTERVAL_MS: Final = 5000
"""Only to find a producer that is stuck: with thousands of partitions one document is megabytes long."""

_ORDER: Final = "order and no duplicates rest on an idempotent producer that tries for ever"
_ACKS: Final = "an ack means that all replicas in sync have the message"
_REPORTS: Final = "the books and the acks rest on its reports"
_MOCK: Final = "messages would go to a mock, not to Kafka"

PROMISES: Final[Mapping[str, Promise]] = {
    "bootstrap.servers": Promise("kafka.bootstrap_servers sets it"),
    "metadata.broker.list": Promise("kafka.bootstrap_servers sets it"),
    "queue.buffering.max.messages": Promise("kafka.max_queued_messages sets it"),
    "queue.buffering.max.kbytes": Promise("kafka.max_queued_bytes sets it"),
    "enable.idempotence": Promise(_ORDER, True),  # no duplicates and order through retries; implies acks=all
    "acks": Promise(_ACKS, "all"),
    "request.required.acks": Promise(_ACKS),
    # librdkafka must not give up on a record while the queue still bounds memory: an expired record would be lost, and
    # fences an idempotent producer. 0 is for ever.
    "message.timeout.ms": Promise(_ORDER, 0),
    "delivery.timeout.ms": Promise(_ORDER),
    "retries": Promise(_ORDER),
    "message.send.max.retries": Promise(_ORDER),
    "queuing.strategy": Promise(_ORDER),
    "api.version.request": Promise(_ORDER),
    "transactional.id": Promise("nothing is sent in transactions, so nothing would be sent at all"),
    "enable.gapless.guarantee": Promise("one record that Kafka refuses would end the producer"),
    "partitioner": Promise("records are placed as the Java client places them", "murmur2_random"),
    "delivery.report.only.error": Promise(_REPORTS),
    "enabled_events": Promise(_REPORTS),
    "statistics.interval.ms": Promise("a producer that is stuck is found by it", STATISTICS_INTERVAL_MS),
    "allow.auto.create.topics": Promise("a topic that is missing is named, never made", False),
    "topic.blacklist": Promise("a topic that is there would be called missing"),
    "internal.termination.signal": Promise("signals belong to the daemon"),
    "test.mock.num.brokers": Promise(_MOCK),
    "test.mock.broker.rtt": Promise(_MOCK),
    "ut_handle_ProduceResponse": Promise("it is a hook of librdkafka's own tests"),
    "default.topic.config": Promise("topic properties stand beside the others"),
}


def breaks_promise(name: str, value: Property | None) -> bool:
    """Whether ``[kafka.properties]`` may not set ``name`` to ``value``; None is a value that is not known."""
    promise = PROMISES.get(name)
    if promise is None:
        return False
    mine = promise.value
    if mine is None or value is None:
        return True
    given = str(value).lower()
    if isinstance(mine, bool):
        given = {"t": "true", "1": "true", "f": "false", "0": "false"}.get(given, given)
    return given != str(mine).lower()
