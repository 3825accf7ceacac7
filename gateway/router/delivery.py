"""From a routed message to its place in the books.

`Delivery` is the `Egress` of the sessions. A message counts as in flight from the moment the producer has taken it
until Kafka's report, or until the spool has it; reports run on the Trio thread, inside `KafkaProducer.poll`.

What Kafka refuses for good becomes a dead letter; when the dead-letter topic refuses that too, and when a drain has
waited long enough (`give_up`), it goes to the spool; without a spool it is dropped, counted and logged. What a broken
producer hands back is queued again with the next one, in the order in which it came (`gateway.router.lanes`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio
from confluent_kafka import KafkaException
from google.protobuf.message import DecodeError

from gateway.core import catalogue
from gateway.core.books import UNKNOWN_TYPE
from gateway.core.catalogue import Reason
from gateway.core.ports import Parked, QueueFull
from gateway.kafka.faults import Fault, fault_of, may_be_written, refuses_record
from gateway.router.deadletters import headers
from gateway.router.lanes import SAMPLE_MASK, Lane, Report
from gateway.router.parking import Parking
from gateway.router.spool.segments import Record
from gateway.router.spool.writer import SpooledOrigin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gateway.core.books import Books, Tally
    from gateway.core.ports import Origin
    from gateway.core.routes import Routes
    from gateway.kafka.producer import KafkaProducer, Produce
    from gateway.router.lanes import Headers
    from gateway.router.parking import TopicPartition
    from gateway.router.spool.writer import SpoolWriter
    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Counters

RECORDS_AT_ONCE: Final = 2000
"""Messages queued again, or given up, between two chances for other tasks: some 10 ms."""


class _Onward(NamedTuple):
    """A message's next step."""

    report: Report
    topic: str
    go: Callable[[], None]


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
        spool: SpoolWriter | None = None,
    ) -> None:
        self.routes = routes
        self.lost = 0
        """Messages dropped by `give_up` because there was no spool."""
        self._producer = producer
        self._books = books
        self._counters = counters
        self._gateway = gateway
        self._log_refused = log_refused
        self._spool = spool
        self._given_up = False
        self._gave_up = False
        """`give_up` is done: what is reported now comes too late for it."""
        self.next_number = itertools.count(1).__next__
        self._returned: dict[Lane, None] = {}
        self._handed_back: list[_Onward] = []
        self._deferred: deque[_Onward] = deque()
        self._taking: Iterator[None] | None = None
        self._parking = Parking(producer.partition_counts)
        self._parked: deque[_Onward] = deque()
        self.parked_types: Counter[str] = Counter()
        """How many messages of each type are parked: Kafka is not asked to confirm these."""
        self.on_parked: Callable[[], None] = lambda: None
        """Sessions are to open their lanes anew: other partitions are parked now."""
        producer.after_poll = self._retry_deferred
        producer.on_unwritable = self._park

    def __len__(self) -> int:
        """Messages that Kafka has not answered for and that are not in the spool's hands."""
        returned = sum(lane.returned for lane in self._returned)
        waiting = returned + len(self._handed_back) + len(self._deferred) + len(self._parked)
        return len(self._producer) + waiting

    @property
    def waiting_alone(self) -> int:
        """Messages that connections keep back because their user's partition takes nothing."""
        return self._parking.backlog

    # The Egress port

    @property
    def produce(self) -> Produce:
        """The producer's own method for new messages."""
        return self._producer.produce

    def lane(self, origin: Origin, message_type: str, others: Iterable[Lane], *, acked: bool) -> Lane | None:
        """The lane for a message type, None when it has no route."""
        topic = self.routes.topics.get(message_type)
        if topic is None:
            return None
        tally = self._books.tally(origin.principal.company_id, message_type)
        beside = next((other for other in others if other.plain and other.topic == topic), None)
        lane = Lane(self, origin, topic, tally, acked=acked, beside=beside)
        if self._parking.find(topic, origin.principal.user_id.encode()):
            lane.plain = False  # `send` has a look at each message then
        return lane

    def send(self, lane: Lane, origin: Origin, raw: bytes, stamp: bytes, index: int) -> None:
        """Queue ``raw + stamp`` and count it. Raises QueueFull."""
        self._check_turn(origin, lane.topic)
        if self._given_up:
            self._put_aside(Report(self, origin, lane.tally, raw, index, stamp), lane.topic, raw + stamp, False)
        else:
            try:
                self._queue(origin, lane.topic, raw + stamp, lane.reports_to)
            except KafkaException as error:
                self._log_refused("record refused", topic=lane.topic, error=str(error), path=origin.path)
                self._queue_dead_letter(Report(self, origin, lane.tally, raw, index), catalogue.REASON_KAFKA_REFUSED)
            else:
                lane.remember(raw, stamp, index)
        _count_received(lane.tally, raw)

    def dead_letter(self, origin: Origin, raw: bytes, reason: str, index: int) -> None:
        """Queue ``raw`` for the dead-letter topic and count it. Raises QueueFull."""
        self._check_turn(origin, self.routes.dead_letter)
        tally = self._books.tally(origin.principal.company_id, UNKNOWN_TYPE)
        self._queue_dead_letter(Report(self, origin, tally, raw, index), reason)
        _count_received(tally, raw)

    # The spool's side

    def replay(self, record: Record, origin: SpooledOrigin) -> None:
        """Queue a spooled record again and count it as received. Raises QueueFull."""
        self._check_turn(origin, record.topic)
        tally = self._books.tally(record.company_id, record.message_type)
        raw = record.value[: record.original_bytes]
        report = Report(self, origin, tally, raw, 1)
        report.headers = record.headers
        report.received_at_ms = record.received_at_ms
        try:
            self._produce(report, record.topic, record.value)
        except KafkaException as error:
            self._refused(report, record.topic, error.args[0])
        _count_received(tally, raw)

    async def give_up(self, deadline: float = math.inf) -> None:
        """Wait for Kafka no longer: what it has not confirmed, and whatever is handed over from now on, is spooled.

        Some ten microseconds a message, other tasks run meanwhile. What has not been reported half-way to ``deadline``
        (Trio's seconds), or once reports have ceased to come (`KafkaProducer.purge`), stays in flight until its report.
        """
        self._given_up = True
        self._producer.take_nothing_new()
        now = trio.current_time()
        with trio.CancelScope(deadline=now + (deadline - now) / 2):
            await self._producer.purge()
        with trio.CancelScope(deadline=deadline):
            self._park(frozenset())
            while self._deferred or self._handed_back or self._returned:  # reports go on coming
                while not self._take_some_back():
                    await trio.lowlevel.checkpoint()
                while self._deferred:
                    for _ in range(min(len(self._deferred), RECORDS_AT_ONCE)):
                        self._deferred.popleft().go()
                    await trio.lowlevel.checkpoint()
        self._gave_up = True

    # Kafka's reports

    def observe(self, latency_s: float | None) -> None:
        """Put one delivery's time into the histogram, for all those it stands for."""
        if latency_s is not None:
            self._counters.delivery_s.observe(latency_s, SAMPLE_MASK + 1)

    def hands_back(self, error: Any, message: Any) -> bool:
        """Whether a failure is not the record's: it is to be queued again, or given up.

        Once the drain has given up, late reports are not gathered: each goes on at once.
        """
        topic = message.topic() or ""
        fault, final = self._fault(error, topic), refuses_record(error.code())
        if fault is Fault.BATCH and self._producer.sends_alone(len(message.value() or b"")):
            fault, final = Fault.RECORD, True
        if fault is not Fault.RECORD and fault is not Fault.PURGED:
            self._producer.note_fault(fault, error, topic)
        if self._gave_up:
            return False
        return self._given_up or fault is not Fault.RECORD or (bool(self._producer.broken) and not final)

    def _fault(self, error: Any, topic: str) -> Fault:
        """Whose fault ``error`` is. Nobody waits for a topic that no route names: an old record's is its own."""
        fault = fault_of(error.code())
        return Fault.RECORD if fault is Fault.TOPIC and topic not in self.routes.all_topics() else fault

    def note_returned(self, lane: Lane) -> None:
        """``lane`` has got a record back."""
        self._returned[lane] = None
        self._producer.count_failure()

    def note_dead_lettered(self, report: Report) -> None:
        """The dead-letter topic has a message."""
        assert report.headers is not None  # noqa: S101  # the caller's case
        reason = Reason.of(dict(report.headers).get("reason", b"").decode(errors="replace"))
        self._counters.dead_letters[reason] += 1

    def failed(self, report: Report, error: Any, message: Any) -> None:
        """A record will not get through: find its next place."""
        topic = message.topic()
        if self.hands_back(error, message):
            self._hand_back(report, topic, message.value() or b"", may_be_written(error.code()))
        elif self._gave_up:
            self._put_aside(report, topic, message.value() or b"", may_be_written(error.code()))
        else:
            self._refused(report, topic, error)
        self._producer.count_failure()

    def _hand_back(self, report: Report, topic: str, value: bytes, uncertain: bool) -> None:
        self._handed_back.append(_Onward(report, topic, partial(self._produce, report, topic, value, uncertain)))

    def _refused(self, report: Report, topic: str, error: Any) -> None:
        """Kafka refuses a record for good: make it a dead letter, or spool that."""
        if report.headers is not None:
            self._dead_letter_refused(report, error.str())
            return
        self._log_refused("record refused", topic=topic, error=error.str(), path=report.origin.path)
        go = partial(self._queue_dead_letter, report, catalogue.REASON_KAFKA_REFUSED)
        self._or_later(_Onward(report, self.routes.dead_letter, go))

    # Onward

    def _check_turn(self, origin: Origin, topic: str) -> None:
        """Raise QueueFull while older messages wait for room: nothing new may overtake them.

        Parked when only those of the user's own partition do.
        """
        partition = self._parking.find(topic, origin.principal.user_id.encode()) if self._parking else None
        if partition is not None and not self._given_up:
            self._parking.add_waiter(partition, origin)
            raise Parked
        if self._deferred or self._handed_back or self._returned:
            self._producer.note_full()
            raise QueueFull

    def _produce(self, report: Report, topic: str, value: bytes, uncertain: bool = False) -> None:
        """Queue a record or a dead letter. Raises QueueFull, and KafkaException for what Kafka can never take."""
        partition = self._parking.find(topic, report.origin.principal.user_id.encode()) if self._parking else None
        if self._given_up:
            self._put_aside(report, topic, value, uncertain)
        elif partition is not None:
            self._parking.add_waiter(partition, report.origin)
            self._parked.append(_Onward(report, topic, partial(self._produce, report, topic, value, uncertain)))
            self.parked_types[report.tally.message_type] += 1
        else:
            # A dead letter's CreateTime is now, or brokers that are strict about it would refuse it for ever.
            received_at_ms = report.received_at_ms if report.headers is None else 0
            self._queue(report.origin, topic, value, report.on_delivery, report.headers, received_at_ms)

    def _queue(
        self,
        origin: Origin,
        topic: str,
        value: bytes,
        on_delivery: Callable[[Any, Any], None],
        headers: Headers | None = None,
        received_at_ms: int = 0,
    ) -> None:
        """Queue a record. Raises QueueFull, and KafkaException for what Kafka can never take."""
        key = origin.principal.user_id.encode()
        try:
            self._producer.queue(topic, value, key, on_delivery, headers, received_at_ms)
        except BufferError:
            self._producer.note_full()
            raise QueueFull from None
        except KafkaException as error:
            fault = self._fault(error.args[0], topic)
            if fault in (Fault.PRODUCER, Fault.TOPIC):
                self._producer.note_fault(fault, error.args[0], topic)
                raise QueueFull from None
            raise

    def _queue_dead_letter(self, report: Report, reason: str) -> None:
        origin = report.origin
        report.headers = headers(origin, reason, report.received_at_ms or time.time_ns() // 1_000_000, self._gateway)
        try:
            self._produce(report, self.routes.dead_letter, report.original)
        except QueueFull:
            report.headers = None
            raise
        except KafkaException as error:
            self._dead_letter_refused(report, error.args[0].str())
            if self._spool is None:
                return
        self._counters.dead_letter_attempts[reason] += 1
        origin.note_rejected(reason, report.index)

    def _dead_letter_refused(self, report: Report, error: str) -> None:
        topic = self.routes.dead_letter
        self._log_refused("dead letter refused", topic=topic, error=error)
        reason = catalogue.GIVEN_UP_DEAD_LETTER_REFUSED
        if self._spool is not None:
            self._to_spool(self._spool, report, topic, report.original, reason, uncertain=False)
            return
        self._drop(report, reason)
        report.origin.note_rejected(reason, report.index)  # dropped and reported: that settles it
        report.origin.settle(report.index)

    def _put_aside(self, report: Report, topic: str, value: bytes, uncertain: bool) -> None:
        """Spool a message that the drain gives up; without a spool drop it, never settled."""
        reason = catalogue.GIVEN_UP_DRAIN_TIMEOUT
        if isinstance(report.origin, SpooledOrigin):
            self._count_spooled(report, reason)  # where it came from it still is
            report.origin.keep()
        elif self._spool is not None:
            self._to_spool(self._spool, report, topic, value, reason, uncertain)
        else:
            self.lost += 1
            self._drop(report, reason)

    def _to_spool(
        self, spool: SpoolWriter, report: Report, topic: str, value: bytes, reason: str, uncertain: bool
    ) -> None:
        origin = report.origin
        principal = origin.principal
        record = Record(
            topic=topic,
            key=principal.user_id.encode(),
            value=value,
            original_bytes=report.size,
            headers=report.headers,
            user_id=principal.user_id,
            company_id=principal.company_id,
            message_type=report.tally.message_type,
            path=origin.path,
            connection_id=origin.connection_id,
            received_at_ms=report.received_at_ms or time.time_ns() // 1_000_000,
            reason=reason,
            uncertain=uncertain,
        )

        def done() -> None:
            self._count_spooled(report, reason)
            origin.settle(report.index)

        spool.add(record, done, partial(self._offer_again, report, topic, value))

    def _offer_again(self, report: Report, topic: str, value: bytes) -> None:
        """Kafka may take by now what the spool does not. Raises QueueFull, also once Kafka is not asked any longer."""
        if self._given_up:
            raise QueueFull
        try:
            self._produce(report, topic, value)
        except KafkaException as error:
            self._refused(report, topic, error.args[0])

    def _count_spooled(self, report: Report, reason: str) -> None:
        tally = report.tally
        tally.in_flight -= 1
        tally.in_flight_bytes -= report.size
        tally.spooled += 1
        tally.spooled_bytes += report.size
        self._counters.spooled[reason] += 1

    def _drop(self, report: Report, reason: str) -> None:
        """Count a message as dropped. It counts as in flight before, or is about to be counted by the caller."""
        tally = report.tally
        tally.in_flight -= 1
        tally.in_flight_bytes -= report.size
        tally.dropped += 1
        tally.dropped_bytes += report.size
        self._counters.drops[reason] += 1

    # What waits for room

    def _or_later(self, onward: _Onward) -> None:
        try:
            onward.go()
        except QueueFull:  # bounded by what was in flight: each failed record made room for what follows it
            self._deferred.append(onward)

    def _retry_deferred(self) -> bool:
        """Queue in order some of what found no room before; true while more is left."""
        if self._producer.broken or self._given_up:
            return True
        if not self._take_some_back():
            return True
        deferred = self._deferred
        for _ in range(min(len(deferred), RECORDS_AT_ONCE)):
            onward = deferred[0]
            try:
                onward.go()
            except QueueFull:
                return True
            except KafkaException as error:  # the record was taken once; it is not now
                self._refused(onward.report, onward.topic, error.args[0])
            except Exception:  # the barrier around each message: it counts as in flight, so the drain names it
                deferred.popleft()
                raise
            deferred.popleft()
        return bool(deferred)

    def _park(self, partitions: frozenset[TopicPartition]) -> None:
        """Park these partitions, and reopen those that are not among them: what was parked goes first, in order."""
        for partition in partitions - self._parking.partitions:
            self._parking.park(partition)
        waiters = [
            waiter for partition in self._parking.partitions - partitions for waiter in self._parking.reopen(partition)
        ]
        self._handed_back += self._parked
        self._parked.clear()
        self.parked_types.clear()
        self.on_parked()
        for waiter in waiters:
            waiter.go_on()  # behind what was parked: `_check_turn`

    def _take_some_back(self) -> bool:
        """Go on with `_take_back`; false when there is more to do."""
        if self._taking is None:
            if not (self._handed_back or self._returned):
                return True
            self._taking = self._take_back()
        for _ in range(RECORDS_AT_ONCE):
            if next(self._taking, self) is self:
                self._taking = None
                return True
        return False

    def _take_back(self) -> Iterator[None]:
        """Put what the producer handed back, and what still waits, into the order in which it came; a record a step."""
        while self._returned:
            for lane in sorted(self._returned, key=lambda lane: lane.number):
                for report, uncertain in lane.take_back():
                    self._hand_back(report, lane.topic, report.record, uncertain)
                    yield
                del self._returned[lane]
        self._deferred = deque(sorted((*self._handed_back, *self._deferred), key=lambda one: one.report.number))
        self._handed_back.clear()


def _count_received(tally: Tally, raw: bytes) -> None:
    tally.received += 1
    tally.received_bytes += len(raw)
    tally.in_flight += 1
    tally.in_flight_bytes += len(raw)
