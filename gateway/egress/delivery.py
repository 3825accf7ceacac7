"""From a routed message to its place in the books.

`Delivery` is the `Egress` of the sessions. A message counts as in flight from the moment the producer has taken it
until Kafka's report; the report runs on the Trio thread, inside `KafkaProducer.poll`.

What Kafka refuses for good becomes a dead letter; when the dead-letter topic refuses that too, the message is
dropped, counted and logged (the place of the spool).
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException
from google.protobuf.message import DecodeError

from gateway import refusals
from gateway.core.books import UNKNOWN_TYPE
from gateway.core.ports import QueueFull
from gateway.egress.deadletter import headers

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.books import Books, Tally
    from gateway.core.ports import Lane as LanePort
    from gateway.core.ports import Origin
    from gateway.core.routing import Routes
    from gateway.egress.producer import KafkaProducer
    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Counters

SAMPLE_MASK: Final = 15
"""One delivery in 16 of a tally goes into the latency histogram: observing costs as much as the rest of a report."""

_PURGED: Final = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)  # their public spelling


class Lane:
    """One session's messages of one type, and what becomes of them."""

    __slots__ = ("_delivery", "_origin", "tally", "topic")

    def __init__(self, delivery: Delivery, origin: Origin, topic: str, tally: Tally) -> None:
        self._delivery = delivery
        self._origin = origin
        self.topic = topic
        self.tally = tally

    def on_delivery(self, error: Any, message: Any) -> None:
        """Kafka's report on one record that was sent as received and that nobody wants to be told of."""
        # hot: once a message; ints only, the rest sampled. `Report.on_delivery` counts the same way: shared code
        # would be a call more for each message.
        if error is None:
            tally = self.tally
            tally.in_flight -= 1
            tally.delivered += 1
            tally.delivered_bytes += len(message)
            if not tally.delivered & SAMPLE_MASK:
                self._delivery.observe(message.latency())
        else:
            self.report(None, 0).on_delivery(error, message)

    def report(self, original: bytes | None, index: int) -> Report:
        """What remembers more of one message: its bytes as received, where they were stamped, and its number."""
        return Report(self._delivery, self._origin, self.tally, original, index)


class Report:
    """One message on its way, with what is needed when it is refused, and when it is settled.

    ``original`` is the message as received, None where the record holds it; ``index`` its number in its connection,
    0 where nobody counts.
    """

    __slots__ = ("_delivery", "index", "origin", "original", "tally")

    def __init__(self, delivery: Delivery, origin: Origin, tally: Tally, original: bytes | None, index: int) -> None:
        self._delivery = delivery
        self.origin = origin
        self.tally = tally
        self.original = original
        self.index = index

    def on_delivery(self, error: Any, message: Any) -> None:
        """Kafka's report on the record."""
        if error is not None:
            if self.original is None:
                self.original = message.value()
            self._delivery.failed(self, error, message)
            return
        tally = self.tally
        tally.in_flight -= 1
        tally.delivered += 1
        tally.delivered_bytes += len(message)
        if not tally.delivered & SAMPLE_MASK:
            self._delivery.observe(message.latency())
        self.origin.settle(self.index)

    def on_dead_letter(self, error: Any, message: Any) -> None:
        """Kafka's report on the dead letter."""
        if error is not None:
            self._delivery.dead_letter_failed(self, error)
            return
        tally = self.tally
        tally.in_flight -= 1
        tally.dead_lettered += 1
        tally.dead_lettered_bytes += self.size
        self.origin.settle(self.index)

    @property
    def size(self) -> int:
        """Bytes of the message as received."""
        return len(self.original or b"")


class Delivery:
    """Queues records and counts their fate; the one place that changes outcomes in the books."""

    errors: tuple[type[Exception], ...] = (DecodeError, BufferError, KafkaException)

    def __init__(
        self,
        producer: KafkaProducer,
        routes: Routes,
        books: Books,
        counters: Counters,
        *,
        gateway: str,
        log_refused: RateLimited,
    ) -> None:
        self.produce = producer.produce
        self.routes = routes
        self._producer = producer
        self._books = books
        self._counters = counters
        self._gateway = gateway
        self._log_refused = log_refused
        self._deferred: deque[Callable[[], None]] = deque()

    # The Egress port

    def lane(self, origin: Origin, message_type: str) -> LanePort | None:
        """The lane for a message type, None when it has no route."""
        topic = self.routes.topics.get(message_type)
        if topic is None:
            return None
        return Lane(self, origin, topic, self._books.tally(origin.principal.company_id, message_type))

    def send(self, lane: LanePort, origin: Origin, raw: bytes, stamp: bytes, index: int) -> None:
        """Queue ``raw + stamp`` and count it. Raises QueueFull."""
        report = lane.report(raw if stamp else None, index) if stamp or index else lane
        try:
            self.produce(lane.topic, raw + stamp, origin.principal.user_id.encode(), -1, report.on_delivery)
        except BufferError:
            self._producer.note_full()
            raise QueueFull from None
        except KafkaException as error:
            self._log_refused("record refused", topic=lane.topic, error=str(error), path=origin.path)
            self._queue_dead_letter(
                Report(self, origin, lane.tally, raw, index), refusals.REASON_KAFKA_REFUSED, time.time()
            )
        _count_received(lane.tally, raw)

    def dead_letter(self, origin: Origin, raw: bytes, reason: str, index: int) -> None:
        """Queue ``raw`` for the dead-letter topic and count it. Raises QueueFull."""
        tally = self._books.tally(origin.principal.company_id, UNKNOWN_TYPE)
        self._queue_dead_letter(Report(self, origin, tally, raw, index), reason, time.time())
        _count_received(tally, raw)

    # Kafka's reports

    def observe(self, latency_s: float | None) -> None:
        """Put one delivery's time into the histogram, for all those it stands for."""
        if latency_s is not None:
            self._counters.delivery_s.observe(latency_s, SAMPLE_MASK + 1)

    def failed(self, report: Report, error: Any, message: Any) -> None:
        """A record is refused for good: make it a dead letter, or drop it when the producer was purged."""
        if error.code() in _PURGED:
            self._drop(report, refusals.DROP_DRAIN_TIMEOUT)
            return
        self._log_refused("record refused", topic=message.topic(), error=error.str(), path=report.origin.path)
        received_at = time.time() - (message.latency() or 0.0)
        self._or_later(partial(self._queue_dead_letter, report, refusals.REASON_KAFKA_REFUSED, received_at))

    def dead_letter_failed(self, report: Report, error: Any) -> None:
        """A dead letter is refused too, or purged: the message is dropped."""
        if error.code() in _PURGED:
            self._drop(report, refusals.DROP_DRAIN_TIMEOUT)
            return
        self._give_up(report, error.str())

    def retry_deferred(self) -> None:
        """Queue the dead letters that found no room while reports were being read."""
        for _ in range(len(self._deferred)):
            self._or_later(self._deferred.popleft())

    def _or_later(self, queue: Callable[[], None]) -> None:
        try:
            queue()
        except QueueFull:  # bounded by what was in flight: each failed record made room for its dead letter
            self._deferred.append(queue)

    def _queue_dead_letter(self, report: Report, reason: str, received_at: float) -> None:
        origin = report.origin
        try:
            self._producer.produce_with_headers(
                self.routes.dead_letter,
                report.original or b"",
                origin.principal.user_id.encode(),
                report.on_dead_letter,
                headers(origin, reason, received_at, self._gateway),
            )
        except BufferError:
            self._producer.note_full()
            raise QueueFull from None
        except KafkaException as error:
            self._give_up(report, str(error))
            return
        self._counters.dead_letters[reason] += 1
        origin.note_rejected(reason, report.index)

    def _give_up(self, report: Report, error: str) -> None:
        """Drop a message whose dead letter is refused too, and report it to its client, which settles it.

        Not settled when the producer has failed for good: then the client sends it again, to the next process.
        """
        self._log_refused("dead letter refused", topic=self.routes.dead_letter, error=error)
        self._drop(report, refusals.DROP_DEAD_LETTER_REFUSED)
        if not self._producer.fatal:
            report.origin.note_rejected(refusals.DROP_DEAD_LETTER_REFUSED, report.index)
            report.origin.settle(report.index)

    def _drop(self, report: Report, reason: str) -> None:
        """Count a message as dropped. It counts as in flight before, or is about to be counted by the caller."""
        tally = report.tally
        tally.in_flight -= 1
        tally.dropped += 1
        tally.dropped_bytes += report.size
        self._counters.drops[reason] += 1


def _count_received(tally: Tally, raw: bytes) -> None:
    tally.received += 1
    tally.received_bytes += len(raw)
    tally.in_flight += 1
