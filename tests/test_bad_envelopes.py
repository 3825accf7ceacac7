"""What is not a good envelope becomes a dead letter with its reason; what is odd but good is routed."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from gateway.testing.records import Records, headers_of
from gateway.v1.envelope_pb2 import MessageEnvelope


def envelope(**fields: object) -> bytes:
    good = {"message_type": "tick_data", "user_id": "alice", "company_id": "acme", "payload": b"ticks"}
    return MessageEnvelope(**{**good, **fields}).SerializeToString()  # type: ignore[arg-type]  # the fields' own types


def field(number: int, wire_type: int, data: bytes) -> bytes:
    return bytes((number << 3 | wire_type,)) + data


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not_an_envelope"),
    "not protobuf": (b"\xff\xff\xff", "not_an_envelope"),
    "JSON": (b'{"message_type": "tick_data"}', "not_an_envelope"),
    "truncated": (envelope()[:-3], "not_an_envelope"),
    "eleven-byte varint": (field(5, 0, b"\xff" * 10 + b"\x01"), "not_an_envelope"),
    "negative length": (field(4, 2, b"\xff" * 9 + b"\x01"), "not_an_envelope"),
    "string that is not UTF-8": (field(1, 2, b"\x02\xff\xfe"), "not_an_envelope"),
    "groups nested 5,000 deep": (b"\x7b" * 5000, "not_an_envelope"),
    "unknown type": (envelope(message_type="weather"), "unknown_message_type"),
    "no type": (envelope(message_type=""), "unknown_message_type"),
    "type with control characters": (envelope(message_type="tick\ndata"), "unknown_message_type"),
    "type that names a topic": (envelope(message_type="failed-messages"), "unknown_message_type"),
    "type like a path": (envelope(message_type="../../tick_data"), "unknown_message_type"),
    "type of 60 KiB": (envelope(message_type="t" * 60_000), "unknown_message_type"),
    "somebody else": (envelope(user_id="bob"), "user_id_mismatch"),
    "somebody else in a repeated field": (envelope() + envelope(user_id="bob"), "user_id_mismatch"),
    "other case": (envelope(user_id="Alice"), "user_id_mismatch"),
    "other company": (envelope(company_id="rival"), "company_id_mismatch"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_envelope_becomes_a_dead_letter_with_its_reason(daemon: Daemon, name: str) -> None:
    raw, reason = CASES[name]
    before = time.time()
    with Records(daemon.kafka, "failed-messages") as dead, RawClient(daemon.url) as client:
        client.upgrade(daemon.token(), protocols="gateway.v1.json")
        welcome = client.read_control("welcome")
        client.send_binary(envelope())
        client.send_binary(raw)
        notice = client.read_control("rejected")
        record = dead.take(1, key="alice")[0]
    assert record.value() == (raw or None) or record.value() == raw
    headers = headers_of(record)
    assert headers["reason"] == reason
    assert (headers["user_id"], headers["company_id"]) == ("alice", "acme")
    assert headers["path"] == "/ws/mt5"
    assert headers["connection_id"] == welcome["connection"]
    assert before - 1 <= int(headers["received_at"]) / 1000 <= time.time() + 1
    assert headers["gateway"]
    assert (notice["count"], notice["reason"], notice["last"]) == (1, reason, 2)


def test_record_is_the_received_bytes_under_the_users_key(daemon: Daemon) -> None:
    sent = envelope(timestamp=123, correlation_id="c-1") + field(15, 2, b"\x07unknown")
    before = time.time()
    with Records(daemon.kafka, "tick-data") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.send_binary(sent)
        record = records.take(1, key="alice")[0]
    assert record.value() == sent
    kind, created_ms = record.timestamp()
    assert kind == 1, "CreateTime"
    assert before - 1 <= created_ms / 1000 <= time.time() + 1


@pytest.mark.parametrize("missing", ["user_id", "company_id", "both"])
def test_empty_identity_is_stamped_by_appending(daemon: Daemon, missing: str) -> None:
    emptied = {"user_id": "", "company_id": ""} if missing == "both" else {missing: ""}
    sent = envelope(**emptied)
    with Records(daemon.kafka, "tick-data") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.send_binary(sent)
        value = records.take(1, key="alice")[0].value()
    assert value is not None
    assert value.startswith(sent)
    stamped = MessageEnvelope.FromString(value)
    assert (stamped.user_id, stamped.company_id, stamped.payload) == ("alice", "acme", b"ticks")


def test_traced_message_without_an_id_gets_one(daemon: Daemon) -> None:
    with Records(daemon.kafka, "tick-data") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token(), protocols="gateway.v1.json")
        connection = client.read_control("welcome")["connection"]
        client.send_binary(envelope(enable_tracing=True))
        client.send_binary(envelope(enable_tracing=True, correlation_id="mine"))
        values = [MessageEnvelope.FromString(record.value() or b"") for record in records.take(2, key="alice")]
    assert [value.correlation_id for value in values] == [f"{connection}-1", "mine"]


def test_the_last_of_repeated_fields_is_the_one_that_is_checked_and_routed(daemon: Daemon) -> None:
    sent = envelope(user_id="bob", message_type="weather") + envelope(message_type="user_event")
    with Records(daemon.kafka, "user-events") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.send_binary(sent)
        assert records.take(1, key="alice")[0].value() == sent


def test_every_default_route_leads_to_its_topic(daemon: Daemon) -> None:
    routes = {
        "tick_data": "tick-data",
        "user_event": "user-events",
        "trading_signal": "trading-signals",
        "notification": "notifications",
    }
    for message_type, topic in routes.items():
        with Records(daemon.kafka, topic) as records, RawClient(daemon.url) as client:
            client.upgrade(daemon.token("router"))
            client.send_binary(envelope(message_type=message_type, user_id="router"))
            assert records.take(1, key="router")[0].topic() == topic


def test_a_thousand_types_add_no_metric_series(daemon: Daemon) -> None:
    def series() -> set[str]:
        with urllib.request.urlopen(f"{daemon.sidecar}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("inventor"), protocols="gateway.v1.json")
        client.send_binary(b"\xff")
        client.read_control("rejected")
        time.sleep(1.1)  # the exposition may be a second old
        before = series()
        for number in range(1000):
            client.send_binary(envelope(message_type=f"type-{number}", user_id="inventor"))
        assert sum(client.read_control("rejected")["count"] for _ in range(1)) >= 1
        time.sleep(1.1)
        assert series() == before


def test_rejections_of_one_read_are_gathered(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token(), protocols="gateway.v1.json")
        client.read_control("welcome")
        for _ in range(50):
            client.send_binary(envelope(user_id="bob"))
        total, last = 0, 0
        while total < 50:
            notice = client.read_control("rejected")
            total += notice["count"]
            last = notice["last"]
        assert (total, last) == (50, 50)


def test_books_balance_after_all_of_it(daemon: Daemon) -> None:
    deadline = time.monotonic() + 10
    while (books := daemon.books())["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert books["in_flight"] == 0
    assert books["imbalance"] == 0
    assert books["received"] == books["delivered"] + books["dead_lettered"] + books["dropped"]
    assert json.loads(daemon.get("/health")[1])["messages"]["unbalanced_companies"] == 0
