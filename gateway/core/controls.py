"""Control messages, client to server: their form, and how many of them there may be.

Text frames of JSON, a map with ``type`` and perhaps ``id``, which is repeated in the answer. `parse` reads one;
`ControlRate` says when there are too many, or too many that are none.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Final, NamedTuple

from gateway.core import catalogue
from gateway.core.limits import Bucket
from gateway.errors import BadMessage

MAX_CONTROL_BYTES: Final = 16_384
"""Of one control message; a longer one closes 1009."""
MAX_ID_BYTES: Final = 64
MESSAGES_PER_S: Final = 50
BURST: Final = 100
FLOOD_S: Final = 10.0
"""Who is over the rate for this long is closed with 1008; a second without is enough to begin anew."""
QUIET_S: Final = 1.0
MAX_BAD: Final = 10
BAD_WINDOW_S: Final = 60.0
"""The `MAX_BAD` th message within this time that is none closes 1008."""

Id = int | str


class Control(NamedTuple):
    """One control message."""

    kind: str
    id: Id | None
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that must be text. Raises BadMessage."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise BadMessage(f"{self.kind}: {name} must be a string", self.id)
        return value


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and infinities are not JSON (RFC 8259 6)


def parse(text: str) -> Control:
    """Read one control message. Raises BadMessage, which says what is wrong and never quotes it."""
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None
    if not isinstance(message, dict):
        raise BadMessage("not a map")
    identifier = message.get("id")
    if identifier is not None and not _is_id(identifier):
        raise BadMessage(f"id must be an integer or a string of at most {MAX_ID_BYTES} bytes")
    kind = message.get("type")
    if not isinstance(kind, str):
        raise BadMessage("type must be a string", identifier)
    return Control(kind, identifier, message)


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return len(value.encode(errors="replace")) <= MAX_ID_BYTES and value.isprintable()
    # what MessagePack holds too
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


class ControlRate:
    """How many control messages one connection has sent. All times are in seconds of one steady clock."""

    __slots__ = ("_bad", "_bucket", "_limited_at", "_limited_since")

    def __init__(self, now: float) -> None:
        self._bucket = Bucket(BURST, now)
        self._limited_since = self._limited_at = now - QUIET_S
        self._bad: deque[float] = deque(maxlen=MAX_BAD)

    def admit(self, now: float) -> bool:
        """Whether one more may be answered."""
        if self._bucket.fill(MESSAGES_PER_S, BURST, now) >= 1:
            self._bucket.take(1)
            return True
        if now - self._limited_at >= QUIET_S:
            self._limited_since = now
        self._limited_at = now
        return False

    def floods(self, now: float) -> catalogue.Close | None:
        """The close for who does not stop, None for anybody else."""
        if self._limited_at == now and now - self._limited_since >= FLOOD_S:
            return catalogue.CLOSE_MESSAGE_FLOOD
        return None

    def note_bad(self, now: float) -> catalogue.Close | None:
        """A message was none: the close when that has happened too often."""
        self._bad.append(now)
        if len(self._bad) == MAX_BAD and now - self._bad[0] < BAD_WINDOW_S:
            return catalogue.CLOSE_BAD_MESSAGES
        return None
