"""Partitions that take nothing while others do: what is meant for them waits aside, so that nobody else waits with it.

A partition without a leader, or with fewer replicas in sync than its topic asks for, keeps its records in the producer
until it is whole again. They would fill the queue, and stop every user. When the queue has been full for a while the
producer looks for such partitions (`KafkaProducer.unwritable`); what it held for them is parked here, in order, and the
connections of their users wait, each for itself. When the partition takes records again, what was parked goes first.

What is parked was in the queue before, so its bound holds; what comes after stays in the connections' backlogs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

TopicPartition = tuple[str, int]


class Waiter(Protocol):
    """A connection that can wait for a partition of its own."""

    @property
    def backlog(self) -> int:
        """Messages that wait with it."""

    def wait_alone(self) -> None:
        """Hand over nothing until `go_on`."""

    def go_on(self) -> None:
        """Hand over what has gathered."""


class Parking:
    """Which partitions are parked, and who waits for them."""

    def __init__(self, partition_counts: Mapping[str, int]) -> None:
        """``partition_counts``: partitions of each topic, as far as they are known."""
        self._counts = partition_counts
        self._waiters: dict[TopicPartition, dict[Waiter, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiters)

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """The parked partitions."""
        return frozenset(self._waiters)

    @property
    def backlog(self) -> int:
        """Messages that wait in the connections."""
        return sum(waiter.backlog for waiter in {waiter for waiters in self._waiters.values() for waiter in waiters})

    def park(self, partition: TopicPartition) -> None:
        """From now on nothing is queued for ``partition``."""
        self._waiters.setdefault(partition, {})

    def find(self, topic: str, key: bytes) -> TopicPartition | None:
        """The partition of a record when it is parked."""
        count = self._counts.get(topic, 0)
        if not self._waiters or not count:
            return None
        partition = (topic, partition_of(key, count))
        return partition if partition in self._waiters else None

    def add_waiter(self, partition: TopicPartition, waiter: Waiter) -> None:
        """``waiter`` waits for a parked partition."""
        if waiter not in self._waiters[partition]:
            self._waiters[partition][waiter] = None
            waiter.wait_alone()

    def reopen(self, partition: TopicPartition) -> list[Waiter]:
        """The partition is parked no more; returns who waited for it and for no other one."""
        waiters = self._waiters.pop(partition, {})
        return [waiter for waiter in waiters if not any(waiter in others for others in self._waiters.values())]


_MASK: Final = 0xFFFFFFFF


def _murmur2(data: bytes) -> int:
    """Kafka's murmur2 (org.apache.kafka.common.utils.Utils), 32 bits, seed 0x9747b28c."""
    multiplier, length = 0x5BD1E995, len(data)
    found = 0x9747B28C ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * multiplier & _MASK
        word = (word ^ word >> 24) * multiplier & _MASK
        found = found * multiplier & _MASK ^ word
    if length > whole:
        found = (found ^ int.from_bytes(data[whole:], "little")) * multiplier & _MASK
    found = (found ^ found >> 13) * multiplier & _MASK
    return found ^ found >> 15


def partition_of(key: bytes, count: int) -> int:
    """Where Java's default partitioner, and librdkafka's murmur2_random, put a key among ``count`` partitions."""
    return (_murmur2(key) & 0x7FFFFFFF) % count
