"""A stand-in for `gateway.kafka.producer.KafkaProducer`: no Kafka, and records that fail when a test says so.

`tests/contracts/test_producer.py` holds it to what the real one does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from confluent_kafka import KafkaError

from gateway.core.holds import PRODUCER_FULL, Holds, NoHolds
from gateway.kafka.faults import Fault
from gateway.kafka.producer import POLL_BUSY_S, ROOM_AGAIN, Owner

NOTHING: Final = -1
"""What `FakeProducer.fail` is told for a record that Kafka takes."""


@dataclass(frozen=True, slots=True)
class FakeRecord:
    """A record as it was queued, and as confluent-kafka reports on it."""

    record_topic: str
    record_value: bytes
    key: bytes
    headers: list[tuple[str, bytes]] | None
    queued_at: float = field(default_factory=time.monotonic)

    def topic(self) -> str:
        """As confluent_kafka.Message has it."""
        return self.record_topic

    def value(self) -> bytes:
        """As confluent_kafka.Message has it."""
        return self.record_value

    def latency(self) -> float:
        """As confluent_kafka.Message has it, in seconds."""
        return time.monotonic() - self.queued_at

    def __len__(self) -> int:
        return len(self.record_value)


class FakeCluster:
    """What is known of no cluster."""

    def __init__(self) -> None:
        self.partition_counts: dict[str, int] = {}


class FakeProducer:
    """Takes ``room`` records at a time; each is reported on at the next `poll`, in order."""

    def __init__(self, *, room: int = 1_000_000, holds: Holds | None = None) -> None:
        self._room = room
        self._holds = NoHolds() if holds is None else holds
        self._owner: Owner | None = None
        self._queued: deque[tuple[FakeRecord, Callable[[Any, Any], None]]] = deque()
        self._fail: Callable[[FakeRecord], int] = lambda record: NOTHING
        self._closed = False
        self._room_at = 0
        self.cluster = FakeCluster()
        self.full = False
        self.broken = ""
        self.confirmed: list[FakeRecord] = []
        """The records that "Kafka" has taken, in order."""

    def fail(self, fail: Callable[[FakeRecord], int]) -> None:
        """Let records fail: ``fail`` gives the error code (KafkaError) of each, or `NOTHING`."""
        self._fail = fail

    def attach(self, owner: Owner) -> None:
        """As the real one."""
        self._owner = owner

    def __len__(self) -> int:
        return len(self._queued)

    def produce(
        self, topic: str, value: bytes, key: bytes, partition: int, on_delivery: Callable[[Any, Any], None], /
    ) -> None:
        """As the real one: raises BufferError while there is no room, or nothing may be produced."""
        if self._closed or (self.broken or self.full):
            raise BufferError
        self.queue(topic, value, key, on_delivery)

    def queue(
        self,
        topic: str,
        value: bytes,
        key: bytes,
        on_delivery: Callable[[Any, Any], None],
        headers: list[tuple[str, bytes]] | None = None,
        received_at_ms: int = 0,
    ) -> None:
        """As the real one."""
        if self.broken or len(self._queued) >= self._room:
            raise BufferError
        self._queued.append((FakeRecord(topic, value, key, headers), on_delivery))

    def take_nothing_new(self) -> None:
        """As the real one."""
        self._closed = True

    def note_full(self) -> None:
        """As the real one."""
        self._room_at = int(len(self._queued) * ROOM_AGAIN)
        self._set_full()

    def _set_full(self) -> None:
        self.full = True
        if not self._closed:
            self._holds.hold(PRODUCER_FULL)

    def sends_alone(self, size: int) -> bool:
        """Every record is sent alone here."""
        return True

    def count_failure(self) -> None:
        """A poll handles all there are."""

    def note_fault(self, fault: Fault, error: KafkaError, topic: str) -> None:
        """As the real one."""
        self.note_broken(error.str())

    def note_broken(self, reason: str) -> None:
        """As the real one: nothing may be produced until `run` has replaced the producer."""
        if not self.broken:
            self.broken = reason
            self._set_full()

    def poll(self) -> bool:
        """Report on everything that was queued before."""
        for _ in range(len(self._queued)):
            if self.broken:
                break  # what is behind a gap is not sent
            record, report = self._queued.popleft()
            code = self._fail(record)
            if code == NOTHING:
                self.confirmed.append(record)
            report(None if code == NOTHING else KafkaError(code), record)
        crowded = self._owner is not None and self._owner.queue_again()
        if self.full and not self.broken and not crowded and len(self._queued) <= self._room_at:
            self.full = False
            self._holds.release(PRODUCER_FULL)
        return False

    async def purge(self) -> None:
        """As the real one."""
        self._purge()
        await trio.lowlevel.checkpoint()

    def _purge(self) -> None:
        queued, self._queued = self._queued, deque()
        for record, report in queued:
            report(KafkaError(KafkaError._PURGE_QUEUE), record)

    async def run(self) -> None:
        """Poll, and replace a broken producer, until cancelled."""
        while True:
            self.poll()
            if self.broken:
                self._purge()
                self.broken = ""
            await trio.sleep(POLL_BUSY_S)
