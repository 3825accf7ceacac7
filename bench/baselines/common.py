"""What the Python baselines share: the token, the envelope, the producer."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import jwt
from confluent_kafka import Producer

from gateway.core.routes import DEFAULT_ROUTES
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.token_pb2 import UserToken

PORT = int(os.environ.get("BASELINE_PORT", "0"))
SECRET = os.environ.get("BASELINE_SECRET", "")
POLL_S = 0.005


def authenticate(authorization: str) -> tuple[str, str]:
    """(user_id, company_id) of a bearer token; raises jwt.InvalidTokenError and ValueError."""
    claims = jwt.decode(authorization.removeprefix("Bearer "), SECRET, algorithms=["HS256"], issuer="api-gateway")
    data = claims["data"]
    token = UserToken.FromString(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)))
    if token.user_id != claims["sub"]:
        raise ValueError("user_id is not sub")
    return token.user_id, token.company_id


class Router:
    """Reads envelopes and produces them."""

    def __init__(self) -> None:
        self.received = 0
        self.delivered = 0
        self.producer = Producer(
            {
                "bootstrap.servers": os.environ.get("BASELINE_KAFKA", ""),
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "linger.ms": 5,
                "batch.num.messages": 10_000,
                "queue.buffering.max.messages": 2_000_000,
                "log_level": 3,
            }
        )

    def route(self, message: bytes, user_id: str, company_id: str) -> None:
        """Produce one message. Raises ValueError for one that names somebody else or has an unknown type."""
        envelope = MessageEnvelope.FromString(message)
        if envelope.user_id != user_id or envelope.company_id != company_id:
            raise ValueError("somebody else's")
        topic = DEFAULT_ROUTES.get(envelope.message_type)
        if topic is None:
            raise ValueError("unknown type")
        self.received += 1
        self.producer.produce(topic, message, user_id.encode(), -1, self._on_delivery)

    def _on_delivery(self, error: Any, _: Any) -> None:
        if error is None:
            self.delivered += 1

    def finish(self) -> None:
        """Flush and say how many were received and delivered."""
        self.producer.flush(30)
        print(json.dumps({"received": self.received, "delivered": self.delivered}), flush=True)
