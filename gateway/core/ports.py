"""What the ingress side needs of the Kafka side, and the other way round.

`ingress` and `egress` never import each other: `gateway.daemon.run` joins them through these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable

    from gateway.core.books import Tally
    from gateway.core.principal import Principal


class QueueFull(Exception):  # a condition the caller waits out, not an error
    """The producer's queue has no room; the message was not taken and must be offered again."""


class Parked(QueueFull):
    """Only this connection has to wait: its user's partition takes nothing at the moment. `Origin.go_on` ends it."""


class Origin(Protocol):
    """The connection a message came from, as delivery reports and dead letters need it."""

    @property
    def connection_id(self) -> str: ...
    @property
    def principal(self) -> Principal: ...
    @property
    def path(self) -> str: ...
    @property
    def backlog(self) -> int:
        """Messages that were read and not handed over yet."""

    def settle(self, index: int, /) -> None:
        """Message ``index`` of this connection is in Kafka, in the spool, or dropped and reported; 0 is nobody's."""

    def note_rejected(self, reason: str, index: int, /) -> None:
        """Message ``index`` of this connection has become a dead letter, or was dropped."""

    def wait_alone(self) -> None:
        """Hand over nothing until `go_on`: this user's partition takes nothing at the moment."""

    def go_on(self) -> None:
        """Hand over what has gathered since `wait_alone`."""


class Lane(Protocol):
    """One connection's messages of one type on their way to one topic.

    Called with Kafka's report, it moves the oldest message from ``tally.in_flight`` to its outcome.
    """

    topic: str
    tally: Tally
    plain: bool
    """Whether `Egress.produce` may be used, with the lane as its callback and ``waiting`` told of the message."""
    head: bytes | None
    """The session's own note: what such messages begin with (`gateway.core.envelope.head`), None before it knows."""

    @property
    def waiting(self) -> deque[Any]:
        """Messages as received that are under way, oldest first."""

    @property
    def indices(self) -> deque[int] | None:
        """Their numbers for `Origin.settle`, None where the client is not acked."""

    def __call__(self, error: Any, message: Any, /) -> None:
        """What the producer calls with (error, message) when Kafka has answered."""


class Egress(Protocol):
    """The Kafka side as a session sees it. Everything here is synchronous and runs on the Trio thread."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What parsing an envelope or `produce` may raise for a message that was not taken."""

    @property
    def produce(self) -> Callable[[str, bytes, bytes, int, Callable[[Any, Any], None]], None]:
        """Queue one record (topic, value, key, partition, on_delivery); raises one of ``errors``.

        The caller counts the message into ``lane.tally``; `send` is the same with everything around it.
        """

    def lane(self, origin: Origin, message_type: str, others: Iterable[Any], *, acked: bool) -> Lane | None:
        """The lane for a message type, None when it has no route; ``others`` are those the connection has."""

    def send(self, lane: Any, origin: Origin, raw: bytes, stamp: bytes, index: int) -> None:
        """Queue ``raw + stamp`` and count it; what Kafka can never take becomes a dead letter. Raises QueueFull.

        ``index`` is the message's number for `Origin.settle`, 0 where the client does not count.
        """

    def dead_letter(self, origin: Origin, raw: bytes, reason: str, index: int) -> None:
        """Queue ``raw`` for the dead-letter topic and count it. Raises QueueFull."""
