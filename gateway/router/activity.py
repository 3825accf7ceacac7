"""Tells Kafka what becomes of users' connections: `ActivityEvent` records, keyed by company.

Nobody waits for them, and nothing depends on them: they are given up first. One is, when the topic is not there, when
the queue of messages is half full, when `MAX_WAITING` of them are not confirmed, or when Kafka refuses it; each is
counted: ``made = delivered + given_up + in flight``. They are not in the books of messages, nor in their queue.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.v1.activity_pb2 import Activity as Kind
from gateway.v1.activity_pb2 import ActivityEvent

if TYPE_CHECKING:
    from gateway.core.protection import Ban
    from gateway.core.tenants import User
    from gateway.kafka.aside import AsideProducer
    from gateway.kafka.producer import KafkaProducer
    from gateway.router.endpoint import Identity
    from gateway.router.session import Session
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

MAX_WAITING: Final = 1000
"""Events that are not confirmed, at most."""
HALF: Final = 0.5
CALM_S: Final = 5.0
"""A throttle has ended when nothing was dropped for this long."""
LOOK_S: Final = 1.0
TOPIC_S: Final = 30.0
"""Between two looks for a topic that was not there."""
POLL_S: Final = 0.02
FINISH_S: Final = 1.0
"""How long a drain waits for events."""
OUTCOMES: Final = ("made", "delivered", "given_up")


class Activity:
    """The events of one process; ``topic`` is where they go, empty for nowhere. `run` is its task."""

    def __init__(
        self,
        topic: str,
        producer: KafkaProducer,
        aside: AsideProducer,
        metrics: Metrics,
        log: Log,
        *,
        gateway: str,
        max_messages: int,
        max_bytes: int,
    ) -> None:
        """``max_messages`` and ``max_bytes`` are what the ``producer`` of messages holds; events go ``aside``."""
        self._topic = topic
        self._producer = producer
        self._aside = aside
        self._log = log
        self._gateway = gateway
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._events = metrics.labelled("gateway_activity_events", "Activity events.", "outcome", OUTCOMES)
        metrics.gauge("gateway_activity_events_in_flight", "Activity events not confirmed.", lambda: self.waiting)
        self.waiting = 0
        """Events that Kafka has not confirmed."""
        self._there = False
        self._said = False
        self._queued_bytes = 0
        self._throttled: dict[User, tuple[float, int, str]] = {}

    # What happens

    def connected(self, session: Session) -> None:
        """A connection has its place."""
        self._tell(Kind.CONNECTED, **_whose(session))

    def disconnected(self, session: Session, outcome: str) -> None:
        """A connection is over."""
        self._tell(Kind.DISCONNECTED, **_whose(session), reason=outcome, messages=session.received_messages)

    def refused(self, identity: Identity, code: str) -> None:
        """A verified user may not come in."""
        who = identity.principal
        self._tell(Kind.REFUSED, company_id=who.company_id, user_id=who.user_id, account=identity.account, reason=code)

    def banned(self, ban: Ban) -> None:
        """Somebody has been shut out."""
        names = ("company_id", "user_id") if ban.kind == "user" else ("address",)
        self._tell(Kind.BANNED, **dict(zip(names, ban.subject, strict=True)), seconds=ban.remaining_s)

    def throttled(self, user: User, dropped: int, reason: str) -> None:
        """Messages of a user were dropped over a limit."""
        _, before, first = self._throttled.get(user, (0.0, 0, ""))
        self._throttled[user] = (trio.current_time(), before + dropped, first or reason)
        if not first:
            self._tell(Kind.THROTTLED, company_id=user.company.id, user_id=user.user_id, reason=reason)

    # Its task

    async def run(self, queued_bytes: Any = lambda: 0) -> None:
        """Look for the topic, and for throttles that have ended, until cancelled.

        ``queued_bytes`` says what waits for Kafka's confirmation.
        """
        look_for_topic_at = trio.current_time()
        while True:
            now = trio.current_time()
            self._aside.poll()
            if self._topic and not self._there and now >= look_for_topic_at:
                look_for_topic_at = now + TOPIC_S
                await self._look_for_topic()
            self._queued_bytes = queued_bytes()
            for user, (at, dropped, reason) in [*self._throttled.items()]:
                if now - at >= CALM_S:
                    del self._throttled[user]
                    self._tell(
                        Kind.THROTTLE_ENDED,
                        company_id=user.company.id,
                        user_id=user.user_id,
                        reason=reason,
                        messages=dropped,
                    )
            await trio.sleep(LOOK_S)

    async def finish(self) -> None:
        """Wait until no event is on its way; bound it."""
        while self.waiting:
            self._aside.poll()
            await trio.sleep(POLL_S)

    async def _look_for_topic(self) -> None:
        missing, forbidden = await self._producer.cluster.unusable([self._topic])
        self._there = missing == () and not forbidden
        if (missing or forbidden) and not self._said:
            self._said = True
            self._log.warning("activity is told to nobody", topic=self._topic, reason="no such topic, or not ours")

    # Telling

    def _tell(self, kind: Kind, **fields: Any) -> None:
        self._events.add("made")
        if not self._there or self.waiting >= MAX_WAITING or self._is_half_full():
            self._events.add("given_up")
            return
        event = ActivityEvent(
            activity=kind, time_ms=time.time_ns() // 1_000_000, gateway=self._gateway, **fields
        ).SerializeToString()
        if not self._aside.queue(self._topic, event, fields.get("company_id", "").encode(), self._reported):
            self._events.add("given_up")
            return
        self.waiting += 1

    def _is_half_full(self) -> bool:
        full = self._producer.full or len(self._producer) >= HALF * self._max_messages
        return full or self._queued_bytes >= HALF * self._max_bytes

    def _reported(self, error: Any, _: Any) -> None:
        self.waiting -= 1
        self._events.add("delivered" if error is None else "given_up")
        if error is not None:
            self._there = False  # looked for again


def _whose(session: Session) -> dict[str, str]:
    who = session.principal
    return {
        "company_id": who.company_id,
        "user_id": who.user_id,
        "account": session.account,
        "connection_id": session.connection_id,
    }
