"""From a message that was judged to its place in the books.

`Delivery` does what the table of fates says (`gateway.router.fates`). A message counts as in flight from the moment
when it has been taken until Kafka's report, or until the spool has it; reports run on the Trio thread, inside
`KafkaProducer.poll`.

What Kafka refuses for good becomes a dead letter; when the dead-letter topic refuses that too, and when a drain has
waited long enough (`Delivery.abandon`), it goes to the spool; without a spool it is dropped, counted and logged. What a
broken producer hands back is queued again with the next one, in the order in which it came.

What waits for room is bounded by what was in flight: it is in the waitlist (`gateway.router.waitlist`), or parked with
its partition (`gateway.router.parking`).
"""

from __future__ import annotations

import math
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from confluent_kafka import KafkaException

from gateway.core import catalogue
from gateway.core.books import UNKNOWN_TYPE
from gateway.core.catalogue import Becomes
from gateway.core.holds import PRODUCER_FULL, NoHolds
from gateway.kafka.faults import Fault, fault_of, may_be_written, refuses_record
from gateway.router import deadletters
from gateway.router.fates import PLACES, WAITING, Event, State
from gateway.router.lanes import SAMPLE_MASK, Lane
from gateway.router.messages import Message
from gateway.router.parking import Parking
from gateway.router.spool.writer import SpoolWriter, record_of
from gateway.router.waitlist import Waitlist

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.books import Books
    from gateway.core.catalogue import Reason
    from gateway.core.holds import Holds
    from gateway.core.routes import Routes
    from gateway.kafka.partitioner import TopicPartition
    from gateway.kafka.producer import KafkaProducer, Produce
    from gateway.router.messages import Sender
    from gateway.router.spool.records import Record
    from gateway.router.spool.segments import Spool
    from gateway.telemetry.logging import RateLimited
    from gateway.telemetry.metrics import Metrics

# long: all that the table of fates asks for, in one class: each step leads to the next

MESSAGES_AT_ONCE: Final = 2000
"""Messages queued again, or given up, between two chances for other tasks: some 10 ms."""
BUCKETS_S: Final = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Room(Enum):
    """Whether a message was taken."""

    TAKEN = "it is in the books from now on"
    NONE = "everybody has to wait, and offer it again"
    ALONE = "this sender has to wait until `Sender.go_on`, and offer it again: its partition takes nothing"


class Delivery:
    """Queues messages and counts their fate: the owner of the producer, the desk of the lanes."""

    def __init__(
        self,
        producer: KafkaProducer,
        routes: Routes,
        books: Books,
        metrics: Metrics,
        *,
        gateway: str,
        log_failed: RateLimited,
        log_spool: RateLimited | None = None,
        spool: Spool | None = None,
        holds: Holds | None = None,
    ) -> None:
        """``gateway`` names this one in dead letters; ``log_failed`` takes lines about records that fail, ``log_spool``
        those about a spool that takes nothing."""
        self._declare(metrics)
        self._producer = producer
        self._routes = routes
        self._books = books
        self._gateway = gateway
        self._holds = NoHolds() if holds is None else holds
        self._log_failed = log_failed
        self.spool = (
            None
            if spool is None
            else SpoolWriter(
                spool,
                written=lambda message: self._happens(message, Event.WRITTEN),
                offer_again=self._offer_again,
                holds=self._holds,
                log_fault=log_spool or log_failed,
            )
        )
        self.edition = 0
        """Changes whenever what a session knows of routes and of its lanes must be looked up anew."""
        self.lost = 0
        """Messages dropped by `abandon` because there was no spool."""
        self._abandoning = False
        self._abandoned = False
        """`abandon` is done: what is reported now comes too late for it."""
        self._waitlist = Waitlist(lambda message: self._happens(message, Event.HANDED_BACK))
        self._parking = Parking(producer.cluster.partition_counts)
        producer.attach(self)

    def _declare(self, metrics: Metrics) -> None:
        letters, given_up = catalogue.reasons(Becomes.DEAD_LETTER), catalogue.reasons(Becomes.SPOOLED)
        dropped = catalogue.reasons(Becomes.SPOOLED, Becomes.DROPPED)
        self._dead_letters = metrics.labelled(
            "gateway_dead_letters", "Messages in the dead-letter topic.", "reason", letters
        )
        self._attempts = metrics.labelled(
            "gateway_dead_letter_attempts",
            "Dead letters handed to the producer, again after a failure.",
            "reason",
            letters,
        )
        self._spooled = metrics.labelled("gateway_spooled", "Messages written to the spool.", "reason", given_up)
        self._drops = metrics.labelled("gateway_drops", "Messages dropped.", "reason", dropped)
        self._latency_s = metrics.histogram(
            "gateway_delivery_seconds", "From receive to Kafka's acknowledgement.", BUCKETS_S
        )

    def __len__(self) -> int:
        """Messages that Kafka has not answered for and that are not in the spool's hands."""
        return len(self._producer) + len(self._waitlist) + len(self._parking)

    @property
    def waiting_alone(self) -> int:
        """Messages that connections keep back because their user's partition takes nothing."""
        return self._parking.backlog

    @property
    def parked_types(self) -> dict[str, int]:
        """How many messages of each type are parked: Kafka is not asked to confirm these."""
        return self._parking.types

    @property
    def routes(self) -> Routes:
        """The table of the moment."""
        return self._routes

    def use_routes(self, routes: Routes) -> None:
        """Route by another table from now on; what is in flight keeps its topic."""
        self._routes = routes
        self.edition += 1

    # Taking messages

    @property
    def produce(self) -> Produce:
        """The producer's own method for new plain messages; whoever calls it does the rest (`gateway.router.lanes`)."""
        return self._producer.produce

    def open_lane(self, sender: Sender, topic: str, message_type: str, *, acked: bool) -> Lane:
        """The lane for what ``sender`` has for ``topic``; its plain messages are those of ``message_type``."""
        tally = self._books.tally(sender.principal.company_id, message_type)
        return Lane(self, sender, topic, tally, acked=acked, parked=self._find_parked(sender, topic) is not None)

    def look_again(self, lane: Lane) -> None:
        """Let a lane know whether its partition takes anything: another `edition` has begun."""
        lane.note_parked(self._find_parked(lane.sender, lane.topic) is not None)

    def send(self, lane: Lane, message_type: str, raw: bytes, stamp: bytes, index: int) -> Room:
        """Queue ``raw + stamp``; what Kafka can never take becomes a dead letter. ``index`` is for `Sender.settle`."""
        sender = lane.sender
        room = self._room(sender, lane.topic)
        if room is not Room.TAKEN:
            return room
        tally = self._books.tally(sender.principal.company_id, message_type)
        message = Message(sender, tally, lane.topic, raw, index, stamp)
        event = self._offer(message, lane)
        if event is Event.TAKEN:
            lane.remember(message)
        return self._take(message, event)

    def dead_letter(self, sender: Sender, raw: bytes, reason: Reason, index: int) -> Room:
        """Queue ``raw`` for the dead-letter topic because it was judged so."""
        room = self._room(sender, self._routes.dead_letter)
        if room is not Room.TAKEN:
            return room
        tally = self._books.tally(sender.principal.company_id, UNKNOWN_TYPE)
        message = Message(sender, tally, self._routes.dead_letter, raw, index)
        message.happens(Event.REFUSED)
        self._make_dead_letter(message, reason)
        return self._take(message, self._offer(message, partial(self._reported, message)))

    def drop(self, sender: Sender, reason: Reason, count: int, size: int) -> None:
        """``count`` messages of ``size`` bytes together were over a limit: nobody has looked at them."""
        self._books.tally(sender.principal.company_id, UNKNOWN_TYPE).drop(count, size)
        self._drops.add(reason, count)

    def replay(self, record: Record, sender: Sender) -> bool:
        """Queue a spooled record again; false when there is no room."""
        if self._room(sender, record.topic) is not Room.TAKEN:
            return False
        tally = self._books.tally(record.company_id, record.message_type)
        raw, stamp = record.value[: record.original_bytes], record.value[record.original_bytes :]
        message = Message(sender, tally, record.topic, raw, None, stamp)
        message.received_from_spool(record.received_at_ms)
        if record.headers is not None:
            message.happens(Event.REFUSED)
            message.become_dead_letter(record.topic, deadletters.reason_of(record.headers), record.headers)
            message.note_told()
        return self._take(message, self._offer(message, partial(self._reported, message))) is Room.TAKEN

    def _room(self, sender: Sender, topic: str) -> Room:
        """Whether anything new may be queued: nothing overtakes older messages that wait for room."""
        partition = self._find_parked(sender, topic)
        if partition is not None and not self._abandoning:
            self._parking.add_waiter(partition, sender)
            return Room.ALONE
        if self._waitlist:
            self._producer.note_full()
            return Room.NONE
        return Room.TAKEN

    def _find_parked(self, sender: Sender, topic: str) -> TopicPartition | None:
        return self._parking.find(topic, sender.principal.user_id.encode()) if self._parking else None

    def _take(self, message: Message, event: Event | None) -> Room:
        """Count a new message, if there was room for it, and let ``event`` happen to it."""
        if event is None:
            return Room.NONE
        message.tally.receive(message.size)
        self._happens(message, event)
        self._advance_or_defer(message)
        return Room.TAKEN

    def _offer(self, message: Message, report: Callable[[Any, Any], None]) -> Event | None:
        """Offer a message to the producer: what that makes of it, None when there is no room."""
        if self._abandoning:
            return Event.ABANDONED
        # A dead letter's CreateTime is now, or brokers that are strict about it would refuse it for ever.
        created_at_ms = message.received_at_ms if message.headers is None else 0
        try:
            self._producer.queue(message.topic, message.value, message.key, report, message.headers, created_at_ms)
        except BufferError:
            self._producer.note_full()
            return None
        except KafkaException as failure:
            error = failure.args[0]
            fault = self._fault(error, message.topic)
            if fault in (Fault.PRODUCER, Fault.TOPIC):
                self._producer.note_fault(fault, error, message.topic)
                return None
            self._log_failure(message, error)
            return Event.REFUSED
        return Event.TAKEN

    # The table of fates at work

    def _happens(self, message: Message, event: Event) -> None:
        """Let ``event`` happen to a message, and do what its new state means."""
        state = message.happens(event)
        if state is State.DEAD_LETTER_DUE and message.headers is None:
            self._make_dead_letter(message, catalogue.REASON_KAFKA_REFUSED)
        elif state is State.DEAD_LETTER_QUEUED:
            self._tell_rejected(message)
        elif state is State.SPOOLING:
            self._give_up(message, event)
        elif state in PLACES:
            self._settle(message)

    def _make_dead_letter(self, message: Message, reason: Reason) -> None:
        headers = deadletters.headers(message, reason, self._gateway)
        message.become_dead_letter(self._routes.dead_letter, reason, headers)

    def _tell_rejected(self, message: Message) -> None:
        """Its sender hears once that a message became a dead letter."""
        if message.reason is not None and not message.told:
            message.note_told()
            self._attempts.add(message.reason)
            message.sender.note_rejected(message.reason, message.index)

    def _give_up(self, message: Message, event: Event) -> None:
        """Kafka will not have it: spool it, unless that is where it came from and it may stay there."""
        abandoned = event is Event.ABANDONED
        message.give_up(catalogue.GIVEN_UP_DRAIN_TIMEOUT if abandoned else catalogue.GIVEN_UP_DEAD_LETTER_REFUSED)
        if abandoned and message.sender.keep():
            self._account(message, message.happens(Event.WRITTEN))
            return
        if abandoned or self.spool is not None:
            self._tell_rejected(message)
        if self.spool is None:
            self._happens(message, Event.NO_SPOOL)
        else:
            self.spool.add(record_of(message), message)

    def _settle(self, message: Message) -> None:
        """A message has reached its last place."""
        state = message.state
        self._account(message, state)
        if state is State.DROPPED:
            if message.given_up is catalogue.GIVEN_UP_DRAIN_TIMEOUT:
                self.lost += 1
                return  # never settled: its client must send it again
            message.sender.note_rejected(catalogue.GIVEN_UP_DEAD_LETTER_REFUSED, message.index)
        message.sender.settle(message.index)

    def _account(self, message: Message, state: State) -> None:
        message.tally.move("in_flight", PLACES[state], message.size)
        if state is State.DEAD_LETTERED and message.headers is not None:
            self._dead_letters.add(deadletters.reason_of(message.headers))
        elif state is State.SPOOLED and message.given_up is not None:
            self._spooled.add(message.given_up)
        elif state is State.DROPPED and message.given_up is not None:
            self._drops.add(message.given_up)

    def _advance(self, message: Message) -> bool:
        """Queue a message that waits to be queued, or find its next place; false when there is no room for it."""
        while message.state in WAITING:
            partition = self._find_parked(message.sender, message.topic)
            if partition is not None and not self._abandoning:
                self._parking.add_waiter(partition, message.sender)
                self._parking.add(message)
                return True
            event = self._offer(message, partial(self._reported, message))
            if event is None:
                return False
            self._happens(message, event)
        return True

    def _advance_or_defer(self, message: Message) -> None:
        if not self._advance(
            message
        ):  # bounded by what was in flight: each failed record made room for what follows it
            self._waitlist.defer(message)

    def _offer_again(self, message: Message) -> bool:
        """Whether Kafka, by now, takes what the spool does not; never once Kafka is not asked any longer."""
        if self._abandoning:
            return False
        partition = self._find_parked(message.sender, message.topic)
        event = None if partition is not None else self._offer(message, partial(self._reported, message))
        if event is None:
            return False
        self._happens(message, Event.OFFERED_AGAIN)
        self._happens(message, event)
        return True

    # Kafka's reports

    def sample(self, latency_s: float | None) -> None:
        """Put one delivery's time into the histogram, for all those it stands for."""
        if latency_s is not None:
            self._latency_s.observe(latency_s, SAMPLE_MASK + 1)

    def report(self, lane: Lane, error: Any, reported: Any) -> None:
        """Kafka's report on a record of a lane: it is not plain, has failed, or is out of order."""
        if error is not None and self._is_producer_failure(error, reported):
            lane.note_returned(reported, uncertain=may_be_written(error.code()))
            self._waitlist.add_lane(lane)
            self._producer.count_failure()
        else:
            self._reported(lane.take(reported.value()), error, reported)

    def _reported(self, message: Message, error: Any, reported: Any) -> None:
        """Kafka's report on a single record."""
        if error is None:
            self._happens(message, Event.CONFIRMED)
            if message.state is State.DELIVERED and not message.tally.delivered & SAMPLE_MASK:
                self.sample(reported.latency())
            return
        message.fail(reported, uncertain=may_be_written(error.code()))
        if self._is_producer_failure(error, reported):
            self._happens(message, Event.HANDED_BACK)
            self._waitlist.add([message])
        elif self._abandoned:
            self._happens(message, Event.ABANDONED)
        else:
            self._log_failure(message, error)
            self._happens(message, Event.REFUSED)
            self._advance_or_defer(message)
        self._producer.count_failure()

    def _is_producer_failure(self, error: Any, reported: Any) -> bool:
        """Whether a failure is not the record's: it is to be queued again, or given up.

        Once the drain has given up, late reports are not gathered: each goes on at once.
        """
        topic = reported.topic() or ""
        fault, final = self._fault(error, topic), refuses_record(error.code())
        if fault is Fault.BATCH and self._producer.sends_alone(len(reported.value() or b"")):
            fault, final = Fault.RECORD, True
        if fault is not Fault.RECORD and fault is not Fault.PURGED:
            self._producer.note_fault(fault, error, topic)
        if self._abandoned:
            return False
        return self._abandoning or fault is not Fault.RECORD or (bool(self._producer.broken) and not final)

    def _fault(self, error: Any, topic: str) -> Fault:
        """Whose fault ``error`` is. Nobody waits for a topic that no route names: an old record's is its own."""
        fault = fault_of(error.code())
        return Fault.RECORD if fault is Fault.TOPIC and topic not in self._routes.all_topics() else fault

    def _log_failure(self, message: Message, error: Any) -> None:
        if message.headers is None:
            self._log_failed("record failed", topic=message.topic, error=error.str(), path=message.sender.path)
        else:
            self._log_failed("dead letter failed", topic=message.topic, error=error.str())

    # What waits for room

    def queue_again(self) -> bool:
        """Queue in order some of what waits for room; true while more is left (`gateway.kafka.producer.Owner`)."""
        if self._producer.broken or self._abandoning:
            return True
        if not self._waitlist.sort_some(MESSAGES_AT_ONCE):
            return True
        ready = self._waitlist.ready
        for _ in range(min(len(ready), MESSAGES_AT_ONCE)):
            try:
                if not self._advance(ready[0]):
                    return True
            except Exception:  # the barrier around each message: it counts as in flight, so the drain names it
                ready.popleft()
                raise
            ready.popleft()
        return bool(ready)

    def note_unwritable(self, partitions: frozenset[TopicPartition]) -> None:
        """Park these partitions, and reopen those that are not among them: what was parked goes first, in order."""
        for partition in partitions - self._parking.partitions:
            self._parking.park(partition)
        waiters = [
            waiter for partition in self._parking.partitions - partitions for waiter in self._parking.reopen(partition)
        ]
        self._waitlist.add(self._parking.take_all())
        self.edition += 1
        if self._waitlist:
            self._producer.note_full()  # nothing new is handed over, and overtakes it, before it has been queued
        for waiter in waiters:
            waiter.go_on()

    # The end of waiting

    async def abandon(self, deadline: float = math.inf) -> None:
        """Wait for Kafka no longer: what it has not confirmed, and whatever is handed over from now on, is spooled.

        Some ten microseconds a message, other tasks run meanwhile. What has not been reported half-way to ``deadline``
        (Trio's seconds), or once reports have ceased to come (`KafkaProducer.purge`), stays in flight until its report.
        """
        self._abandoning = True
        self._holds.hold(PRODUCER_FULL)  # what was read is handed over at the end, behind what waits here
        self._producer.take_nothing_new()
        now = trio.current_time()
        with trio.CancelScope(deadline=now + (deadline - now) / 2):
            await self._producer.purge()
        with trio.CancelScope(deadline=deadline):
            self.note_unwritable(frozenset())
            while self._waitlist:  # reports go on coming
                while not self._waitlist.sort_some(MESSAGES_AT_ONCE):
                    await trio.lowlevel.checkpoint()
                ready = self._waitlist.ready
                while ready:
                    for _ in range(min(len(ready), MESSAGES_AT_ONCE)):
                        self._advance(ready.popleft())
                    await trio.lowlevel.checkpoint()
        self._abandoned = True
        self._holds.release(PRODUCER_FULL)  # nobody waits for room any longer
