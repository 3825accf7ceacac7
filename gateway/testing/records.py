"""Reads records back from Kafka with a real consumer."""

from __future__ import annotations

import time
from types import TracebackType

from confluent_kafka import Consumer, Message, TopicPartition


class Records:
    """A consumer of one topic from its end at the moment of entering."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "tests",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 10,
            }
        )
        self._topic = topic

    def __enter__(self) -> Records:
        deadline = time.monotonic() + 15
        while not (metadata := self._consumer.list_topics(self._topic, timeout=15).topics[self._topic]).partitions:
            assert time.monotonic() < deadline, f"no topic {self._topic}"
        self._consumer.assign(
            [
                TopicPartition(
                    self._topic,
                    number,
                    self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), timeout=15)[1],
                )
                for number in metadata.partitions
            ]
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._consumer.close()

    def take(self, count: int, *, key: str | None = None, timeout_s: float = 20.0) -> list[Message]:
        """The next ``count`` records, of one key if given; fails the test when they do not come."""
        found: list[Message] = []
        deadline = time.monotonic() + timeout_s
        while len(found) < count and time.monotonic() < deadline:
            for message in self._consumer.consume(max(1, count), timeout=0.1):
                assert message.error() is None, message.error()
                if key is None or message.key() == key.encode():
                    found.append(message)
        assert len(found) >= count, f"{len(found)} of {count} records came"
        return found

    def nothing_more(self, *, key: str, within_s: float = 0.5) -> bool:
        """True when no further record of ``key`` arrives; a real wait, since absence cannot be awaited."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if any(message.key() == key.encode() for message in self._consumer.consume(100, timeout=0.1)):
                return False
        return True


def headers_of(message: Message) -> dict[str, str]:
    """A record's headers as text."""
    headers = message.headers() or []
    return {str(name): value.decode() for name, value in dict(headers).items() if isinstance(value, bytes)}
