"""Control messages, server to client: their fields and their two encodings. `gateway.core.controls` has the others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import msgpack

from gateway.core.limits import capacity

if TYPE_CHECKING:
    from gateway.core.controls import Id
    from gateway.core.limits import TierLimits
    from gateway.core.principal import Principal

BEARER: Final = "bearer"
JSON: Final = "gateway.v1.json"
MSGPACK: Final = "gateway.v1.msgpack"
CONTROL_SUBPROTOCOLS: Final = (JSON, MSGPACK)


def encode(message: dict[str, Any], subprotocol: str) -> str | bytes:
    """Encode for ``subprotocol``: str travels as a text frame (JSON), bytes as a binary one (MessagePack)."""
    if subprotocol == JSON:
        return json.dumps(message, separators=(",", ":"))
    packed: bytes = msgpack.packb(message)
    return packed


def welcome(
    *,
    connection_id: str,
    principal: Principal,
    tier: str,
    limits: TierLimits,
    max_message_bytes: int,
    ping_interval_s: float,
    ack_interval_ms: int,
) -> dict[str, Any]:
    """The first message of a connection. A rate of 0 means that none is enforced."""
    rate = limits.told_rate
    return {
        "type": "welcome",
        "connection": connection_id,
        "user_id": principal.user_id,
        "company_id": principal.company_id,
        "tier": tier,
        "token_expires_at": int(principal.expires_at),
        "limits": {
            "messages_per_second": _whole(rate),
            "burst": int(capacity(rate, limits.burst_s)) if rate else 0,
            "max_message_bytes": max_message_bytes,
        },
        "ping_interval_s": ping_interval_s,
        "ack_interval_ms": ack_interval_ms,
    }


def ack(count: int) -> dict[str, Any]:
    """The first ``count`` messages of the connection are settled."""
    return {"type": "ack", "count": count}


def rejected(count: int, reason: str, last: int) -> dict[str, Any]:
    """``count`` messages were refused for ``reason``; ``last`` is the index, from 1, of the last of them."""
    return {"type": "rejected", "count": count, "reason": reason, "last": last}


def throttle(dropped: int, scope: str, messages_per_second: float, retry_after_ms: int) -> dict[str, Any]:
    """``dropped`` messages were over a limit of the ``scope``; its rate, 0 if it is none of messages."""
    return {
        "type": "throttle",
        "dropped": dropped,
        "scope": scope,
        "messages_per_second": _whole(messages_per_second),
        "retry_after_ms": retry_after_ms,
    }


def _whole(rate: float) -> float:
    """A rate as JSON shows it: without a fraction where there is none."""
    return int(rate) if rate == int(rate) else rate


def degraded() -> dict[str, Any]:
    """Kafka takes nothing at the moment, so nothing is read from clients."""
    return {"type": "degraded", "reason": "kafka_unavailable"}


def recovered() -> dict[str, Any]:
    """Reading goes on."""
    return {"type": "recovered", "reason": "kafka_unavailable"}


def _answer(kind: str, identifier: Id | None, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **({} if identifier is None else {"id": identifier}), **fields}


def pong(time_ms: int, identifier: Id | None) -> dict[str, Any]:
    """The answer to ``ping``; ``time_ms`` is the gateway's clock."""
    return _answer("pong", identifier, time=time_ms)


def authenticated(token_expires_at: int, identifier: Id | None) -> dict[str, Any]:
    """The answer to ``authenticate``: the newer token counts."""
    return _answer("authenticated", identifier, token_expires_at=token_expires_at)


def error(code: str, message: str, identifier: Id | None) -> dict[str, Any]:
    """A control message that could not be followed, and why."""
    return _answer("error", identifier, code=code, message=message)


def closing(code: int, reason: str, reconnect_after_ms: int) -> dict[str, Any]:
    """The connection is about to be closed with ``code``."""
    return {"type": "closing", "code": code, "reason": reason, "reconnect_after_ms": reconnect_after_ms}
