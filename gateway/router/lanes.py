"""The messages of one session that are on their way to one topic, oldest first.

They have one key, so they are in one partition, and an idempotent producer is answered in the order in which they were
queued: a report settles the oldest. No object is made for each message; that cost a microsecond of the four that
queueing and settling took (bench/README.md).

A lane belongs to the router: its session's loop appends to ``waiting`` (and ``indices``) what it has produced
(`gateway.router.session`), and the producer calls the lane with each report. What is not plain goes in through
`Lane.remember`.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.router.messages import Message, next_number, queued_at_ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.core.tally import Tally
    from gateway.router.messages import Sender

SAMPLE_MASK: Final = 15
"""One delivery in 16 of a tally goes into the latency histogram: observing costs as much as the rest of a report."""


class Desk(Protocol):
    """Who deals with the reports that a lane does not settle by itself."""

    def sample(self, latency_s: float | None) -> None:
        """One delivery's time, for all those it stands for."""

    def report(self, lane: Lane, error: Any, reported: Any) -> None:
        """A report on a message that is not plain, on a failure, or one out of order."""


class Lane:
    """One session's messages on their way to ``topic``; the producer calls it with each report.

    ``waiting`` holds what is under way, oldest first: the bytes of a plain message of the type that ``tally`` counts, a
    `Message` where more must be known; ``indices`` holds the numbers of the plain ones, None where the client is not
    acked. ``head`` is what such plain messages begin with, None before one was seen.
    """

    __slots__ = (
        "_desk",
        "_returned_at_ms",
        "_uncertain",
        "head",
        "indices",
        "number",
        "parked",
        "sender",
        "tally",
        "topic",
        "waiting",
    )

    def __init__(self, desk: Desk, sender: Sender, topic: str, tally: Tally, *, acked: bool, parked: bool) -> None:
        self._desk = desk
        self.sender = sender
        self.topic = topic
        self.tally = tally
        self.parked = parked
        """Its partition takes nothing at the moment: each message is looked at (`gateway.router.delivery`)."""
        self.head: bytes | None = None
        self.waiting: deque[bytes | Message] = deque()
        self.indices: deque[int] | None = deque() if acked else None
        self.number = next_number()
        self._returned_at_ms: list[int] = []
        self._uncertain = 0

    def remember(self, message: Message) -> None:
        """A record that is not plain has been queued."""
        self.waiting.append(message)

    def learn(self, head: bytes) -> None:
        """Plain messages begin like this; empty when that cannot be said."""
        self.head = head

    def note_parked(self, parked: bool) -> None:
        """Whether its partition takes nothing from now on."""
        self.parked = parked

    def __call__(self, error: Any, reported: Any, /) -> None:
        """Kafka's report on a record."""
        waiting = self.waiting
        # hot: once a message; ints only, the rest sampled. `Tally.move` says the same: calling it would cost more than
        # all of this. The comparison makes sure whose report it is, at 60 ns.
        if error is None and waiting and waiting[0] == reported.value():
            waiting.popleft()
            size = len(reported)
            tally = self.tally
            tally.in_flight -= 1
            tally.in_flight_bytes -= size
            tally.delivered += 1
            tally.delivered_bytes += size
            if not tally.delivered & SAMPLE_MASK:
                self._desk.sample(reported.latency())
            if self.indices is not None:
                self.sender.settle(self.indices.popleft())
        elif waiting:  # else it was taken back before the report came
            self._desk.report(self, error, reported)

    def take(self, value: bytes) -> Message:
        """Take out the record that was reported: the oldest one, or the first of those behind it with this value."""
        waiting = self.waiting
        at = next((at for at, entry in enumerate(waiting) if _value(entry) == value), 0)
        plain_before = sum(isinstance(entry, bytes) for entry in islice(waiting, at))
        entry = waiting[at]
        del waiting[at]
        return self._message(entry, plain_before)

    def _message(self, entry: bytes | Message, plain_before: int) -> Message:
        if isinstance(entry, Message):
            return entry
        index = None  # nobody is told
        if self.indices is not None:
            index = self.indices[plain_before]
            del self.indices[plain_before]
        return Message(self.sender, self.tally, self.topic, entry, index).queued()

    def note_returned(self, reported: Any, *, uncertain: bool) -> None:
        """The producer has handed a record back. Which one does not matter: all of them come back (`reclaim`)."""
        self._returned_at_ms.append(queued_at_ms(reported))
        self._uncertain += uncertain

    @property
    def returned(self) -> int:
        """Records that the producer has handed back since `reclaim`."""
        return len(self._returned_at_ms)

    def reclaim(self) -> Iterator[Message]:
        """All records under way, in the order in which they came; each knows whether Kafka may have it already.

        They count as ``returned`` until the last one has been taken.

        librdkafka's purge reports those it had begun to send behind those it had not, in whatever number it came to.
        """
        entries = tuple(self.waiting)
        self.waiting.clear()
        times = sorted(self._returned_at_ms)
        unreported = len(entries) - len(times)
        uncertain = self._uncertain + unreported
        times = [min(times, default=0)] * unreported + times
        for position, entry in enumerate(entries):
            message = self._message(entry, 0)
            message.reclaim(times[position], uncertain=position < uncertain)
            yield message
        self._returned_at_ms, self._uncertain = [], 0


def _value(entry: bytes | Message) -> bytes:
    return entry if isinstance(entry, bytes) else entry.value
