"""confluent-kafka's producer on Trio: its queue, its reports, and how a broken one is replaced.

``full`` lasts from a BufferError until a quarter of what was queued then has gone; it is a hold (`gateway.core.holds`)
until `KafkaProducer.take_nothing_new`.

An idempotent producer can fail for good (fenced, out of sequence), or wait for ever for a producer id; a batch can be
too large for its topic, or be refused for one of its records; a topic can be gone, or closed to the gateway. It is
``broken`` then, until another one has taken its place (`_renew`): the old one is purged, its reports hand everything it
held back to its `Owner` in order, and that queues it again, once all topics are there. What was under way may then be
in Kafka twice.

Delivery reports are read by one task calling ``poll(0)`` on the Trio thread, so everything they touch lives on one
thread and needs no lock.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio
from confluent_kafka import KafkaError, KafkaException, Producer

from gateway.core.backoff import Doubling
from gateway.core.holds import PRODUCER_FULL, NoHolds
from gateway.errors import GatewayError, NoThread, StartupError
from gateway.kafka.faults import NOT_AUTHORISED, Fault
from gateway.kafka.properties import PROPERTIES, open_producer
from gateway.kafka.topics import PROBE_PAUSE_S, Cluster
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.config.promises import Property
    from gateway.core.holds import Holds
    from gateway.kafka.partitioner import TopicPartition
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

# long: a producer's whole life, its replacement included; what it knows of the cluster is in `gateway.kafka.topics`

POLL_BUSY_S: Final = 0.005
"""Between polls while records are in flight: 200 short calls a second, 5 ms at most on top of an ack."""
POLL_QUIET_S: Final = 0.02
"""Between polls while nothing is in flight: bounds how late the first report is seen."""
ROOM_AGAIN: Final = 0.75
"""A full queue has room again when it has shrunk to this share: not a pause for every record."""
PURGE_TIMEOUT_S: Final = 2.0
"""How long a purge waits for the next report."""
FULL_S: Final = 1.0
"""How long the queue is full before partitions that take nothing are looked for."""
IN_FLIGHT_S: Final = 5.0
"""How long what other partitions are about to confirm is waited for before what they do not take is taken back."""
BATCH_OVERHEAD_BYTES: Final = 512
"""Kept free of a topic's max.message.bytes: the record batch's header (61 bytes, Kafka protocol guide) and room."""
SHRINK: Final = 8
"""By how much batches shrink at a time where the topic's limit cannot be asked for."""
REPORTS_AT_ONCE: Final = 1000
"""Failed records handled in one `poll`, some 5 ms: a purge reports hundreds of thousands."""
STUCK_MS: Final = 30_000
"""An idempotent producer that is connected and has waited this long for its producer id is given up."""
RENEW_PAUSE_S: Final = 1.0
MAX_RENEW_PAUSE_S: Final = 30.0
"""Between renewals, doubling while they follow each other: what broke one producer may break the next at once."""

_NO_CONNECTION: Final = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,  # their public spelling
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
    }
)
_IDEMPOTENCE: Final = re.compile(r'"idemp_state": ?"(\w+)", ?"idemp_stateage": ?(\d+)')

PRODUCE_ERRORS: Final = (BufferError, KafkaException)
"""What `KafkaProducer`'s ``produce`` raises for a record that was not taken: no room, or Kafka can never take it."""

Produce = Callable[[str, bytes, bytes, int, Callable[[Any, Any], None]], None]


class Owner(Protocol):
    """Whose records the producer sends; called from `KafkaProducer.poll` and `KafkaProducer.run`."""

    def queue_again(self) -> bool:
        """Queue what the producer handed back and what found no room, oldest first; true while there is more of it."""

    def note_unwritable(self, partitions: frozenset[TopicPartition]) -> None:
        """These partitions, and no others, take nothing from now on."""


class _Nobody:
    """The owner of a producer that has none yet."""

    def queue_again(self) -> bool:
        return False

    def note_unwritable(self, partitions: frozenset[TopicPartition]) -> None:
        return


def _no_room(*_: object) -> None:
    """Stands in for confluent-kafka's produce() where nothing may be produced."""
    raise BufferError


class KafkaProducer:
    """The one producer of the process. `run` is its task; everything else is called from the Trio thread."""

    def __init__(
        self,
        bootstrap_servers: str,
        properties: Mapping[str, Property],
        metrics: Metrics,
        log: Log,
        holds: Holds | None = None,
    ) -> None:
        """Raises StartupError for a property librdkafka does not take."""
        self._pauses = metrics.counter("gateway_reading_pauses", "Times the queue was full.")
        self._renewals = metrics.counter("gateway_producer_renewals", "Producers replaced.")
        self._errors = metrics.counter("gateway_kafka_errors", "Errors librdkafka reported.")
        self._log = log
        self._holds = NoHolds() if holds is None else holds
        self._owner: Owner = _Nobody()
        self.full = False
        self.broken = ""
        """Why the present producer can never send again, until another has taken its place; empty while it can."""
        self._full_since = math.inf
        self._room_at = 0
        self._closed = False
        self._failures = 0
        self._answers_lost = False  # the broken producer will not say what became of the records under way
        self._limits_wanted = False
        self._renew_pauses = Doubling(RENEW_PAUSE_S, MAX_RENEW_PAUSE_S)
        self._renewed_at = -math.inf
        self._unwritable: frozenset[TopicPartition] = frozenset()
        self._properties = {**PROPERTIES, **properties, "bootstrap.servers": bootstrap_servers}
        self._producer = self._open()
        self.cluster = Cluster(lambda: self._producer, self._properties, log)
        """What is known of the cluster and its topics."""
        self.produce: Produce = self._producer.produce
        """For new messages: confluent-kafka's own method, positional, not wrapped, since it is called for each of them.

        Raises BufferError while the producer is broken and until what it held is queued again."""

    def _open(self) -> Producer:
        return open_producer(
            {
                **self._properties,
                "error_cb": self._on_error,
                "stats_cb": self._on_statistics,
                "logger": _RdkafkaLog(self._log),
            }
        )

    def attach(self, owner: Owner) -> None:
        """Tell ``owner`` what becomes of its records from now on."""
        self._owner = owner

    def __len__(self) -> int:
        """Records not confirmed yet, reports not yet read included, and librdkafka's own events until the next `poll`.

        0 is certain: nothing is left."""
        return len(self._producer)

    # Its queue

    def queue(
        self,
        topic: str,
        value: bytes,
        key: bytes,
        on_delivery: Callable[[Any, Any], None],
        headers: list[tuple[str, bytes]] | None = None,
        received_at_ms: int = 0,
    ) -> None:
        """Queue one record, whoever waits. Raises BufferError when there is no room.

        ``received_at_ms`` becomes its CreateTime, milliseconds since the epoch; 0 is now.
        """
        if self.broken:
            raise BufferError
        self._producer.produce(
            topic,
            value,
            key,
            on_delivery=on_delivery,
            headers=[*headers] if headers else None,
            timestamp=received_at_ms,
        )

    def take_nothing_new(self) -> None:
        """From now on `produce` raises BufferError."""
        self._closed = True
        self.produce = _no_room

    def note_full(self) -> None:
        """A record found no room; there will be some again when a quarter of what is queued now has gone."""
        self._room_at = int(len(self._producer) * ROOM_AGAIN)
        if not self.full:
            self._pauses.add()
            self._set_full()

    def _set_full(self) -> None:
        self.full = True
        self._full_since = trio.current_time()
        if not self._closed:
            self._holds.hold(PRODUCER_FULL)

    def sends_alone(self, size: int) -> bool:
        """Whether a record with a value of ``size`` bytes had its batch for itself."""
        properties = self._properties
        return size > int(properties["batch.size"]) or 1 in (
            int(properties["batch.size"]),
            int(properties["batch.num.messages"]),
        )

    # Its reports

    def count_failure(self) -> None:
        """A failed record has been handled. Raises in between, so that a poll with many of them ends for now."""
        self._failures += 1
        if self._failures >= REPORTS_AT_ONCE:
            self._failures = 0
            raise _EnoughForNow

    def poll(self) -> bool:
        """Read delivery reports, and say so if a full queue has room again; true when more reports may be there.

        All those that are there, but no more than `REPORTS_AT_ONCE` failures. confluent-kafka raises a fatal error of
        the idempotent producer from here instead of reporting it, and whatever a callback raised.
        """
        try:
            self._producer.poll(0)
        except _EnoughForNow:
            return True
        except KafkaException as error:
            self.note_broken(error.args[0].str())
        except Exception as error:  # the barrier around each report
            self._log.error("handling a report failed", exc_info=error)
        try:
            self._go_on()
        except Exception as error:  # the barrier around each message that is queued again, and each connection
            self._log.error("queueing again failed", exc_info=error)
        return False

    def _go_on(self) -> None:
        """Queue what found no room before, then let others go on."""
        crowded = self._owner.queue_again()
        if self.full and not self.broken and not crowded and len(self._producer) <= self._room_at:
            self.full = False
            if not self._closed:
                self.produce = self._producer.produce
            self._holds.release(PRODUCER_FULL)

    async def run(self) -> None:
        """Poll, and replace a broken producer, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.cluster.watch)
            nursery.start_soon(self.cluster.watch_partitions, self._is_long_full)
            while True:
                self.poll()
                if self.broken:
                    await self._renew(nursery)
                elif self._unwritable != self.cluster.unwritable:
                    self._take_unwritable(self.cluster.unwritable)
                self.cluster.end_probation()
                await trio.sleep(POLL_BUSY_S if len(self._producer) else POLL_QUIET_S)

    def _is_long_full(self) -> bool:
        return self.full and trio.current_time() - self._full_since >= FULL_S

    async def purge(self) -> None:
        """Give up on everything queued or in flight; each record's report says so before this returns.

        The reports come from librdkafka's threads: waits for them until none has come for `PURGE_TIMEOUT_S`.
        """
        self._purge()
        left, until = len(self._producer), trio.current_time() + PURGE_TIMEOUT_S
        while left and trio.current_time() < until:
            if self.poll():
                await trio.lowlevel.checkpoint()
            else:
                await trio.sleep(POLL_BUSY_S)
            before, left = left, len(self._producer)
            if left < before:
                until = trio.current_time() + PURGE_TIMEOUT_S

    def _purge(self, *, in_flight: bool = True) -> None:
        """Give up on all records; their reports come at the next polls. Waits for none of librdkafka's threads."""
        try:
            self._producer.purge(in_flight=in_flight, blocking=False)
        except KafkaException as error:
            self._log.error("purge failed", error=str(error))

    # When it cannot go on

    def note_fault(self, fault: Fault, error: KafkaError, topic: str) -> None:
        """A record for ``topic`` failed for ``fault``, which is not its own: another producer must take over."""
        if fault is Fault.TOPIC:
            self.cluster.note_topic_fault(topic, authorised=error.code() not in NOT_AUTHORISED)
        if fault is Fault.BATCH:
            self._limits_wanted = True
        self.note_broken(error.str(), fault)

    def note_broken(self, reason: str, fault: Fault = Fault.PRODUCER) -> None:
        """The producer is to be replaced; `run` does it. Until then, and until there is room, nothing is produced."""
        if fault is Fault.PRODUCER:
            self._answers_lost = True
        if not self.broken:
            self.broken = reason
            self.produce = _no_room
            self._room_at = sys.maxsize
            self._log.error("another producer is needed", error=reason, fault=fault.value)
            if not self.full:
                self._set_full()

    async def _renew(self, nursery: trio.Nursery) -> None:
        """Put another producer in the place of the broken one; everything that one held has been reported by then."""
        await self._take_everything_back()
        if self._limits_wanted:
            await self._shrink_batches()
        elif trio.current_time() - self._renewed_at < MAX_RENEW_PAUSE_S:
            await self._poll_for(self._renew_pauses.next_s())
        else:
            self._renew_pauses.reset()
        self._renewed_at = trio.current_time()
        while len(self._producer):
            self._purge()
            await self._poll_for(POLL_BUSY_S)
        try:
            another = self._open()
        except StartupError as error:  # a file that the properties name is being replaced, say
            self._log.error("no other producer", error=str(error), remedy="tried again soon")
            return
        await self._discard(another, nursery)
        cluster = self.cluster
        while cluster.doubtful and cluster.topics and not await cluster.check(cluster.topics):
            await self._poll_for(PROBE_PAUSE_S)
        self._answers_lost = False
        cluster.begin_probation()
        self.broken = ""
        self._renewals.add()
        self._log.warning("another producer has taken over")

    async def _take_everything_back(self) -> None:
        """Purge the broken producer. Where it still gets answers, what is under way is waited for, so that none is sent
        twice; what librdkafka would send again meanwhile is purged too, so that none overtakes what is taken back.
        """
        with trio.move_on_after(0 if self._answers_lost else IN_FLIGHT_S):
            while len(self._producer) and not self._answers_lost:
                self._purge(in_flight=False)
                await self._poll_for(POLL_BUSY_S)
        # after INVALID_PRODUCER_EPOCH librdkafka goes on sending what is queued
        self._purge()

    async def _discard(self, another: Producer, nursery: trio.Nursery) -> None:
        """Put ``another`` in the old producer's place."""
        old = [self._producer]
        self._producer = another

        async def let_go() -> None:
            try:
                # Joins librdkafka's threads, which may hang in a name lookup.
                await in_thread(old.clear, abandon_on_cancel=True)
            except NoThread:
                self._log.warning("a producer that was replaced is kept", remedy="allow the process more threads")

        nursery.start_soon(let_go)

    async def _poll_for(self, seconds: float) -> None:
        """Poll for a while."""
        until = trio.current_time() + seconds
        while True:
            self.poll()
            await trio.sleep(POLL_BUSY_S)
            if trio.current_time() >= until:
                return

    def _take_unwritable(self, unwritable: frozenset[TopicPartition]) -> None:
        """Say which partitions take nothing from now on, and take back what they keep."""
        names = ", ".join(f"{topic}/{number}" for topic, number in sorted(unwritable))
        self._log.warning("partitions that take nothing", partitions=names)
        more = unwritable - self._unwritable
        self._unwritable = unwritable
        if more and len(self._producer):  # theirs would stay in the queue, and keep it full
            self.note_broken(f"{names} take nothing", Fault.PARTITION)
        self._owner.note_unwritable(unwritable)

    async def _shrink_batches(self) -> None:
        """A topic takes less at once than a batch may hold: make batches smaller, as the topics say or step by step."""
        self._limits_wanted = False
        size = int(self._properties["batch.size"])
        limits = await self.cluster.limits()
        smallest = min(limits.values(), default=size) - BATCH_OVERHEAD_BYTES
        self._properties["batch.size"] = max(1, smallest if smallest < size else size // SHRINK)
        self._log.warning("batches are smaller now", batch_size=self._properties["batch.size"], limits=limits)

    async def fit_batches(self) -> None:
        """Ask what the topics take at once, where that may be asked, and make batches as small as the smallest.

        Before anything is under way this replaces a producer that holds nothing.
        """
        limits = await self.cluster.limits()
        size = min(limits.values(), default=sys.maxsize) - BATCH_OVERHEAD_BYTES
        if size < int(self._properties["batch.size"]) and not self.broken:
            self._properties["batch.size"] = max(1, size)
            self.note_broken(f"a topic takes {min(limits.values())} bytes at once", Fault.BATCH)

    # What librdkafka says

    def _on_error(self, error: KafkaError) -> None:
        self._errors.add()
        if error.code() in _NO_CONNECTION:
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self.cluster.note_no_connection()
            else:
                self.cluster.note_error(error.str())
            self._log.debug("Kafka connection", error=error.str(), code=error.name())
        elif self.cluster.note_error(error.str()):
            self._log.warning("Kafka error", error=error.str(), code=error.name())

    def _on_statistics(self, statistics: str) -> None:
        if self.broken or not self.cluster.up or not len(self._producer):
            return
        # Not parsed: the document is long, and this is at its end.
        found = _IDEMPOTENCE.search(statistics, max(0, statistics.rfind('"eos"')))
        if found is not None and found[1] != "Assigned" and int(found[2]) >= STUCK_MS:
            self.note_broken(f"{found[1]} for {found[2]} ms (librdkafka's idemp_state)")


class _EnoughForNow(GatewayError):  # ends a poll, never seen outside
    pass


class _RdkafkaLog:
    """librdkafka's own log lines, as confluent-kafka hands them to a ``logging.Logger``."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def log(self, level: int, pattern: str, *arguments: object) -> None:
        line = pattern % arguments if arguments else pattern
        self._log.debug("librdkafka", line=line)
