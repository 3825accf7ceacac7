"""A Kafka inside the process: librdkafka's mock cluster, on a real TCP port, for demos and tests.

Any Kafka client can produce to it and consume from it while the process lives. It keeps about 5 MB a
partition in memory and then forgets the oldest records; topics appear, with four partitions, when they are first
asked for, and those it is given at the start. It is not for data that matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from confluent_kafka import KafkaException, Producer

from gateway.errors import StartupError


class EmbeddedKafka:
    """A running mock cluster with one broker, from entering to leaving the context."""

    def __init__(self, topics: Iterable[str] = ()) -> None:
        """``topics`` are there from the beginning."""
        self._topics = tuple(topics)
        self._host: Producer | None = None
        self.bootstrap_servers = ""
        """``host:port`` for any Kafka client, set on entering."""

    def __enter__(self) -> EmbeddedKafka:
        try:
            self._host = Producer({"test.mock.num.brokers": 1, "log_level": 3})
            brokers = self._host.list_topics(timeout=10).brokers
            for topic in self._topics:
                self._host.list_topics(topic, timeout=10)
        except KafkaException as error:
            raise StartupError(f"the embedded Kafka did not start: {error}") from error
        self.bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers.values())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._host = None
