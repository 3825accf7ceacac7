"""Builds tokens, good and bad, without a library's help where a library would refuse to."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

from gateway.v1.token_pb2 import SubscriptionTier, UserToken


def b64(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def data_claim(user_id: str = "alice", company_id: str = "acme", **fields: Any) -> str:
    """The ``data`` claim."""
    fields.setdefault("subscription_tier", SubscriptionTier.TIER_PRO)
    return b64(UserToken(user_id=user_id, company_id=company_id, **fields).SerializeToString())


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims; a change to None removes the claim."""
    now = int(time.time())
    good = {"sub": "alice", "iss": "api-gateway", "iat": now, "exp": now + 600, "data": data_claim()}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def sign(secret: bytes, payload: dict[str, Any] | bytes, header: dict[str, Any] | bytes | None = None) -> str:
    """An HS256-signed token over any header and payload, raw bytes included."""
    if header is None:
        header = {"alg": "HS256", "typ": "JWT"}
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    text = f"{b64(parts[0])}.{b64(parts[1])}"
    return f"{text}.{b64(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"
