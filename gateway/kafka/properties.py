"""What librdkafka is told: the gateway's own properties under those of the operator."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from gateway.config.promises import PROMISES
from gateway.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.config.promises import Property

PROPERTIES: Final[Mapping[str, Property]] = {
    **{name: promise.value for name, promise in PROMISES.items() if promise.value is not None},
    "compression.type": "lz4",
    "linger.ms": 5,
    "batch.num.messages": 10_000,
    "batch.size": 1_000_000,
    # Every broker is tried again within a second: after an outage nothing waits longer than Kafka does.
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1000,
    "retry.backoff.max.ms": 500,
    "socket.keepalive.enable": True,
    "log_level": 4,
}
"""librdkafka settings unless the operator says otherwise in ``[kafka.properties]``."""

_ADMIN_PROPERTIES: Final = re.compile(r"(security|sasl|ssl|enable\.ssl|client|broker|socket|https)\b")


def open_producer(properties: Mapping[str, Any]) -> Producer:
    """confluent-kafka's producer. Raises StartupError for a property librdkafka does not take."""
    try:
        return Producer(dict(properties))
    except (KafkaException, ValueError, TypeError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        raise StartupError(f"kafka.properties: librdkafka refuses the settings: {reason}") from error


def open_admin(properties: Mapping[str, Any]) -> AdminClient:
    """An admin client that connects as a producer with ``properties`` does. Raises KafkaException."""
    own = {name: value for name, value in properties.items() if _ADMIN_PROPERTIES.match(name)}
    return AdminClient({**own, "bootstrap.servers": properties["bootstrap.servers"], "log_level": 0})


def check_properties(properties: Mapping[str, Property]) -> None:
    """Let librdkafka judge the properties without connecting to anything. Raises StartupError.

    It gets no broker's address, and no method of its own to fetch tokens (OIDC), which it would use at once.
    """
    offline: dict[str, Any] = {**PROPERTIES, **properties, "log_level": 0}
    if "sasl.oauthbearer.method" in offline:
        offline |= {"sasl.oauthbearer.method": "default", "oauth_cb": lambda _: ("none", time.time() + 60)}
    open_producer(offline)
