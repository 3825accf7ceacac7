"""confluent-kafka's producer: its settings, its polling, and what it knows of the cluster.

States, seen from outside: not reached (no broker has answered for the topics yet), reached, and from then on
``up`` or not, as librdkafka's statistics say. ``full`` is independent of it: from a BufferError until a quarter of
what was queued then has gone.

An idempotent producer can fail for good (fenced, out of sequence), or wait for ever for a producer id. It is
``broken`` then, until another one has taken its place (`_renew`): the old one is purged, its reports hand everything it
held back to `Delivery` in order, and that queues it again. What was under way may then be in Kafka twice.

Delivery reports are read by one task calling ``poll(0)`` on the Trio thread, so everything they touch lives on one
thread and needs no lock.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from confluent_kafka import KafkaError, KafkaException, Producer

from gateway.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
STATISTICS_INTERVAL_MS: Final = 1000
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
    "statistics.interval.ms": STATISTICS_INTERVAL_MS,
    "log_level": 4,
}
"""librdkafka settings unless the operator says otherwise in ``[kafka.properties]``."""

OWN_PROPERTIES: Final = frozenset(
    {
        "bootstrap.servers",
        "enable.idempotence",
        "acks",
        "partitioner",
        "message.timeout.ms",
        "delivery.timeout.ms",
        "queue.buffering.max.messages",
        "queue.buffering.max.kbytes",
        "statistics.interval.ms",
        "delivery.report.only.error",
    }
)
"""What the gateway's promises rest on and ``[kafka.properties]`` may not change."""

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
        try:
            return Producer(
                {
                    **self._properties,
                    "error_cb": self._on_error,
                    "stats_cb": self._on_statistics,
                    "logger": _RdkafkaLog(self._log),
                }
            )
        except (KafkaException, ValueError, TypeError) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            raise StartupError(f"kafka.properties: librdkafka refuses the settings: {reason}") from error

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

    def note_full(self) -> None:
        """A record found no room; `on_room` is called when there is some again."""
        self._room_at = int(len(self._producer) * ROOM_AGAIN)
        if not self.full:
            self.full = True
            self._counters.pauses += 1

    def note_broken(self, reason: str) -> None:
        """The producer can never send again; `run` replaces it. Until `on_room` nothing may be produced."""
        self.up = False
        if not self.broken:
            self.broken = reason
            self.produce = _no_room
            self.full = True
            self._room_at = sys.maxsize
            self._log.error("the producer failed for good", error=reason, remedy="another one takes its place")
            self.on_broken()

    def poll(self) -> None:
        """Read the delivery reports that are there, and say so if a full queue has room again.

        confluent-kafka raises a fatal error of the idempotent producer from here instead of reporting it.
        """
        try:
            self._producer.poll(0)
        except KafkaException as error:
            self.note_broken(error.args[0].str())
        crowded = self.after_poll()
        if self.full and not self.broken and not crowded and len(self._producer) <= self._room_at:
            self.full = False
            if not self._closed:
                self.produce = self._producer.produce
            self.on_room()

    async def run(self) -> None:
        """Poll, and replace a broken producer, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self.poll()
                if self.broken:
                    await self._renew(nursery)
                await trio.sleep(POLL_BUSY_S if len(self._producer) else POLL_QUIET_S)

    async def _renew(self, nursery: trio.Nursery) -> None:
        """Put another producer in the place of the broken one; everything that one held has been reported by then."""
        self._producer.purge()  # at once: after INVALID_PRODUCER_EPOCH librdkafka goes on sending what is queued
        if trio.current_time() - self._renewed_at < MAX_RENEW_PAUSE_S:
            await self._poll_for(self._renew_pause_s)
            self._renew_pause_s = min(MAX_RENEW_PAUSE_S, self._renew_pause_s * 2)
        else:
            self._renew_pause_s = RENEW_PAUSE_S
        self._renewed_at = trio.current_time()
        while len(self._producer):
            await self._poll_for(POLL_BUSY_S)
        try:
            another = self._open()
        except StartupError as error:  # a file that the properties name is being replaced, say
            self._log.error("no other producer", error=str(error), remedy="tried again soon")
            return
        old = [self._producer]
        self._producer = another
        self.broken = ""
        self._counters.renewals += 1
        self._log.warning("another producer has taken over")
        # Joins librdkafka's threads, which may hang in a name lookup.
        nursery.start_soon(partial(trio.to_thread.run_sync, old.clear, abandon_on_cancel=True))

    async def _poll_for(self, seconds: float) -> None:
        """Poll for a while."""
        until = trio.current_time() + seconds
        while True:
            self.poll()
            await trio.sleep(POLL_BUSY_S)
            if trio.current_time() >= until:
                return

    async def check_topics(self, topics: list[str]) -> bool:
        """Ask the cluster for each topic, in a thread; true when all are there.

        Sets ``reached`` and ``missing_topics``. Takes up to `METADATA_TIMEOUT_S` a topic; cancellation leaves
        the thread to end on its own.
        """
        try:
            missing = await trio.to_thread.run_sync(
                partial(self._missing, topics), abandon_on_cancel=True, limiter=None
            )
        except KafkaException as error:
            self._note_unreachable(error.args[0].str())
            return False
        self.missing_topics = tuple(missing)
        if missing:
            self._log.warning("topics missing in Kafka", topics=missing, remedy="create them; checked again soon")
            return False
        self.reached = self.up = True
        self._last_error = ""
        return True

    def _missing(self, topics: list[str]) -> list[str]:
        missing = []
        for topic in topics:
            metadata = self._producer.list_topics(topic, timeout=METADATA_TIMEOUT_S).topics.get(topic)
            if metadata is None or metadata.error is not None:
                missing.append(topic)
        return missing

    async def purge(self) -> None:
        """Give up on everything queued or in flight; each record's report says so before this returns.

        The reports come from librdkafka's threads: waits for them, `PURGE_TIMEOUT_S` at most.
        """
        self._producer.purge()
        with trio.move_on_after(PURGE_TIMEOUT_S):
            while len(self._producer):
                self.poll()
                await trio.sleep(POLL_BUSY_S)

    def _note_unreachable(self, reason: str) -> None:
        if reason != self._last_error:
            self._last_error = reason
            self._log.warning("Kafka not reached", error=reason)

    def _on_error(self, error: KafkaError) -> None:
        self._counters.kafka_errors += 1
        if error.code() == KafkaError._ALL_BROKERS_DOWN:  # its public spelling
            self.up = False
        if error.str() != self._last_error:
            self._last_error = error.str()
            self._log.warning("Kafka error", error=error.str(), code=error.name())

    def _on_statistics(self, statistics: str) -> None:
        values = json.loads(statistics)
        up = not self.broken and any(broker.get("state") == "UP" for broker in values.get("brokers", {}).values())
        eos = values.get("eos", {})
        if up and len(self._producer) and eos.get("idemp_state") != "Assigned":
            waited_ms = eos.get("idemp_stateage", 0)
            if waited_ms >= STUCK_MS:
                self.note_broken(f"{eos['idemp_state']} for {waited_ms} ms (librdkafka's idemp_state)")
                return
        if up and not self.up:
            self._log.info("Kafka connected")
        self.up = up


class _RdkafkaLog:
    """librdkafka's own log lines, as confluent-kafka hands them to a ``logging.Logger``."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def log(self, level: int, pattern: str, *arguments: object) -> None:
        line = pattern % arguments if arguments else pattern
        self._log.debug("librdkafka", line=line)
