"""Which topic a message type goes to: the operator's table, checked when it is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}\Z")  # Kafka: Topic.LEGAL_CHARS, MAX_NAME_LENGTH

DEFAULT_ROUTES: Final = {
    "tick_data": "tick-data",
    "user_event": "user-events",
    "trading_signal": "trading-signals",
    "notification": "notifications",
}
DEFAULT_DEAD_LETTER_TOPIC: Final = "failed-messages"


def check_topic(name: str) -> str:
    """Return ``name``; raise ValueError unless Kafka allows it as a topic name."""
    if not _TOPIC.match(name) or name in {".", ".."}:
        raise ValueError(f"{name!r} is not a Kafka topic name (1-249 of letters, digits, '.', '_', '-')")
    return name


@dataclass(frozen=True, slots=True)
class Routes:
    """message_type to topic, and the topic of what cannot be routed.

    A message type is looked up, never used as a name: what a client writes there cannot choose a topic.
    """

    topics: Mapping[str, str]
    dead_letter: str

    def all_topics(self) -> list[str]:
        """Every topic that must exist, sorted."""
        return sorted({*self.topics.values(), self.dead_letter})
