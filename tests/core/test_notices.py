"""Control messages in both encodings, and topic names."""

from __future__ import annotations

import json

import msgpack
import pytest

from gateway.core import notices
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.routes import Routes, check_topic


def test_both_encodings_hold_the_same_welcome() -> None:
    message = notices.welcome(
        connection_id="c-1",
        principal=Principal("ålice", "acme", "pro", 1_800_000_000.9),
        tier="pro",
        limits=TierLimits(messages_per_second=75.0),
        max_message_bytes=65_536,
        ping_interval_s=20.0,
        ack_interval_ms=200,
    )
    text, packed = notices.encode(message, notices.JSON), notices.encode(message, notices.MSGPACK)
    assert isinstance(text, str)
    assert isinstance(packed, bytes)
    assert json.loads(text) == msgpack.unpackb(packed) == message
    assert message["token_expires_at"] == 1_800_000_000
    assert message["limits"] == {"messages_per_second": 75, "burst": 150, "max_message_bytes": 65_536}
    names = "type connection user_id company_id tier token_expires_at limits ping_interval_s ack_interval_ms"
    assert set(message) == set(names.split())


@pytest.mark.parametrize("name", ["tick-data", "a", "A.b_c-9", "x" * 249])
def test_topic_names_kafka_takes(name: str) -> None:
    assert check_topic(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a b", "tick\n", "é", "x" * 250])
def test_topic_names_kafka_does_not_take(name: str) -> None:
    with pytest.raises(ValueError, match="not a Kafka topic name"):
        check_topic(name)


def test_all_topics_are_named_once() -> None:
    assert Routes({"a": "x", "b": "x", "c": "y"}, "dead").all_topics() == ["dead", "x", "y"]
