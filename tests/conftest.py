"""What tests share: a daemon process with an embedded Kafka, and the brokers the broker tests run against."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from confluent_kafka import Producer
from hypothesis import settings

from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES
from gateway.kafka.embedded import EmbeddedKafka
from gateway.testing import kafka as apache
from gateway.testing.daemon import Daemon

settings.register_profile("quick", max_examples=20)  # `.ci/quick`; the others look longer


def pytest_xdist_auto_num_workers() -> int | None:
    """``-n auto``: two workers a core, 16 at most, since tests wait for processes much of the time."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else min(16, 2 * len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a gateway process: ``-m 'not daemon'`` leaves what takes seconds (`.ci/quick`)."""
    for item in items:
        if isinstance(item, pytest.Function) and (
            {"daemon", "start_daemon"} & set(item.fixturenames) or "Daemon(" in inspect.getsource(item.function)
        ):
            item.add_marker(pytest.mark.daemon)


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """One daemon with an embedded Kafka for all tests that need no settings of their own."""
    with Daemon(settings={"log.level": "debug"}) as running:
        yield running


@pytest.fixture
def start_daemon() -> Iterator[Callable[..., Daemon]]:
    """Starts daemons of the test's own; all are gone when the test ends."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Daemon(*arguments, **options))


class Broker:
    """A Kafka for broker tests; ``process`` is there when a test may stop and kill it."""

    def __init__(self, bootstrap_servers: str, process: apache.ApacheKafka | None = None) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.process = process


@pytest.fixture(scope="session")
def apache_broker() -> Iterator[Broker]:
    """Apache Kafka with the gateway's topics; ``KAFKA_BOOTSTRAP`` names an existing cluster instead of starting one."""
    existing = os.environ.get("KAFKA_BOOTSTRAP")
    if existing:
        apache.create_topics(existing)
        yield Broker(existing)
        return
    missing = apache.why_not()
    if missing is not None:
        pytest.skip(f"Apache Kafka cannot be started here: {missing}; set KAFKA_BOOTSTRAP, or see CI, which runs this")
    with apache.ApacheKafka() as kafka:
        apache.create_topics(kafka.bootstrap_servers)
        yield Broker(kafka.bootstrap_servers, kafka)


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[Broker]:
    """A mock cluster in this process."""
    with EmbeddedKafka() as embedded:
        producer = Producer({"bootstrap.servers": embedded.bootstrap_servers})
        for topic in (*DEFAULT_ROUTES.values(), DEFAULT_DEAD_LETTER_TOPIC):
            producer.list_topics(topic, timeout=10)  # the mock makes a topic when a producer asks for it
        yield Broker(embedded.bootstrap_servers)


@pytest.fixture(scope="session", params=["embedded", pytest.param("apache", marks=pytest.mark.apache)])
def broker(request: pytest.FixtureRequest) -> Broker:
    """The same tests against the embedded mock and against Apache Kafka."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found
