"""What the cluster says of itself and of the topics: whether it answers, what is missing, what takes nothing.

States, seen from outside: not reached (no broker has answered for the topics yet), reached, and from then on ``up`` or
not. A broker that closes an idle connection does not make the cluster less ``up``: when all connections are gone it is
asked (`Cluster.watch`), and only no answer counts.

librdkafka's metadata calls block, so they run in threads; what they found is taken over on the Trio thread.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from confluent_kafka import KafkaException
from confluent_kafka.admin._config import ConfigResource

from gateway.errors import NoThread
from gateway.kafka.faults import NOT_AUTHORISED
from gateway.kafka.properties import open_admin
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from confluent_kafka import Producer

    from gateway.kafka.partitioner import TopicPartition
    from gateway.telemetry.logging import Log

METADATA_TIMEOUT_S: Final = 3.0
PROBE_TIMEOUT_S: Final = 2.0
PROBE_PAUSE_S: Final = 1.0
"""Between asking a cluster that did not answer."""
LIMITS_TIMEOUT_S: Final = 3.0
PARTITIONS_PAUSE_S: Final = 1.0
"""Between two looks for partitions that take nothing."""
PROBATION_S: Final = 5.0
"""How long a topic that refused the gateway is still named after another producer has taken over."""


class Cluster:
    """What is known of the cluster. Tasks: `watch` and `watch_partitions`; everything runs on the Trio thread."""

    def __init__(self, handle: Callable[[], Producer], properties: Mapping[str, Any], log: Log) -> None:
        """``handle`` gives the producer to ask with, which may be replaced; ``properties`` are its properties."""
        self._handle = handle
        self._properties = properties
        self._log = log
        self.topics: list[str] = []
        """The topics that were last asked for (`check`)."""
        self.reached = False
        self.up = False
        self.missing_topics: tuple[str, ...] = ()
        self.not_authorised: tuple[str, ...] = ()
        """Topics that may not be written to, or asked about."""
        self._not_authorised_until = math.inf
        self.partition_counts: dict[str, int] = {}
        """How many partitions each topic has, as far as that has been asked."""
        self.unwritable: frozenset[TopicPartition] = frozenset()
        """Partitions that take nothing while others do, as of the last look."""
        self.doubtful = False
        """A topic refused a record, so that it may be seen says little."""
        self._min_isr: dict[str, int] = {}
        self._suspicion = trio.Event()
        self._said_unreachable = False
        self._last_error = ""

    # Is it there?

    def note_error(self, error: str) -> bool:
        """Something failed, a connection say; whether that is news since the cluster last answered."""
        news, self._last_error = error != self._last_error, error
        return news

    def note_no_connection(self) -> None:
        """All connections are gone; an idle one that a broker closes ends so too: `watch` finds out which it is."""
        self._suspicion.set()

    async def watch(self) -> None:
        """When all connections are gone, ask until the cluster answers, which connects again; say so once."""
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
        topic = self.topics[0] if self.topics else None
        try:
            await in_thread(
                partial(lambda producer: producer.list_topics(topic, timeout=PROBE_TIMEOUT_S), self._handle()),
                abandon_on_cancel=True,
            )
        except (KafkaException, NoThread):
            return False
        return True

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

    # Are the topics there?

    async def check(self, topics: list[str]) -> bool:
        """Ask for each topic, in a thread; true when all are there and may be seen.

        Sets ``reached``, ``missing_topics`` and ``not_authorised``; while ``doubtful``, topics that refused the gateway
        stay named although they may be seen. Takes up to `METADATA_TIMEOUT_S` a topic; cancellation leaves the thread
        to end on its own.
        """
        self.topics = topics
        missing, forbidden = await self.unusable(topics)
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
        if forbidden or not self.doubtful:
            self.not_authorised, self._not_authorised_until = forbidden, math.inf
        self._note_reached()
        return not missing and not forbidden

    async def unusable(self, topics: list[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """Which of ``topics`` are not there (None: Kafka does not say), and which the gateway may not ask about."""
        try:
            return await in_thread(partial(_unusable, self._handle(), topics), abandon_on_cancel=True)
        except (KafkaException, NoThread) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            self._note_unreachable(reason)
            return None, ()

    def note_topic_fault(self, topic: str, *, authorised: bool) -> None:
        """``topic`` refused a record: it is not there, or not for the gateway."""
        self.doubtful = True
        if not authorised:
            self.not_authorised = tuple(sorted({*self.not_authorised, topic}))
            self._not_authorised_until = math.inf

    def begin_probation(self) -> None:
        """Another producer tries the topics that refused the gateway: they are named for a while, or until they do
        so again."""
        self.doubtful = False
        if self.not_authorised:
            self._not_authorised_until = trio.current_time() + PROBATION_S

    def end_probation(self) -> None:
        """Name the topics that refused the gateway no longer, where none has done so again in time."""
        if trio.current_time() >= self._not_authorised_until:
            self.not_authorised, self._not_authorised_until = (), math.inf

    # What do they take?

    async def limits(self) -> dict[str, int]:
        """max.message.bytes of the topics that say; none where the broker does not answer or does not allow it."""
        try:
            return await in_thread(partial(self._limits, self._handle(), list(self.topics)), abandon_on_cancel=True)
        except (KafkaException, NoThread, ValueError, KeyError):
            return {}

    def _limits(self, producer: Producer, topics: list[str]) -> dict[str, int]:
        if not topics or producer.list_topics(topics[0], timeout=LIMITS_TIMEOUT_S).controller_id < 0:
            return {}  # librdkafka's mock has no controller, and would be waited for
        admin = open_admin(self._properties)
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

    async def watch_partitions(self, wanted: Callable[[], bool]) -> None:
        """While ``wanted``, or while partitions took nothing the last time, see which of them take nothing."""
        while True:
            await trio.sleep(PARTITIONS_PAUSE_S)
            if not (wanted() or self.unwritable):
                continue
            try:
                counts, unwritable = await in_thread(
                    partial(_unwritable, self._handle(), list(self.topics), dict(self._min_isr)),
                    abandon_on_cancel=True,
                )
            except (KafkaException, NoThread):
                continue
            self.partition_counts.update(counts)
            if len(unwritable) < sum(counts.values()):  # else an outage: everybody waits
                self.unwritable = unwritable

    @property
    def unwritable_topics(self) -> list[str]:
        """Topics none of whose partitions take anything, while those of others do."""
        counts = Counter(topic for topic, _ in self.unwritable)
        return sorted(topic for topic, count in counts.items() if count == self.partition_counts.get(topic))


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
