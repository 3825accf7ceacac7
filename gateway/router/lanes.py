"""What remembers a record between the producer and Kafka's report on it.

A `Lane` stands for all records of one session to one topic. They have one key, so they are in one partition, and an
idempotent producer is answered in the order in which they were queued: what is under way waits in the lane in that
order, and a report settles the oldest. No object is made for each message; that cost a microsecond of the four that
queueing and settling took (bench/README.md).

A `Report` stands for a single record: a stamped one, a dead letter, a replayed one, and whatever is queued again.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from gateway.kafka.faults import may_be_written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.core.books import Tally
    from gateway.core.ports import Origin
    from gateway.router.delivery import Delivery

SAMPLE_MASK: Final = 15
"""One delivery in 16 of a tally goes into the latency histogram: observing costs as much as the rest of a report."""

Headers = list[tuple[str, bytes]]


class Report:
    """One message on its way, with what is needed when it is refused, and when it is settled.

    ``original`` is the message as received, ``stamp`` what was appended to it; ``index`` its number in its connection,
    0 where nobody counts; ``headers`` are there once it is a dead letter; ``number`` orders what is queued again.
    """

    __slots__ = (
        "_delivery",
        "headers",
        "index",
        "number",
        "origin",
        "original",
        "received_at_ms",
        "stamp",
        "tally",
    )

    def __init__(
        self, delivery: Delivery, origin: Origin, tally: Tally, original: bytes, index: int, stamp: bytes = b""
    ) -> None:
        self._delivery = delivery
        self.origin = origin
        self.tally = tally
        self.original = original
        self.index = index
        self.stamp = stamp
        self.headers: Headers | None = None
        self.number = delivery.next_number()
        self.received_at_ms = 0
        """Known once it has failed, for the record that follows; milliseconds since the epoch."""

    def on_delivery(self, error: Any, message: Any) -> None:
        """Kafka's report on the record, or on the dead letter."""
        if error is not None:
            self.received_at_ms = self.received_at_ms or received_at_ms(message)
            self._delivery.failed(self, error, message)
            return
        tally, size = self.tally, self.size
        tally.in_flight -= 1
        tally.in_flight_bytes -= size
        if self.headers is None:
            tally.delivered += 1
            tally.delivered_bytes += size
            if not tally.delivered & SAMPLE_MASK:
                self._delivery.observe(message.latency())
        else:
            tally.dead_lettered += 1
            tally.dead_lettered_bytes += size
            self._delivery.note_dead_lettered(self)
        self.origin.settle(self.index)

    @property
    def record(self) -> bytes:
        """The value that was queued for the message's topic."""
        return self.original + self.stamp

    @property
    def size(self) -> int:
        """Bytes of the message as received."""
        return len(self.original)


class Lane:
    """One session's messages of one type on their way to their topic; the producer calls it with each report.

    ``waiting`` holds the messages under way, oldest first: the bytes of a plain one, its `Report` where more must be
    known; ``indices`` the numbers of the plain ones where the client is acked. Types that share a topic share both,
    ``beside`` being the lane of the first of them: it takes their reports, and what is not its own is not ``plain``.
    """

    __slots__ = (
        "_beside",
        "_delivery",
        "_origin",
        "_returned_at_ms",
        "_uncertain",
        "head",
        "indices",
        "number",
        "plain",
        "tally",
        "topic",
        "waiting",
    )

    def __init__(
        self, delivery: Delivery, origin: Origin, topic: str, tally: Tally, *, acked: bool, beside: Lane | None = None
    ) -> None:
        self._delivery = delivery
        self._origin = origin
        self.topic = topic
        self.tally = tally
        self._beside = beside
        self.plain = beside is None
        self.head: bytes | None = None
        self.waiting: deque[bytes | Report] = deque() if beside is None else beside.waiting
        self.indices: deque[int] | None = deque() if acked else None
        self.number = delivery.next_number()
        self._returned_at_ms: list[int] = []
        self._uncertain = 0

    @property
    def reports_to(self) -> Lane:
        """What the producer calls with the reports on this lane's records."""
        return self._beside or self

    def remember(self, raw: bytes, stamp: bytes, index: int) -> None:
        """A record has been queued."""
        if self._beside is not None or stamp:
            self.waiting.append(Report(self._delivery, self._origin, self.tally, raw, index, stamp))
            return
        self.waiting.append(raw)
        if self.indices is not None:
            self.indices.append(index)

    def __call__(self, error: Any, message: Any, /) -> None:
        """Kafka's report on a record."""
        waiting = self.waiting
        # hot: once a message; ints only, the rest sampled. `Report.on_delivery` counts the same way: shared code would
        # be a call more for each message. The comparison makes sure whose report it is, at 60 ns.
        if error is None and waiting and waiting[0] == message.value():
            waiting.popleft()
            size = len(message)
            tally = self.tally
            tally.in_flight -= 1
            tally.in_flight_bytes -= size
            tally.delivered += 1
            tally.delivered_bytes += size
            if not tally.delivered & SAMPLE_MASK:
                self._delivery.observe(message.latency())
            if self.indices is not None:
                self._origin.settle(self.indices.popleft())
        elif waiting:  # else it was given up before the report came
            self._reported(error, message)

    def _reported(self, error: Any, message: Any) -> None:
        """A report on a stamped record, a failure, or one out of order: a topic has got more partitions."""
        if error is not None and self._delivery.hands_back(error, message):
            # Which record it is does not matter: all of them come back, and in another order (`take_back`).
            self._returned_at_ms.append(received_at_ms(message))
            self._uncertain += may_be_written(error.code())
            self._delivery.note_returned(self)
        else:
            self._take(message.value()).on_delivery(error, message)

    def _take(self, value: bytes) -> Report:
        """Take the record that was reported out of those that wait."""
        waiting = self.waiting
        at = next((at for at, entry in enumerate(waiting) if _record(entry) == value), 0)
        plain_before = sum(isinstance(entry, bytes) for entry in islice(waiting, at))
        entry = waiting[at]
        del waiting[at]
        return self._report(entry, plain_before)

    def _report(self, entry: bytes | Report, plain_before: int) -> Report:
        if isinstance(entry, Report):
            return entry
        index = 0
        if self.indices is not None:
            index = self.indices[plain_before]
            del self.indices[plain_before]
        return Report(self._delivery, self._origin, self.tally, entry, index)

    @property
    def returned(self) -> int:
        """Records that the producer has handed back since `take_back`."""
        return len(self._returned_at_ms)

    def take_back(self) -> Iterator[tuple[Report, bool]]:
        """All records under way, in the order in which they came, and whether Kafka may have each already.

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
            report = self._report(entry, 0)
            report.number = self._delivery.next_number()
            report.received_at_ms = report.received_at_ms or times[position]
            yield report, position < uncertain
        self._returned_at_ms, self._uncertain = [], 0


def _record(entry: bytes | Report) -> bytes:
    return entry if isinstance(entry, bytes) else entry.record


def received_at_ms(message: Any) -> int:
    """When a reported record was queued, milliseconds since the epoch."""
    return int((time.time() - (message.latency() or 0.0)) * 1000)
