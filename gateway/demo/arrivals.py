"""The demo's consumer: reads everything back from Kafka and accounts for it, message by message."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from gateway.testing.figures import percentile
from gateway.v1.envelope_pb2 import MessageEnvelope

TOPIC: Final = "tick-data"


@dataclass(slots=True)
class Arrivals:
    """What the consumer thread has seen. One writer, one reader; plain ints and a bounded deque need no lock."""

    distinct: int = 0
    doubled: int = 0
    out_of_order: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=20_000))
    last_number: dict[int, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    error: str = ""

    def take(self, correlation_id: str, now_ns: int) -> None:
        """Account for one message."""
        client_number, number, sent_ns = map(int, correlation_id.split(":"))
        last = self.last_number.get(client_number, -1)
        if number <= last:
            self.doubled += 1
            return
        if number != last + 1:
            self.out_of_order += 1
        self.last_number[client_number] = number
        self.distinct += 1
        self.latencies_ms.append((now_ns - sent_ns) / 1e6)

    def percentile_ms(self, share: float) -> float:
        """A percentile of the last latencies, in milliseconds; 0 of none."""
        return percentile(self.latencies_ms, share) if self.latencies_ms else 0.0

    def fail(self, error: str) -> None:
        """The consumer cannot go on."""
        self.error = error


def consume(bootstrap_servers: str, arrivals: Arrivals, ready: threading.Event) -> None:
    """The consumer thread: read the topic from its beginning until told to stop."""
    try:
        consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "demo",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 10,
            }
        )
        topic = consumer.list_topics(TOPIC, timeout=10).topics[TOPIC]
        consumer.assign([TopicPartition(TOPIC, number, 0) for number in topic.partitions])
        ready.set()
        while not arrivals.stop.is_set():
            messages = consumer.consume(1000, timeout=0.01)
            now_ns = time.monotonic_ns()
            for message in messages:
                if message.error() is None:
                    arrivals.take(MessageEnvelope.FromString(message.value() or b"").correlation_id, now_ns)
        consumer.close()
    except (KafkaException, ValueError) as error:
        arrivals.fail(str(error))
        ready.set()
