"""Every refusal the gateway gives, as data: one catalogue for HTTP answers, close codes and dead letters.

To change what a client is told, or whether it may try again, change it here; metrics and logs take
their labels from the same entries, so the set of label values is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer to a handshake.

    ``code`` is the snake_case word of the JSON body and the metric label; ``headers`` are sent besides
    the common ones; ``retry_after_s`` is the default of ``Retry-After`` where the answer carries it.
    """

    code: str
    status: int
    message: str
    retryable: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """A close frame the server sends (RFC 6455 7.4); ``name`` is the metric label, ``reason`` goes on the wire."""

    name: str
    code: int
    reason: str
    retryable: bool


_UPGRADE = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
_INVALID_TOKEN = (("WWW-Authenticate", 'Bearer error="invalid_token"'),)

BAD_REQUEST: Final = Refusal("bad_request", 400, "The request is malformed.")
BAD_KEY: Final = Refusal("bad_websocket_key", 400, "Sec-WebSocket-Key must be one base64 value of 16 bytes.")
BAD_HOST: Final = Refusal("bad_host", 400, "Exactly one valid Host header is required.")
BAD_ACCOUNT: Final = Refusal(
    "bad_account", 400, "account must be 1 to 64 of letters, digits, dot, underscore and hyphen, given once."
)
BODY_NOT_ALLOWED: Final = Refusal("body_not_allowed", 400, "A WebSocket handshake carries no body.")
INVALID_TOKEN: Final = Refusal("invalid_token", 401, "A valid bearer token is required.", headers=_INVALID_TOKEN)
ORIGIN_NOT_ALLOWED: Final = Refusal("origin_not_allowed", 403, "This Origin is not allowed.")
NOT_FOUND: Final = Refusal("not_found", 404, "There is nothing at this path.")
METHOD_NOT_ALLOWED: Final = Refusal(
    "method_not_allowed", 405, "A WebSocket handshake is a GET.", headers=(("Allow", "GET"),)
)
HANDSHAKE_TIMEOUT: Final = Refusal(
    "handshake_timeout", 408, "The request did not arrive whole in time.", retryable=True
)
TARGET_TOO_LONG: Final = Refusal("target_too_long", 414, "The request target is longer than 8 KiB.")
UPGRADE_REQUIRED: Final = Refusal(
    "upgrade_required", 426, "Only WebSocket (RFC 6455, version 13) is served here.", headers=_UPGRADE
)
TOO_MANY_ATTEMPTS: Final = Refusal(
    "too_many_attempts", 429, "Too many handshakes from this address.", retryable=True, retry_after_s=1
)
HEAD_TOO_LARGE: Final = Refusal("head_too_large", 431, "The request head is too large.")
STARTING: Final = Refusal("starting", 503, "The gateway has not reached Kafka yet.", retryable=True, retry_after_s=2)
DRAINING: Final = Refusal("draining", 503, "The gateway is shutting down.", retryable=True, retry_after_s=5)
AT_CAPACITY: Final = Refusal("at_capacity", 503, "The connection cap is reached.", retryable=True, retry_after_s=5)
VERSION_NOT_SUPPORTED: Final = Refusal("http_version_not_supported", 505, "Only HTTP/1.1 is served here.")

REFUSALS: Final = (
    BAD_REQUEST,
    BAD_KEY,
    BAD_HOST,
    BAD_ACCOUNT,
    BODY_NOT_ALLOWED,
    INVALID_TOKEN,
    ORIGIN_NOT_ALLOWED,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    HANDSHAKE_TIMEOUT,
    TARGET_TOO_LONG,
    UPGRADE_REQUIRED,
    TOO_MANY_ATTEMPTS,
    HEAD_TOO_LARGE,
    STARTING,
    DRAINING,
    AT_CAPACITY,
    VERSION_NOT_SUPPORTED,
)

CLOSE_PROTOCOL_ERROR: Final = Close("protocol_error", 1002, "protocol error", retryable=False)
CLOSE_TEXT: Final = Close("text_frame", 1003, "binary messages only", retryable=False)
CLOSE_BAD_UTF8: Final = Close("bad_utf8", 1007, "invalid UTF-8", retryable=False)
CLOSE_CONTROL_FLOOD: Final = Close("control_flood", 1008, "too many control frames", retryable=True)
CLOSE_TOO_BIG: Final = Close("too_big", 1009, "message too big", retryable=False)
CLOSE_INTERNAL: Final = Close("internal_error", 1011, "internal error", retryable=True)
CLOSE_RESTART: Final = Close("restart", 1012, "service restart", retryable=True)
CLOSE_TOKEN_EXPIRED: Final = Close("token_expired", 4401, "token expired", retryable=True)
CLOSE_IDLE: Final = Close("idle", 4408, "no pong or data for too long", retryable=True)

REASON_NOT_AN_ENVELOPE: Final = "not_an_envelope"
REASON_UNKNOWN_TYPE: Final = "unknown_message_type"
REASON_FOREIGN_USER: Final = "user_id_mismatch"
REASON_FOREIGN_COMPANY: Final = "company_id_mismatch"
REASON_KAFKA_REFUSED: Final = "kafka_refused"
REASON_OTHER: Final = "other"
"""A dead letter out of the spool whose reason this version does not know."""

DEAD_LETTER_REASONS: Final = (
    REASON_NOT_AN_ENVELOPE,
    REASON_UNKNOWN_TYPE,
    REASON_FOREIGN_USER,
    REASON_FOREIGN_COMPANY,
    REASON_KAFKA_REFUSED,
    REASON_OTHER,
)

GIVEN_UP_DEAD_LETTER_REFUSED: Final = "dead_letter_refused"
"""Kafka refused the record and its dead letter."""
GIVEN_UP_DRAIN_TIMEOUT: Final = "drain_timeout"
"""Still unconfirmed when the drain ran out of time."""
GIVEN_UP_REASONS: Final = (GIVEN_UP_DEAD_LETTER_REFUSED, GIVEN_UP_DRAIN_TIMEOUT)
"""Why a message is spooled, or dropped where there is no spool."""
