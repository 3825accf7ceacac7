"""A message in flight, where more must be known of it than its bytes."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, Protocol

from gateway.router import fates
from gateway.router.fates import State

if TYPE_CHECKING:
    from gateway.core.catalogue import Reason
    from gateway.core.principal import Principal
    from gateway.core.tally import Tally
    from gateway.router.fates import Event

Headers = list[tuple[str, bytes]]
"""A record's headers."""

next_number = itertools.count(1).__next__
"""Numbers of messages and lanes, in the order in which they came, over the whole process."""


class Sender(Protocol):
    """Who a message came from: a connection, or a segment of the spool."""

    @property
    def connection_id(self) -> str: ...
    @property
    def principal(self) -> Principal: ...
    @property
    def path(self) -> str: ...
    @property
    def backlog(self) -> int:
        """Messages that were read and not handed over yet."""

    def settle(self, index: int | None, /) -> None:
        """Message ``index`` of this sender is in Kafka, in the spool, or dropped and reported."""

    def note_rejected(self, reason: Reason, index: int | None, /) -> None:
        """Message ``index`` of this sender has become a dead letter, or was dropped."""

    def wait_alone(self) -> None:
        """Hand over nothing until `go_on`: this user's partition takes nothing at the moment."""

    def go_on(self) -> None:
        """Hand over what has gathered since `wait_alone`."""

    def keep(self) -> bool:
        """Whether a message that Kafka is not waited for any longer still is where it came from; nobody waits for it
        then."""


class Message:
    """One message on its way, from the moment when it was taken until its fate is known.

    ``original`` is the message as received, ``stamp`` what was appended to it, ``index`` its number in its sender, None
    where it has none there. ``headers`` are there once it is a dead letter, and ``reason`` says why; ``given_up`` why
    Kafka will not have it. ``number`` orders what is queued again. ``received_at_ms`` is known once it has failed, in
    milliseconds since the epoch, 0 before. ``uncertain``: Kafka may have it already, for all that its last failure
    says. ``told``: its sender knows that it was rejected.
    """

    __slots__ = (
        "given_up",
        "headers",
        "index",
        "number",
        "original",
        "reason",
        "received_at_ms",
        "sender",
        "stamp",
        "state",
        "tally",
        "told",
        "topic",
        "uncertain",
    )

    def __init__(
        self, sender: Sender, tally: Tally, topic: str, original: bytes, index: int | None, stamp: bytes = b""
    ) -> None:
        self.sender = sender
        self.tally = tally
        self.topic = topic
        self.original = original
        self.index = index
        self.stamp = stamp
        self.state = State.NEW
        self.headers: Headers | None = None
        self.reason: Reason | None = None
        self.given_up: Reason | None = None
        self.number = next_number()
        self.received_at_ms = 0
        self.uncertain = False
        self.told = False

    def queued(self) -> Message:
        """The same message, which the producer has already."""
        self.state = State.QUEUED
        return self

    def happens(self, event: Event) -> State:
        """Change its state by the table; returns the new one. Raises ImpossibleFate."""
        self.state = fates.after(self.state, event)
        return self.state

    def become_dead_letter(self, topic: str, reason: Reason, headers: Headers) -> None:
        """It goes to the dead-letter ``topic`` from now on, as it was received."""
        self.topic, self.reason, self.headers = topic, reason, headers

    def give_up(self, reason: Reason) -> None:
        """Kafka will not have it, for ``reason``."""
        self.given_up = reason

    def fail(self, reported: Any, *, uncertain: bool) -> None:
        """Its record has failed; ``reported`` says when it had been queued, ``uncertain`` whether Kafka may have it."""
        self.received_at_ms = self.received_at_ms or queued_at_ms(reported)
        self.uncertain = uncertain

    def reclaim(self, received_at_ms: int, *, uncertain: bool) -> None:
        """It has been taken back: it is behind all that were taken back before it."""
        self.number = next_number()
        self.received_at_ms = self.received_at_ms or received_at_ms
        self.uncertain = uncertain

    def received_from_spool(self, received_at_ms: int) -> None:
        """It was received in an earlier life of the gateway, at ``received_at_ms``."""
        self.received_at_ms = received_at_ms

    def note_told(self) -> None:
        """Its sender knows that it was rejected."""
        self.told = True

    @property
    def key(self) -> bytes:
        """The key of its record: the user."""
        return self.sender.principal.user_id.encode()

    @property
    def value(self) -> bytes:
        """The value of its record: a dead letter has none but what was received."""
        return self.original + self.stamp if self.headers is None else self.original

    @property
    def size(self) -> int:
        """Bytes of the message as received."""
        return len(self.original)

    @property
    def arrived_at_ms(self) -> int:
        """When it was received, or now where that is not known; milliseconds since the epoch."""
        return self.received_at_ms or time.time_ns() // 1_000_000


def queued_at_ms(reported: Any) -> int:
    """When a reported record was queued, milliseconds since the epoch."""
    return int((time.time() - (reported.latency() or 0.0)) * 1000)
