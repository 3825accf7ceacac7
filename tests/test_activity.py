"""Activity events: what becomes of users' connections, as records; nothing depends on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from confluent_kafka.admin import AdminClient

from gateway.testing.daemon import Daemon
from gateway.testing.kafka import create_topics
from gateway.testing.rawclient import RawClient
from gateway.testing.records import Records
from gateway.v1.activity_pb2 import Activity, ActivityEvent
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.conftest import Broker

Start = Callable[..., Daemon]


def counted(daemon: Daemon, outcome: str) -> int:
    line = f'gateway_activity_events_total{{outcome="{outcome}"}} '
    page = daemon.get("/metrics")[1].splitlines()
    return int(float(next(one.removeprefix(line) for one in page if one.startswith(line))))


def wait_for_topic(daemon: Daemon) -> None:
    """It is looked for when the gateway starts: until then events are given up."""
    until = time.monotonic() + 10
    while True:
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("probe", "probe"))
        time.sleep(0.2)
        if counted(daemon, "delivered"):
            return
        assert time.monotonic() < until


def test_connections_bans_throttles_and_refusals_are_told_in_order_under_the_companys_key(start_daemon: Start) -> None:
    daemon = start_daemon(
        settings={"tiers.pro.messages_per_second": 10, "tiers.pro.users": 1, "breaker.share": 0.5, "breaker.ban_s": 60}
    )
    wait_for_topic(daemon)
    envelope = MessageEnvelope(message_type="tick_data").SerializeToString()
    with Records(daemon.kafka, "user-activity") as records:
        with ExitStack() as stack:
            client = stack.enter_context(RawClient(daemon.url))
            client.upgrade(daemon.token("alice"), target="/ws/mt5?account=5012345")
            for _ in range(30):
                client.send_binary(envelope)
            client.ping()
            other = stack.enter_context(RawClient(daemon.url))
            assert other.request(other.headers(daemon.token("bob"))).status == 403
            for _ in range(60):
                client.send_binary(envelope)
            assert client.read_close()[0] == 1008
        found = [
            ActivityEvent.FromString(record.value() or b"") for record in records.take(6, key="acme", timeout_s=30)
        ]
    assert [event.activity for event in found] == [
        Activity.CONNECTED,
        Activity.THROTTLED,
        Activity.REFUSED,
        Activity.BANNED,
        Activity.DISCONNECTED,
        Activity.THROTTLE_ENDED,
    ]
    connected, throttled, refused, banned, disconnected, ended = found
    assert (connected.user_id, connected.company_id, connected.account) == ("alice", "acme", "5012345")
    assert connected.connection_id == disconnected.connection_id != ""
    assert (throttled.user_id, throttled.reason) == ("alice", "rate_limited")
    assert (refused.user_id, refused.reason) == ("bob", "too_many_users")
    assert (banned.user_id, banned.seconds) == ("alice", 60)
    assert (disconnected.reason, disconnected.messages) == ("banned", disconnected.messages)
    assert ended.messages >= 20
    assert all(abs(event.time_ms / 1000 - time.time()) < 60 and event.gateway for event in found)


def test_without_its_topic_nothing_is_told_and_nothing_else_changes(start_daemon: Start, broker: Broker) -> None:
    topic = f"activity-{time.time_ns()}"
    daemon = start_daemon(broker.bootstrap_servers, settings={"activity.topic": topic})
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token(), protocols="gateway.v1.json")
        client.send_binary(MessageEnvelope(message_type="tick_data").SerializeToString())
        assert client.read_control("ack")["count"] == 1
    assert daemon.get("/health/ready")[0] == 200
    made, given_up = counted(daemon, "made"), counted(daemon, "given_up")
    assert made >= given_up


@pytest.mark.apache
def test_topic_that_is_not_in_apache_kafka_is_not_made_and_found_when_it_is(
    start_daemon: Start, apache_broker: Broker
) -> None:
    topic = f"activity-{time.time_ns()}"
    daemon = start_daemon(apache_broker.bootstrap_servers, settings={"activity.topic": topic})
    assert topic in daemon.wait_log("activity is told to nobody")
    admin = AdminClient({"bootstrap.servers": apache_broker.bootstrap_servers})
    assert topic not in admin.list_topics(timeout=10).topics
    assert daemon.get("/health/ready")[0] == 200
    create_topics(apache_broker.bootstrap_servers, [topic])
    until = time.monotonic() + 60
    while not counted(daemon, "delivered"):
        assert time.monotonic() < until
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token())
        time.sleep(1)
    time.sleep(0.5)
    assert counted(daemon, "made") == counted(daemon, "given_up") + counted(daemon, "delivered")
