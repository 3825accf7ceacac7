"""A producer for records that nobody waits for: a queue of its own, so that it takes no room from messages.

What it holds is bounded and tried for a while; whatever becomes of it is reported. It connects with the first record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaException

from gateway.kafka.properties import PROPERTIES, open_producer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from confluent_kafka import Producer

    from gateway.config.promises import Property

TRIED_MS: Final = 30_000
"""How long a record is tried."""
LINGER_MS: Final = 100


class AsideProducer:
    """Everything is called from the Trio thread; `poll` is called now and then."""

    def __init__(self, bootstrap_servers: str, properties: Mapping[str, Property], max_records: int) -> None:
        self._properties: dict[str, Any] = {
            **PROPERTIES,
            **properties,
            "bootstrap.servers": bootstrap_servers,
            "enable.idempotence": False,  # an event may be there twice
            "queue.buffering.max.messages": max_records,
            "queue.buffering.max.kbytes": 16_384,
            "message.timeout.ms": TRIED_MS,
            "linger.ms": LINGER_MS,
            "log_level": 0,  # the other producer says what is wrong with Kafka
        }
        self._producer: Producer | None = None

    def queue(self, topic: str, value: bytes, key: bytes, report: Callable[[Any, Any], None]) -> bool:
        """Queue one record; false when there is no room for it, or nothing can be queued. Raises nothing."""
        try:
            if self._producer is None:
                self._producer = open_producer(self._properties)
            self._producer.produce(topic, value, key, on_delivery=report)
        except (BufferError, KafkaException):
            return False
        return True

    def poll(self) -> None:
        """Let reports be made."""
        if self._producer is not None:
            self._producer.poll(0)
