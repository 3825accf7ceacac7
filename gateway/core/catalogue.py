"""Everything the gateway says no with, as data: HTTP refusals, close codes, reasons of dead letters and of giving up.

An entry registers itself when it is made, so there is no list beside the entries. The labels of metrics, the HTTP
phrases, what a client does when it is told so (`Advice`) and the tables in README.md are all read out of it. To change
what a client is told, or whether it tries again, change the entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

# long: the one list of all that is said no with

T = TypeVar("T")


class Advice(Enum):
    """What a client does that was told so; the value is the word in README's tables."""

    NEVER = "no"
    """It would be told the same again."""
    AFTER_FIX = "after a fix"
    """Once the client, or its configuration, has been changed."""
    NEW_TOKEN = "with a new token"  # noqa: S105  # a word for people
    LATER = "later"
    """The same attempt may succeed: after ``Retry-After``, after ``reconnect_after_ms``, with growing delays."""

    @property
    def reconnects(self) -> bool:
        """Whether a client whose connection ended so comes back, with a new token if need be."""
        return self in (Advice.NEW_TOKEN, Advice.LATER)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer to a handshake.

    ``code`` is the snake_case word of the JSON body and the metric label; ``headers`` are sent besides
    the common ones; ``retry_after_s`` is the default of ``Retry-After`` where the answer carries it; ``authenticated``
    says that it is given to verified users only.
    """

    code: str
    status: HTTPStatus
    message: str
    advice: Advice
    headers: tuple[tuple[str, str], ...] = ()
    retry_after_s: int | None = None
    authenticated: bool = False

    registered: ClassVar[dict[str, Refusal]] = {}
    """Every refusal by its code."""

    def __post_init__(self) -> None:
        _register(Refusal.registered, self.code, self)

    @property
    def blames_client(self) -> bool:
        """Whether what the client sent is the reason, so that it counts against its address."""
        if self.authenticated:
            return False
        return self.advice is not Advice.LATER or self.status is HTTPStatus.REQUEST_TIMEOUT

    @property
    def phrase(self) -> str:
        """The status' reason phrase; 414's is RFC 9110's, which Python has from 3.13 on."""
        return "URI Too Long" if self.status is HTTPStatus.REQUEST_URI_TOO_LONG else self.status.phrase


@dataclass(frozen=True, slots=True)
class Close:
    """A close frame (RFC 6455 7.4); ``name`` is the metric label, ``reason`` goes on the wire.

    ``sent`` is false for codes that this version never sends and its client understands.
    """

    name: str
    code: int
    reason: str
    advice: Advice
    sent: bool = True

    registered: ClassVar[dict[str, Close]] = {}
    """Every close by its name."""

    def __post_init__(self) -> None:
        _register(Close.registered, self.name, self)


class Becomes(Enum):
    """What becomes of a message that does not go where its client wanted it; the value is the word in README's
    table."""

    DEAD_LETTER = "a dead letter"
    SPOOLED = "spooled, or dropped"
    """Dropped where there is no spool."""
    DROPPED = "dropped"
    """As it came: nobody has looked at it."""


class Reason(str):
    """Why a message did not go where its client wanted it: the word that headers, notices, logs and metric labels show.

    ``scope`` is what a ``throttle`` notice says of a message that was dropped over a limit: ``user`` or ``company``.
    """

    __slots__ = ("becomes", "scope", "text")
    text: str
    becomes: Becomes
    scope: str

    registered: ClassVar[dict[str, Reason]] = {}
    """Every reason by its word."""

    def __new__(
        cls, word: str, text: str, becomes: Becomes = Becomes.DEAD_LETTER, *, scope: str = ""
    ) -> Reason:  # registered as such
        """Make an entry and register it."""
        reason = super().__new__(cls, word)
        reason.text = text
        reason.becomes = becomes
        reason.scope = scope
        _register(Reason.registered, word, reason)
        return reason

    @staticmethod
    def of(word: str) -> Reason:
        """The reason with this word; `REASON_OTHER` for one that this version does not know."""
        return Reason.registered.get(word, REASON_OTHER)


def _register(entries: dict[str, T], name: str, entry: T) -> None:
    if name in entries:
        raise ValueError(f"{name} is in the catalogue already")
    entries[name] = entry


_UPGRADE = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
_INVALID_TOKEN = (("WWW-Authenticate", 'Bearer error="invalid_token"'),)

BAD_REQUEST: Final = Refusal("bad_request", HTTPStatus.BAD_REQUEST, "The request is malformed.", Advice.AFTER_FIX)
BAD_KEY: Final = Refusal(
    "bad_websocket_key",
    HTTPStatus.BAD_REQUEST,
    "Sec-WebSocket-Key must be one base64 value of 16 bytes.",
    Advice.AFTER_FIX,
)
BAD_HOST: Final = Refusal(
    "bad_host", HTTPStatus.BAD_REQUEST, "Exactly one valid Host header is required.", Advice.AFTER_FIX
)
BAD_ACCOUNT: Final = Refusal(
    "bad_account",
    HTTPStatus.BAD_REQUEST,
    "account must be 1 to 64 of letters, digits, dot, underscore and hyphen, given once.",
    Advice.AFTER_FIX,
)
BODY_NOT_ALLOWED: Final = Refusal(
    "body_not_allowed", HTTPStatus.BAD_REQUEST, "A WebSocket handshake carries no body.", Advice.AFTER_FIX
)
INVALID_TOKEN: Final = Refusal(
    "invalid_token",
    HTTPStatus.UNAUTHORIZED,
    "A valid bearer token is required.",
    Advice.NEW_TOKEN,
    headers=_INVALID_TOKEN,
)
ORIGIN_NOT_ALLOWED: Final = Refusal(
    "origin_not_allowed", HTTPStatus.FORBIDDEN, "This Origin is not allowed.", Advice.AFTER_FIX
)
NOT_FOUND: Final = Refusal("not_found", HTTPStatus.NOT_FOUND, "There is nothing at this path.", Advice.AFTER_FIX)
METHOD_NOT_ALLOWED: Final = Refusal(
    "method_not_allowed",
    HTTPStatus.METHOD_NOT_ALLOWED,
    "A WebSocket handshake is a GET.",
    Advice.AFTER_FIX,
    headers=(("Allow", "GET"),),
)
HANDSHAKE_TIMEOUT: Final = Refusal(
    "handshake_timeout", HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive whole in time.", Advice.LATER
)
TARGET_TOO_LONG: Final = Refusal(
    "target_too_long",
    HTTPStatus.REQUEST_URI_TOO_LONG,
    "The request target is longer than 8 KiB.",
    Advice.AFTER_FIX,
)
UPGRADE_REQUIRED: Final = Refusal(
    "upgrade_required",
    HTTPStatus.UPGRADE_REQUIRED,
    "Only WebSocket (RFC 6455, version 13) is served here.",
    Advice.AFTER_FIX,
    headers=_UPGRADE,
)
TOO_MANY_USERS: Final = Refusal(
    "too_many_users",
    HTTPStatus.FORBIDDEN,
    "As many users of this company are connected as its tier allows.",
    Advice.AFTER_FIX,
    authenticated=True,
)
TOO_MANY_ACCOUNTS: Final = Refusal(
    "too_many_accounts",
    HTTPStatus.FORBIDDEN,
    "As many MT5 accounts of this company, or of this user, are connected as its tier allows.",
    Advice.AFTER_FIX,
    authenticated=True,
)
BANNED: Final = Refusal(
    "banned",
    HTTPStatus.TOO_MANY_REQUESTS,
    "Too much of what came from here was refused.",
    Advice.LATER,
    retry_after_s=60,
)
TOO_MANY_CONNECTIONS: Final = Refusal(
    "too_many_connections",
    HTTPStatus.TOO_MANY_REQUESTS,
    "As many connections of this address are open as may be.",
    Advice.LATER,
    retry_after_s=5,
)
TOO_MANY_ATTEMPTS: Final = Refusal(
    "too_many_attempts",
    HTTPStatus.TOO_MANY_REQUESTS,
    "Too many handshakes from this address.",
    Advice.LATER,
    retry_after_s=1,
)
HEAD_TOO_LARGE: Final = Refusal(
    "head_too_large",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "The request head is too large.",
    Advice.AFTER_FIX,
)
STARTING: Final = Refusal(
    "starting",
    HTTPStatus.SERVICE_UNAVAILABLE,
    "The gateway has not reached Kafka yet.",
    Advice.LATER,
    retry_after_s=2,
)
DRAINING: Final = Refusal(
    "draining", HTTPStatus.SERVICE_UNAVAILABLE, "The gateway is shutting down.", Advice.LATER, retry_after_s=5
)
AT_CAPACITY: Final = Refusal(
    "at_capacity", HTTPStatus.SERVICE_UNAVAILABLE, "The connection cap is reached.", Advice.LATER, retry_after_s=5
)
OVERLOADED: Final = Refusal(
    "overloaded", HTTPStatus.SERVICE_UNAVAILABLE, "The gateway is short of memory.", Advice.LATER, retry_after_s=10
)
REGISTRY_UNAVAILABLE: Final = Refusal(
    "registry_unavailable",
    HTTPStatus.SERVICE_UNAVAILABLE,
    "Limits cannot be checked at the moment.",
    Advice.LATER,
    retry_after_s=5,
)
VERSION_NOT_SUPPORTED: Final = Refusal(
    "http_version_not_supported",
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
    "Only HTTP/1.1 is served here.",
    Advice.AFTER_FIX,
)

CLOSE_PROTOCOL_ERROR: Final = Close("protocol_error", 1002, "protocol error", Advice.AFTER_FIX)
CLOSE_TEXT: Final = Close("text_frame", 1003, "binary messages only", Advice.AFTER_FIX)
CLOSE_BAD_UTF8: Final = Close("bad_utf8", 1007, "invalid UTF-8", Advice.AFTER_FIX)
CLOSE_CONTROL_FLOOD: Final = Close("control_flood", 1008, "too many control frames", Advice.LATER)
CLOSE_MESSAGE_FLOOD: Final = Close("message_flood", 1008, "too many control messages", Advice.LATER)
CLOSE_BAD_MESSAGES: Final = Close("bad_messages", 1008, "too many malformed control messages", Advice.LATER)
CLOSE_BANNED: Final = Close("banned", 1008, "banned: too many messages were refused", Advice.LATER)
CLOSE_TOO_BIG: Final = Close("too_big", 1009, "message too big", Advice.AFTER_FIX)
CLOSE_INTERNAL: Final = Close("internal_error", 1011, "internal error", Advice.LATER)
CLOSE_RESTART: Final = Close("restart", 1012, "service restart", Advice.LATER)
CLOSE_TLS_FAILED: Final = Close("tls_failed", 1015, "TLS handshake failed", Advice.AFTER_FIX, sent=False)
CLOSE_TOKEN_EXPIRED: Final = Close("token_expired", 4401, "token expired", Advice.NEW_TOKEN)
CLOSE_TOKEN_REVOKED: Final = Close("token_revoked", 4401, "token revoked", Advice.NEW_TOKEN)
CLOSE_SUSPENDED: Final = Close("suspended", 4403, "company suspended or unpaid", Advice.NEVER, sent=False)
CLOSE_IDLE: Final = Close("idle", 4408, "no pong or data for too long", Advice.LATER)
CLOSE_REPLACED: Final = Close("replaced", 4429, "replaced: a newer connection, or a lower limit", Advice.LATER)

REASON_NOT_AN_ENVELOPE: Final = Reason("not_an_envelope", "the bytes are not a MessageEnvelope")
REASON_UNKNOWN_TYPE: Final = Reason("unknown_message_type", "no route names its message_type")
REASON_FOREIGN_USER: Final = Reason("user_id_mismatch", "its user_id is not the token's")
REASON_FOREIGN_COMPANY: Final = Reason("company_id_mismatch", "its company_id is not the token's")
REASON_KAFKA_REFUSED: Final = Reason("kafka_refused", "Kafka will never take the record")
REASON_OTHER: Final = Reason("other", "a dead letter out of the spool whose reason this version does not know")

GIVEN_UP_DEAD_LETTER_REFUSED: Final = Reason(
    "dead_letter_refused", "Kafka refused the record and its dead letter", Becomes.SPOOLED
)
GIVEN_UP_DRAIN_TIMEOUT: Final = Reason(
    "drain_timeout", "still unconfirmed when the drain ran out of time", Becomes.SPOOLED
)

DROPPED_RATE: Final = Reason("rate_limited", "over the user's rate", Becomes.DROPPED, scope="user")
DROPPED_COMPANY_RATE: Final = Reason(
    "company_rate_limited", "over a rate of its company", Becomes.DROPPED, scope="company"
)
DROPPED_COMPANY_BUDGET: Final = Reason(
    "company_budget_spent", "over its company's bytes of a day or a month", Becomes.DROPPED, scope="company"
)


def refusal_advice(status: int, code: object) -> Advice:
    """What to do about a handshake that was answered with ``status`` and ``code``, whoever answered it.

    A status that no refusal has is a balancer's or a proxy's, and may pass.
    """
    entry = Refusal.registered.get(code) if isinstance(code, str) else None  # a proxy's body may hold anything
    if entry is not None and entry.status == status:
        return entry.advice
    return next((one.advice for one in Refusal.registered.values() if one.status == status), Advice.LATER)


def close_advice(code: int) -> Advice:
    """What to do about a connection that ended with close ``code``: one that no entry has may pass."""
    return next((one.advice for one in Close.registered.values() if one.code == code), Advice.LATER)


def refusal_codes() -> list[str]:
    """The codes of all refusals, in the catalogue's order."""
    return list(Refusal.registered)


def close_names() -> list[str]:
    """The names of the closes that are sent."""
    return [close.name for close in Close.registered.values() if close.sent]


def reasons(*becomes: Becomes) -> list[str]:
    """The words of the reasons for which one of these becomes of a message."""
    return [str(reason) for reason in Reason.registered.values() if reason.becomes in becomes]


def tables() -> dict[str, str]:
    """The Markdown tables of README.md by their names there: refusals, closes and reasons."""
    refusals = sorted(Refusal.registered.values(), key=lambda one: one.status)
    closes = sorted(Close.registered.values(), key=lambda one: one.code)
    return {
        "refusals": _table(
            ("status", "code", "means", "try again?"),
            ((str(one.status.value), f"`{one.code}`", one.message, one.advice.value) for one in refusals),
        ),
        "closes": _table(
            ("code", "means", "reconnect?"),
            ((str(one.code), one.reason, one.advice.value) for one in closes if one.sent),
        ),
        "reasons": _table(
            ("reason", "means", "becomes"),
            ((f"`{one}`", one.text, one.becomes.value) for one in Reason.registered.values()),
        ),
    }


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (heads, ("---",) * len(heads), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
