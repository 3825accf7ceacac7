"""Acks over a real socket: cumulative, only for what Kafka has confirmed, not more often than said."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import msgpack
import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.conftest import Broker


def envelope(user: str, number: int, message_type: str = "tick_data") -> bytes:
    return MessageEnvelope(
        message_type=message_type, user_id=user, company_id="acme", payload=b"%d" % number
    ).SerializeToString()


TYPES = ["tick_data", "user_event", "trading_signal", "notification"]


def test_acks_rise_to_the_number_of_messages_over_all_topics_and_dead_letters(
    start_daemon: Callable[..., Daemon], broker: Broker
) -> None:
    daemon = start_daemon(broker.bootstrap_servers)
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("counter"), protocols="gateway.v1.json")
        interval_ms = client.read_control("welcome")["ack_interval_ms"]
        for number in range(1000):
            kind = TYPES[number % 4] if number % 7 else "nonsense"
            client.send_binary(envelope("counter", number, kind) if number % 11 else b"\xff")
        counts: list[int] = []
        began = time.monotonic()
        while not counts or counts[-1] < 1000:
            counts.append(client.read_control("ack")["count"])
        assert counts == sorted(set(counts)), "cumulative, each more than the one before"
        assert len(counts) <= (time.monotonic() - began) * 1000 / interval_ms + 2
        assert counts[-1] == 1000
    books = daemon.books()
    assert books["delivered"] + books["dead_lettered"] == 1000
    assert books["imbalance"] == 0


def test_nothing_is_acked_before_kafka_has_it(start_daemon: Callable[..., Daemon]) -> None:
    with Daemon(settings={"log.level": "warning"}) as kafka:
        daemon = start_daemon(kafka.kafka, settings={"session.ack_interval_ms": 50})
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("waiter"), protocols="gateway.v1.json")
            client.send_binary(envelope("waiter", 0))
            assert client.read_control("ack")["count"] == 1
            kafka.signal(signal.SIGSTOP)
            try:
                for number in range(1, 100):
                    client.send_binary(envelope("waiter", number))
                client.ping()
                time.sleep(0.5)  # ten ack intervals in which nothing may come
                client.ping()
                assert b'"ack"' not in client.buffer
            finally:
                kafka.signal(signal.SIGCONT)
            count = 1
            while count < 100:
                count = client.read_control("ack")["count"]
            assert count == 100


def test_last_ack_comes_before_the_answer_to_a_close(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("leaver"), protocols="gateway.v1.json")
        client.read_control("welcome")
        with Records(daemon.kafka, "tick-data") as records:
            client.send_binary(envelope("leaver", 0))
            records.take(1, key="leaver")
        client.send_frame(0x8, b"\x03\xe8")
        assert client.read_control("ack")["count"] == 1
        assert client.read_close()[0] == 1000


@pytest.mark.parametrize("protocol", ["gateway.v1.msgpack", None])
def test_acks_in_messagepack_and_none_without_a_subprotocol(daemon: Daemon, protocol: str | None) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("packer"), protocols=protocol)
        client.send_binary(envelope("packer", 0))
        if protocol is None:
            time.sleep(0.5)  # more than an ack interval in which nothing may come
            client.send_frame(0x9, b"p")
            assert client.read_frame() == (0xA, b"p")
            return
        seen: list[dict[str, object]] = []
        while "ack" not in [message["type"] for message in seen]:
            opcode, payload = client.read_frame()
            assert opcode == 0x2
            seen.append(msgpack.unpackb(payload))
        assert [message["type"] for message in seen] == ["welcome", "ack"]
        assert seen[-1]["count"] == 1


@pytest.mark.apache
def test_record_the_topic_refuses_is_rejected_by_its_number_and_acked_as_a_dead_letter(
    start_daemon: Callable[..., Daemon], apache_broker: Broker
) -> None:
    from gateway.testing.kafka import create_topics

    create_topics(apache_broker.bootstrap_servers, ["tiny"], partitions=1, config={"max.message.bytes": "500"})
    daemon = start_daemon(
        apache_broker.bootstrap_servers,
        settings={
            "routes.topics": {"tick_data": "tiny"},
            "kafka.properties": {"batch.num.messages": 1, "compression.type": "none"},
        },
    )
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("sizes"), protocols="gateway.v1.json")
        client.send_binary(envelope("sizes", 0))
        big = MessageEnvelope(message_type="tick_data", user_id="sizes", company_id="acme", payload=bytes(5000))
        client.send_binary(big.SerializeToString())
        client.send_binary(envelope("sizes", 2))
        rejected = client.read_control("rejected")
        assert (rejected["count"], rejected["reason"], rejected["last"]) == (1, "kafka_refused", 2)
        count = 0
        while count < 3:
            count = client.read_control("ack")["count"]
    books = daemon.books()
    assert (books["delivered"], books["dead_lettered"], books["imbalance"]) == (2, 1, 0)
