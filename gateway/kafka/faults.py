"""What a failed record's error code means: whose fault it is, and so what becomes of the record.

The one table of it. A record that Kafka refuses for its own sake becomes a dead letter; every other one is queued again
in the order in which it came, with another producer where the present one cannot go on (librdkafka, INTRODUCTION.md,
"Idempotent Producer").
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from confluent_kafka import KafkaError


class Fault(Enum):
    """Whose fault a failure is."""

    RECORD = "the record's: Kafka will never take it"
    PURGED = "nobody's: the gateway gave it up"
    PRODUCER = "the producer's: it can send nothing more, or has left a gap in its sequence"
    TOPIC = "the topic's: it is not there, or may not be written to, for now"
    BATCH = "the batch's: together its records are more than the topic takes at once"
    NEIGHBOUR = "another record's in the same batch"
    PARTITION = "a partition's: it takes nothing, and what waits for it has filled the queue"


_FAULTS: Final = {
    KafkaError._PURGE_QUEUE: Fault.PURGED,  # this and what follows: the public spelling of librdkafka's own codes
    KafkaError._PURGE_INFLIGHT: Fault.PURGED,
    KafkaError._FATAL: Fault.PRODUCER,
    KafkaError._FENCED: Fault.PRODUCER,
    KafkaError._MSG_TIMED_OUT: Fault.PRODUCER,
    KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER: Fault.PRODUCER,
    KafkaError.UNKNOWN_PRODUCER_ID: Fault.PRODUCER,
    KafkaError.INVALID_PRODUCER_EPOCH: Fault.PRODUCER,
    KafkaError.PRODUCER_FENCED: Fault.PRODUCER,
    KafkaError._UNKNOWN_TOPIC: Fault.TOPIC,
    KafkaError._UNKNOWN_PARTITION: Fault.TOPIC,
    KafkaError.UNKNOWN_TOPIC_OR_PART: Fault.TOPIC,
    KafkaError.UNKNOWN_TOPIC_ID: Fault.TOPIC,
    KafkaError.INCONSISTENT_TOPIC_ID: Fault.TOPIC,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: Fault.TOPIC,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: Fault.TOPIC,
    KafkaError.MSG_SIZE_TOO_LARGE: Fault.BATCH,  # the broker checks batches, not records
    KafkaError.RECORD_LIST_TOO_LARGE: Fault.BATCH,
    KafkaError._INVALID_DIFFERENT_RECORD: Fault.NEIGHBOUR,
    KafkaError.INVALID_TIMESTAMP: Fault.RECORD,
    KafkaError.INVALID_RECORD: Fault.RECORD,
    KafkaError.INVALID_MSG_SIZE: Fault.RECORD,
    KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT: Fault.RECORD,
}

NOT_AUTHORISED: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})

UNCERTAIN: Final = frozenset({Fault.PRODUCER})
"""Kafka may have written a record that failed so."""


def fault_of(code: int) -> Fault:
    """Whose fault error ``code`` is: the record's unless it is known to be somebody else's."""
    return _FAULTS.get(code, Fault.RECORD)


def refuses_record(code: int) -> bool:
    """Whether ``code`` can only be the record's fault, whatever else has happened to the producer."""
    return _FAULTS.get(code) is Fault.RECORD


def may_be_written(code: int) -> bool:
    """Whether Kafka may have a record that failed with ``code``: it was on its way, or the answer got lost."""
    return code == KafkaError._PURGE_INFLIGHT or fault_of(code) in UNCERTAIN
