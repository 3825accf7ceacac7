"""confluent-kafka's producer: its settings, its polling, and what it knows of the cluster.

States, seen from outside: not reached (no broker has answered for the topics yet), reached, and from then on ``up`` or
not. A broker that closes an idle connection does not make it less ``up``: when all connections are gone the cluster is
asked (`_watch`), and only no answer counts. ``full`` is independent of it: from a BufferError until a quarter of what
was queued then has gone.

An idempotent producer can fail for good (fenced, out of sequence), or wait for ever for a producer id; a batch can be
too large for its topic, or be refused for one of its records; a topic can be gone, or closed to the gateway. It is
``broken`` then, until another one has taken its place (`_renew`): the old one is purged, its reports hand everything it
held back to `Delivery` in order, and that queues it again, once all topics are there. What was under way may then be in
Kafka twice.

Delivery reports are read by one task calling ``poll(0)`` on the Trio thread, so everything they touch lives on one
thread and needs no lock.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource

from gateway.errors import GatewayError, NoThread, StartupError
from gateway.kafka.faults import NOT_AUTHORISED, Fault
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.router.parking import TopicPartition
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Counters

POLL_BUSY_S: Final = 0.005
"""Between polls while records are in flight: 200 short calls a second, 5 ms at most on top of an ack."""
POLL_QUIET_S: Final = 0.02
"""Between polls while nothing is in flight: bounds how late the first report is seen."""
ROOM_AGAIN: Final = 0.75
"""A full queue has room again when it has shrunk to this share: not a pause for every record."""
METADATA_TIMEOUT_S: Final = 3.0
PURGE_TIMEOUT_S: Final = 2.0
"""How long a purge waits for the next report."""
PROBE_TIMEOUT_S: Final = 2.0
PROBE_PAUSE_S: Final = 1.0
"""Between asking a cluster that did not answer."""
STATISTICS_INTERVAL_MS: Final = 5000
"""Only for `STUCK_MS`: with thousands of partitions one document is megabytes long."""
FULL_S: Final = 1.0
"""How long the queue is full before partitions that take nothing are looked for, and between two looks."""
IN_FLIGHT_S: Final = 5.0
"""How long what other partitions are about to confirm is waited for before what they do not take is taken back."""
LIMITS_TIMEOUT_S: Final = 3.0
BATCH_OVERHEAD_BYTES: Final = 512
"""Kept free of a topic's max.message.bytes: the record batch's header (61 bytes, Kafka protocol guide) and room."""
SHRINK: Final = 8
"""By how much batches shrink at a time where the topic's limit cannot be asked for."""
PROBATION_S: Final = 5.0
"""How long a topic that refused the gateway is still named after another producer has taken over."""
REPORTS_AT_ONCE: Final = 1000
"""Failed records handled in one `poll`, some 5 ms: a purge reports hundreds of thousands."""
STUCK_MS: Final = 30_000
"""An idempotent producer that is connected and has waited this long for its producer id is given up."""
RENEW_PAUSE_S: Final = 1.0
MAX_RENEW_PAUSE_S: Final = 30.0
"""Between renewals, doubling while they follow each other: what broke one producer may break the next at once."""

PROPERTIES: Final[Mapping[str, str | int | float | bool]] = {
    "enable.idempotence": True,  # no duplicates and order per partition through retries; implies acks=all
    "acks": "all",
    "partitioner": "murmur2_random",  # the Java client's placement, so that streams co-partition
    "compression.type": "lz4",
    "linger.ms": 5,
    "batch.num.messages": 10_000,
    # librdkafka must not give up on a record while the queue still bounds memory: an expired record would be lost, and
    # fences an idempotent producer. 0 is for ever.
    "message.timeout.ms": 0,
    # Every broker is tried again within a second: after an outage nothing waits longer than Kafka does.
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1000,
    "retry.backoff.max.ms": 500,
    "socket.keepalive.enable": True,
    "batch.size": 1_000_000,
    # Asking for a topic must not make it: whoever runs the cluster decides on partitions and replicas.
    "allow.auto.create.topics": False,
    "statistics.interval.ms": STATISTICS_INTERVAL_MS,
    "log_level": 4,
}
"""librdkafka settings unless the operator says otherwise in ``[kafka.properties]``."""

_ORDER: Final = "order and no duplicates rest on an idempotent producer that tries for ever"
_OWN_SETTING: Final = "kafka.%s sets it"
_REPORTS: Final = "the books and the acks rest on its reports"
OWN_PROPERTIES: Final[Mapping[str, str]] = {
    "bootstrap.servers": _OWN_SETTING % "bootstrap_servers",
    "metadata.broker.list": _OWN_SETTING % "bootstrap_servers",
    "queue.buffering.max.messages": _OWN_SETTING % "max_queued_messages",
    "queue.buffering.max.kbytes": _OWN_SETTING % "max_queued_bytes",
    "enable.idempotence": _ORDER,
    "acks": "an ack means that all replicas in sync have the message",
    "request.required.acks": "an ack means that all replicas in sync have the message",
    "message.timeout.ms": _ORDER,
    "delivery.timeout.ms": _ORDER,
    "retries": _ORDER,
    "message.send.max.retries": _ORDER,
    "queuing.strategy": _ORDER,
    "api.version.request": _ORDER,
    "transactional.id": "nothing is sent in transactions, so nothing would be sent at all",
    "enable.gapless.guarantee": "one record that Kafka refuses would end the producer",
    "partitioner": "records are placed as the Java client places them",
    "delivery.report.only.error": _REPORTS,
    "enabled_events": _REPORTS,
    "statistics.interval.ms": "a producer that is stuck is found by it",
    "allow.auto.create.topics": "a topic that is missing is named, never made",
    "topic.blacklist": "a topic that is there would be called missing",
    "internal.termination.signal": "signals belong to the daemon",
    "test.mock.num.brokers": "messages would go to a mock, not to Kafka",
    "test.mock.broker.rtt": "messages would go to a mock, not to Kafka",
    "ut_handle_ProduceResponse": "it is a hook of librdkafka's own tests",
    "default.topic.config": "topic properties stand beside the others",
}
"""What ``[kafka.properties]`` may not change, aliases included, and the promise that would break."""

_NO_CONNECTION: Final = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,  # their public spelling
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
    }
)
_ADMIN_PROPERTIES: Final = re.compile(r"(security|sasl|ssl|enable\.ssl|client|broker|socket|https)\b")
_IDEMPOTENCE: Final = re.compile(r'"idemp_state": ?"(\w+)", ?"idemp_stateage": ?(\d+)')

Produce = Callable[[str, bytes, bytes, int, Callable[[Any, Any], None]], None]


def _no_room(*_: object) -> None:
    """Stands in for confluent-kafka's produce() where nothing may be produced."""
    raise BufferError


class KafkaProducer:
    """The one producer of the process. `run` is its task; everything else is called from the Trio thread."""

    def __init__(
        self,
        bootstrap_servers: str,
        properties: Mapping[str, str | int | float | bool],
        counters: Counters,
        log: Log,
    ) -> None:
        """Raises StartupError for a property librdkafka does not take."""
        self._topics: list[str] = []
        self.not_authorised: tuple[str, ...] = ()
        """Topics that may not be written to, or asked about."""
        self._not_authorised_until = math.inf
        self._topics_doubtful = False
        self._answers_lost = False  # the broken producer will not say what became of the records under way
        self._limits_wanted = False
        self._suspicion = trio.Event()
        self.partition_counts: dict[str, int] = {}
        """How many partitions each topic has, as far as that has been asked."""
        self._min_isr: dict[str, int] = {}
        self.unwritable: frozenset[TopicPartition] = frozenset()
        """Partitions that take nothing while others do, once they had filled the queue."""
        self.on_unwritable: Callable[[frozenset[TopicPartition]], None] = lambda partitions: None
        """Told of ``unwritable`` whenever it has changed."""
        self._full_since = math.inf
        self._seen_unwritable: frozenset[TopicPartition] = frozenset()
        self._said_unreachable = False
        self._failures = 0
        self._counters = counters
        self._log = log
        self.reached = False
        self.up = False
        self.full = False
        self.broken = ""
        """Why the present producer can never send again, until another has taken its place; empty while it can."""
        self.missing_topics: tuple[str, ...] = ()
        self._room_at = 0
        self._closed = False
        self._renew_pause_s = RENEW_PAUSE_S
        self._renewed_at = -math.inf
        self.on_room: Callable[[], None] = lambda: None
        self.on_broken: Callable[[], None] = lambda: None
        self.after_poll: Callable[[], bool] = lambda: False
        """Called after every poll; true while there is more to queue than there was room for."""
        self._last_error = ""
        self._properties = {**PROPERTIES, **properties, "bootstrap.servers": bootstrap_servers}
        self._producer = self._open()
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

    def __len__(self) -> int:
        """Records not confirmed yet, reports not yet read included, and librdkafka's own events until the next `poll`.

        0 is certain: nothing is left."""
        return len(self._producer)

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

    @property
    def unwritable_topics(self) -> list[str]:
        """Topics none of whose partitions take anything, while those of others do."""
        counts = Counter(topic for topic, _ in self.unwritable)
        return sorted(topic for topic, count in counts.items() if count == self.partition_counts.get(topic))

    def note_full(self) -> None:
        """A record found no room; `on_room` is called when there is some again."""
        self._room_at = int(len(self._producer) * ROOM_AGAIN)
        if not self.full:
            self._set_full()
            self._counters.pauses += 1

    def _set_full(self) -> None:
        self.full = True
        self._full_since = trio.current_time()

    def sends_alone(self, size: int) -> bool:
        """Whether a record with a value of ``size`` bytes had its batch for itself."""
        properties = self._properties
        return size > int(properties["batch.size"]) or 1 in (
            int(properties["batch.size"]),
            int(properties["batch.num.messages"]),
        )

    def note_fault(self, fault: Fault, error: KafkaError, topic: str) -> None:
        """A record for ``topic`` failed for ``fault``, which is not its own: another producer must take over."""
        if fault is Fault.TOPIC:
            self._topics_doubtful = True
            if error.code() in NOT_AUTHORISED:
                self.not_authorised = tuple(sorted({*self.not_authorised, topic}))
                self._not_authorised_until = math.inf
        if fault is Fault.BATCH:
            self._limits_wanted = True
        self.note_broken(error.str(), fault)

    def note_broken(self, reason: str, fault: Fault = Fault.PRODUCER) -> None:
        """The producer is to be replaced; `run` does it. Until `on_room` nothing may be produced."""
        if fault is Fault.PRODUCER:
            self._answers_lost = True
        if not self.broken:
            self.broken = reason
            self.produce = _no_room
            if not self.full:
                self._set_full()
            self._room_at = sys.maxsize
            self._log.error("another producer is needed", error=reason, fault=fault.value)
            self.on_broken()

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
        crowded = self.after_poll()
        if self.full and not self.broken and not crowded and len(self._producer) <= self._room_at:
            self.full = False
            if not self._closed:
                self.produce = self._producer.produce
            self.on_room()

    async def run(self) -> None:
        """Poll, and replace a broken producer, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._watch_partitions)
            while True:
                self.poll()
                if self.broken:
                    await self._renew(nursery)
                elif self._seen_unwritable != self.unwritable:
                    self._note_unwritable(self._seen_unwritable)
                if trio.current_time() >= self._not_authorised_until:
                    self.not_authorised, self._not_authorised_until = (), math.inf
                await trio.sleep(POLL_BUSY_S if len(self._producer) else POLL_QUIET_S)

    async def _renew(self, nursery: trio.Nursery) -> None:
        """Put another producer in the place of the broken one; everything that one held has been reported by then."""
        await self._take_everything_back()
        if self._limits_wanted:
            await self._shrink_batches()
        elif trio.current_time() - self._renewed_at < MAX_RENEW_PAUSE_S:
            await self._poll_for(self._renew_pause_s)
            self._renew_pause_s = min(MAX_RENEW_PAUSE_S, self._renew_pause_s * 2)
        else:
            self._renew_pause_s = RENEW_PAUSE_S
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
        while self._topics_doubtful and self._topics and not await self.check_topics(self._topics):
            await self._poll_for(PROBE_PAUSE_S)
        self._topics_doubtful = self._answers_lost = False
        if self.not_authorised:
            self._not_authorised_until = trio.current_time() + PROBATION_S
        self.broken = ""
        self._counters.renewals += 1
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

    async def _watch_partitions(self) -> None:
        """While the queue stays full, or partitions took nothing the last time, see which of them take nothing."""
        while True:
            await trio.sleep(FULL_S)
            full = self.full and trio.current_time() - self._full_since >= FULL_S
            if not (full or self.unwritable):
                continue
            try:
                counts, unwritable = await in_thread(
                    partial(_unwritable, self._producer, list(self._topics), dict(self._min_isr)),
                    abandon_on_cancel=True,
                )
            except (KafkaException, NoThread):
                continue
            self.partition_counts.update(counts)
            if len(unwritable) < sum(counts.values()):  # else an outage: everybody waits
                self._seen_unwritable = unwritable

    def _note_unwritable(self, unwritable: frozenset[TopicPartition]) -> None:
        """Say which partitions take nothing from now on, and take back what they keep."""
        names = ", ".join(f"{topic}/{number}" for topic, number in sorted(unwritable))
        self._log.warning("partitions that take nothing", partitions=names)
        more = unwritable - self.unwritable
        self.unwritable = unwritable
        if more and len(self._producer):  # theirs would stay in the queue, and keep it full
            self.note_broken(f"{names} take nothing", Fault.PARTITION)
        self.on_unwritable(unwritable)

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

    def _purge(self, *, in_flight: bool = True) -> None:
        """Give up on all records; their reports come at the next polls. Waits for none of librdkafka's threads."""
        try:
            self._producer.purge(in_flight=in_flight, blocking=False)
        except KafkaException as error:
            self._log.error("purge failed", error=str(error))

    async def _shrink_batches(self) -> None:
        """A topic takes less at once than a batch may hold: make batches smaller, as the topics say or step by step."""
        self._limits_wanted = False
        size = int(self._properties["batch.size"])
        limits = await self._ask_limits(self._topics)
        smallest = min(limits.values(), default=size) - BATCH_OVERHEAD_BYTES
        self._properties["batch.size"] = max(1, smallest if smallest < size else size // SHRINK)
        self._log.warning("batches are smaller now", batch_size=self._properties["batch.size"], limits=limits)

    async def fit_batches(self) -> None:
        """Ask what the topics take at once, where that may be asked, and make batches as small as the smallest.

        Before anything is under way this replaces a producer that holds nothing.
        """
        limits = await self._ask_limits(self._topics)
        size = min(limits.values(), default=sys.maxsize) - BATCH_OVERHEAD_BYTES
        if size < int(self._properties["batch.size"]) and not self.broken:
            self._properties["batch.size"] = max(1, size)
            self.note_broken(f"a topic takes {min(limits.values())} bytes at once", Fault.BATCH)

    async def _ask_limits(self, topics: list[str]) -> dict[str, int]:
        """max.message.bytes of the topics that say; none where the broker does not answer or does not allow it."""
        try:
            return await in_thread(partial(self._limits, list(topics)), abandon_on_cancel=True)
        except (KafkaException, NoThread, ValueError, KeyError):
            return {}

    def _limits(self, topics: list[str]) -> dict[str, int]:
        own = {name: value for name, value in self._properties.items() if _ADMIN_PROPERTIES.match(name)}
        if not topics or self._producer.list_topics(topics[0], timeout=LIMITS_TIMEOUT_S).controller_id < 0:
            return {}  # librdkafka's mock has no controller, and would be waited for
        servers = self._properties["bootstrap.servers"]
        admin = AdminClient({**own, "bootstrap.servers": servers, "log_level": 0})
        wanted = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
        found = {}
        for resource, answer in admin.describe_configs(wanted, request_timeout=LIMITS_TIMEOUT_S).items():
            try:
                topic = answer.result(2 * LIMITS_TIMEOUT_S)
                self._min_isr[resource.name] = int(topic["min.insync.replicas"].value)
                found[resource.name] = int(topic["max.message.bytes"].value)
            except (KafkaException, KeyError, TypeError, ValueError, TimeoutError):
                continue
        return found

    async def _watch(self) -> None:
        """When all connections are gone, ask the cluster until it answers, which connects again; say so once."""
        while True:
            await self._suspicion.wait()
            self._suspicion = trio.Event()
            while self.reached and not await self._answers():
                if self.up:
                    self.up = False
                    self._note_unreachable("no answer")
                await trio.sleep(PROBE_PAUSE_S)
            if self.reached and not self.up:
                self._note_reached()

    async def _answers(self) -> bool:
        """Whether the cluster answers for a topic."""
        try:
            topic = self._topics[0] if self._topics else None
            await in_thread(partial(_ask, self._producer, topic), abandon_on_cancel=True)
        except (KafkaException, NoThread):
            return False
        return True

    async def _poll_for(self, seconds: float) -> None:
        """Poll for a while."""
        until = trio.current_time() + seconds
        while True:
            self.poll()
            await trio.sleep(POLL_BUSY_S)
            if trio.current_time() >= until:
                return

    async def check_topics(self, topics: list[str]) -> bool:
        """Ask the cluster for each topic, in a thread; true when all are there and may be seen.

        Sets ``reached``, ``missing_topics`` and ``not_authorised``. Takes up to `METADATA_TIMEOUT_S` a topic;
        cancellation leaves the thread to end on its own.
        """
        self._topics = topics
        missing, forbidden = await self.unusable_topics(topics)
        if missing is None:
            return False
        if (missing, forbidden) != (self.missing_topics, self.not_authorised) and (missing or forbidden):
            remedies = ["create the topics that are missing"] if missing else []
            remedies += ["allow the gateway to describe and write the others"] if forbidden else []
            self._log.warning(
                "topics cannot be used",
                missing=missing,
                not_authorised=forbidden,
                remedy=f"{' and '.join(remedies)}; checked again each second",
            )
        self.missing_topics = missing
        if forbidden or not self._topics_doubtful:
            self.not_authorised, self._not_authorised_until = forbidden, math.inf
        self._note_reached()
        return not missing and not forbidden

    async def unusable_topics(self, topics: list[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """Which of ``topics`` are not there (None: Kafka does not say), and which the gateway may not ask about."""
        try:
            return await in_thread(partial(_unusable, self._producer, topics), abandon_on_cancel=True)
        except (KafkaException, NoThread) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            self._note_unreachable(reason)
            return None, ()

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

    def _note_unreachable(self, reason: str) -> None:
        if not self._said_unreachable:
            self._said_unreachable = True
            self._log.warning("Kafka not reached", error=self._last_error or reason)

    def _note_reached(self) -> None:
        if self._said_unreachable:
            self._log.info("Kafka connected")
        self._said_unreachable = False
        self._last_error = ""
        self.reached = self.up = True

    def _on_error(self, error: KafkaError) -> None:
        self._counters.kafka_errors += 1
        if error.code() in _NO_CONNECTION:
            # An idle connection that the broker closes ends so too: `_watch` finds out which it is.
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self._suspicion.set()
            else:
                self._last_error = error.str()
            self._log.debug("Kafka connection", error=error.str(), code=error.name())
        elif error.str() != self._last_error:
            self._last_error = error.str()
            self._log.warning("Kafka error", error=error.str(), code=error.name())

    def _on_statistics(self, statistics: str) -> None:
        if self.broken or not self.up or not len(self._producer):
            return
        # Not parsed: the document is long, and this is at its end.
        found = _IDEMPOTENCE.search(statistics, max(0, statistics.rfind('"eos"')))
        if found is not None and found[1] != "Assigned" and int(found[2]) >= STUCK_MS:
            self.note_broken(f"{found[1]} for {found[2]} ms (librdkafka's idemp_state)")


class _EnoughForNow(GatewayError):  # ends a poll, never seen outside
    pass


def open_producer(properties: Mapping[str, Any]) -> Producer:
    """confluent-kafka's producer. Raises StartupError for a property librdkafka does not take."""
    try:
        return Producer(dict(properties))
    except (KafkaException, ValueError, TypeError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        raise StartupError(f"kafka.properties: librdkafka refuses the settings: {reason}") from error


def check_properties(properties: Mapping[str, str | int | float | bool]) -> None:
    """Let librdkafka judge the properties without connecting to anything. Raises StartupError.

    It gets no broker's address, and no method of its own to fetch tokens (OIDC), which it would use at once.
    """
    offline: dict[str, Any] = {**PROPERTIES, **properties, "log_level": 0}
    if "sasl.oauthbearer.method" in offline:
        offline |= {"sasl.oauthbearer.method": "default", "oauth_cb": lambda _: ("none", time.time() + 60)}
    open_producer(offline)


def is_own(name: str, value: str | float | bool | None) -> bool:
    """Whether ``[kafka.properties]`` may not set ``name``; to the value that it has anyway it may. None is unknown."""
    mine = PROPERTIES.get(name)
    if name not in OWN_PROPERTIES or mine is None or value is None:
        return name in OWN_PROPERTIES
    given = str(value).lower()
    if isinstance(mine, bool):
        given = {"t": "true", "1": "true", "f": "false", "0": "false"}.get(given, given)
    return given != str(mine).lower()


def _ask(producer: Producer, topic: str | None) -> None:
    producer.list_topics(topic, timeout=PROBE_TIMEOUT_S)


def _unwritable(
    producer: Producer, topics: list[str], min_isr: Mapping[str, int]
) -> tuple[dict[str, int], frozenset[TopicPartition]]:
    """How many partitions the topics have, and which have no leader or too few replicas in sync."""
    counts, found = {}, set()
    for topic in topics:
        metadata = producer.list_topics(topic, timeout=METADATA_TIMEOUT_S).topics.get(topic)
        partitions = {} if metadata is None else metadata.partitions
        counts[topic] = len(partitions)
        for number, partition in partitions.items():
            if partition.leader < 0 or len(partition.isrs) < min_isr.get(topic, 1):
                found.add((topic, number))
    return counts, frozenset(found)


def _unusable(producer: Producer, topics: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    missing, forbidden = [], []
    for topic in topics:
        metadata = producer.list_topics(topic, timeout=METADATA_TIMEOUT_S).topics.get(topic)
        if metadata is not None and metadata.error is not None and metadata.error.code() in NOT_AUTHORISED:
            forbidden.append(topic)
        elif metadata is None or metadata.error is not None:
            missing.append(topic)
    return tuple(missing), tuple(forbidden)


class _RdkafkaLog:
    """librdkafka's own log lines, as confluent-kafka hands them to a ``logging.Logger``."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def log(self, level: int, pattern: str, *arguments: object) -> None:
        line = pattern % arguments if arguments else pattern
        self._log.debug("librdkafka", line=line)
