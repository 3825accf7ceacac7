"""Partitions that take nothing while others do: what is meant for them waits aside, so that nobody else waits with it.

A partition without a leader, or with fewer replicas in sync than its topic asks for, keeps its records in the producer
until it is whole again. They would fill the queue, and stop every user. When the queue has been full for a while the
cluster is asked for such partitions (`gateway.kafka.topics`); what the producer held for them is parked here, in order,
and the connections of their users wait, each for itself. When the partition takes records again, what was parked goes
first.

What is parked was in the queue before, or is the dead letter of such a record, so its bound holds; what comes after
stays in the connections' backlogs.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from gateway.kafka.partitioner import partition_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.kafka.partitioner import TopicPartition
    from gateway.router.messages import Message, Sender


class Parking:
    """Which partitions are parked, what is parked with them, and who waits for them."""

    def __init__(self, partition_counts: Mapping[str, int]) -> None:
        """``partition_counts``: partitions of each topic, as far as they are known."""
        self._counts = partition_counts
        self._waiters: dict[TopicPartition, dict[Sender, None]] = {}
        self._messages: deque[Message] = deque()
        self.types: Counter[str] = Counter()
        """How many messages of each type are parked: Kafka is not asked to confirm these."""

    def __bool__(self) -> bool:
        return bool(self._waiters)

    def __len__(self) -> int:
        """Messages that are parked."""
        return len(self._messages)

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

    def add_waiter(self, partition: TopicPartition, waiter: Sender) -> None:
        """``waiter`` waits for a parked partition."""
        if waiter not in self._waiters[partition]:
            self._waiters[partition][waiter] = None
            waiter.wait_alone()

    def add(self, message: Message) -> None:
        """Park a message that was in the queue."""
        self._messages.append(message)
        self.types[message.tally.message_type] += 1

    def take_all(self) -> list[Message]:
        """Everything that is parked, in order; it is not any more."""
        messages = list(self._messages)
        self._messages.clear()
        self.types.clear()
        return messages

    def reopen(self, partition: TopicPartition) -> list[Sender]:
        """The partition is parked no more; returns who waited for it and for no other one."""
        waiters = self._waiters.pop(partition, {})
        return [waiter for waiter in waiters if not any(waiter in others for others in self._waiters.values())]
