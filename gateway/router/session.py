"""A connection whose messages are routed: the envelope's header read, its bytes handed to Kafka.

Everything here runs inside `Readiness`' turn, synchronously. One connection's messages are handed over in the order
in which they were received: when the producer has no room, and while handing over is paused, they wait in ``_backlog``,
in order, up to the connection's share; then it is not read any more. Pings and a close are answered meanwhile. What a
connection leaves behind in its backlog is handed over without it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.core import catalogue, notices
from gateway.core.acks import Acks
from gateway.core.envelope import (
    NO_PATTERN,
    foreign,
    head,
    identity_stamp,
    is_timestamp,
    parse,
    repeats,
    tracing_stamp,
)
from gateway.core.ports import Parked, QueueFull
from gateway.errors import NotAnEnvelope
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.ws import frames
from gateway.ws.connection import ENDED, OPEN, Connection

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Sequence

    from gateway.core.catalogue import Close
    from gateway.core.ports import Egress, Lane
    from gateway.core.principal import Principal
    from gateway.telemetry.logging import RateLimited
    from gateway.ws.connection import ConnectionLimits
    from gateway.ws.frames import Item
    from gateway.ws.readiness import Readiness


RESUMED_MESSAGES: Final = 256
"""Messages of a backlog handed over before another connection's turn: about a millisecond."""
ITEM_BYTES: Final = 64
"""What a message in a backlog takes beside its bytes."""


class _Alone(list["Item"]):
    """What waits for its user's partition, and for nobody else's."""


def _weight(messages: Iterable[bytes]) -> int:
    """Bytes that messages take in a backlog, about."""
    return sum(ITEM_BYTES + len(message) for message in messages)


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What all sessions share."""

    readiness: Readiness
    limits: ConnectionLimits
    egress: Egress
    ack_interval_ms: int
    reconnect_window_ms: int
    """``closing.reconnect_after_ms`` is drawn from 0 to this, so that clients do not all come back at once."""
    leeway_s: Callable[[], float]
    """How long after its expiry a token still counts, now, as at the handshake."""
    notify: Callable[[Session], None]
    """Called when a session has something to say that may wait for ``ack_interval_ms``."""
    log_refused: RateLimited
    """Takes lines that clients cause: broken frames, dead letters."""
    log_crash: RateLimited


class Session(Connection):
    """An authenticated connection; the `Origin` of what it hands over."""

    __slots__ = (
        "_acks",
        "_alone",
        "_announced",
        "_backlog",
        "_context",
        "_degraded",
        "_held_bytes",
        "_key",
        "_lanes",
        "_last_lane",
        "_last_pattern",
        "_rejections",
        "connection_id",
        "path",
        "principal",
        "received",
        "subprotocol",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: SessionContext,
        *,
        connection_id: str,
        principal: Principal,
        path: str,
        subprotocol: str | None,
    ) -> None:
        super().__init__(sock, context.readiness, context.limits)
        # Spreads the pings of clients that all came back at the same moment.
        self.last_ping -= random.random() * context.limits.ping_interval_s  # noqa: S311  # not a secret
        self._context = context
        self._key = principal.user_id.encode()
        self._lanes: dict[str, Lane] = {}
        self._last_lane: Lane | None = None
        self._last_pattern = NO_PATTERN
        self._backlog: deque[bytes] | None = None
        self._held_bytes = 0
        self._alone = False
        self._rejections: dict[str, tuple[int, int]] | None = None
        self.connection_id = connection_id
        self.principal = principal
        self.path = path
        self.subprotocol = subprotocol if subprotocol in notices.CONTROL_SUBPROTOCOLS else None
        self._announced = False
        self._degraded = False
        self._acks = Acks() if self.subprotocol is not None else None
        self.received = 0
        """Binary messages handed over so far: the index, from 1, of the last one."""

    # The way in

    def _take(self, items: list[Item]) -> None:
        if self.state != OPEN and not self._takes_while_closing:
            items = [item for item in items if item.__class__ is not bytes]
        if self._backlog is not None or self._readiness.paused:
            self._hold(items)
        elif rest := self._hand_over(items):
            self._put_back(rest)

    def _hold(self, items: list[Item]) -> None:
        """Keep the messages that cannot be handed over now, in order. Everything else is answered at once."""
        messages = self._messages(items)
        if messages and self._backlog is None:
            self._backlog = deque()
            self._readiness.defer(self)
        if self._backlog is not None:
            self._backlog.extend(messages)
            self._note_held(_weight(messages))
        if self._backlog is not None and not self._readiness.may_hold(self._held_bytes):
            self._readiness.want_read(self, False)  # until `_forget_backlog`

    def _messages(self, items: Iterable[Item]) -> list[bytes]:
        """The messages among ``items``; all else is handled."""
        messages = []
        for item in items:
            if isinstance(item, bytes):
                messages.append(item)
            elif self._fails(item):
                break
        return messages

    def _fails(self, item: Item) -> bool:
        """Handle what is no message; true when it failed the connection: nothing behind counts (RFC 6455 7.1.7)."""
        alive = self.state != ENDED
        self._event(item)
        return alive and self.state == ENDED and self.outcome not in ("peer_lost", "stalled_peer")

    def _note_held(self, change: int) -> None:
        self._held_bytes += change
        self._readiness.held_bytes += change

    def _hand_over(self, items: Sequence[Item]) -> Sequence[Item]:
        """Route messages that were accepted when they were read, whatever has become of the connection since.

        Returns what there is no room for. Nothing behind what failed the connection counts.
        """
        egress = self._context.egress
        produce, key = egress.produce, self._key
        lane, pattern = self._last_lane, self._last_pattern
        rest = iter(items)
        # hot: the plain case in one go, with locals for all that a message touches; whatever is not plain, and
        # whatever raises, takes `_route` from the beginning. bench/micro.py has the gain.
        for item in rest:
            if item.__class__ is not bytes:
                if self._fails(item):
                    return ()
                continue
            try:
                size = len(item)
                if (
                    lane is None
                    or size != pattern.length
                    or not item.startswith(pattern.start)
                    or not is_timestamp(item, pattern.tail)
                ):
                    lane = self._plain_lane(item)
                    pattern = self._last_pattern
                if lane is not None:
                    produce(lane.topic, item, key, -1, lane)
                    lane.waiting.append(item)
                    tally = lane.tally
                    tally.received += 1
                    tally.received_bytes += size
                    tally.in_flight += 1
                    tally.in_flight_bytes += size
                    self.received += 1
                    if lane.indices is not None:
                        lane.indices.append(self.received)
                    continue
            except egress.errors:
                lane = None
            try:
                self._route(item)
            except Parked:  # only this connection waits, until `go_on`
                return _Alone([item, *rest])
            except QueueFull:
                return [item, *rest]
        return ()

    def _put_back(self, items: Sequence[Item]) -> None:
        """There is no room: these go first when there is, and everybody waits."""
        messages = self._messages(items)
        if self._backlog is None:
            self._backlog = deque()
        self._backlog.extendleft(reversed(messages))
        self._note_held(_weight(messages))
        if not isinstance(items, _Alone):
            self._readiness.stall(self)
        elif not self._alone:  # it has been let go on meanwhile
            self._readiness.defer(self)

    def _plain_lane(self, raw: bytes) -> Lane | None:
        """The lane of a message that may go out as it came, None for any other. Raises DecodeError."""
        lane = self._last_lane
        pattern = repeats(raw, lane.head) if lane is not None and lane.head else None
        if pattern is None:
            envelope = MessageEnvelope.FromString(raw)
            principal = self.principal
            lane = self._lanes.get(envelope.message_type)
            if (
                lane is None
                or not lane.plain
                or envelope.user_id != principal.user_id
                or envelope.company_id != principal.company_id
                or envelope.enable_tracing
            ):
                return None
            if lane.head is None:
                lane.head = head(raw)
            self._last_lane = lane
        self._last_pattern = pattern or NO_PATTERN
        return lane

    def _route(self, raw: bytes) -> None:
        """Judge one message and hand it over: to its topic or as a dead letter. Raises QueueFull."""
        principal = self.principal
        egress = self._context.egress
        try:
            envelope = parse(raw)
        except NotAnEnvelope:
            self._reject(raw, catalogue.REASON_NOT_AN_ENVELOPE)
            return
        reason = foreign(envelope, principal)
        if reason is not None:
            self._reject(raw, reason)
            return
        lane = self._lanes.get(envelope.message_type) or self._open_lane(envelope.message_type)
        if lane is None:
            self._reject(raw, catalogue.REASON_UNKNOWN_TYPE)
            return
        stamp = identity_stamp(envelope, principal)
        if envelope.enable_tracing and not envelope.correlation_id:
            stamp += tracing_stamp(f"{self.connection_id}-{self.received + 1}")
        egress.send(lane, self, raw, stamp, self._next_index())
        self.received += 1

    def _open_lane(self, message_type: str) -> Lane | None:
        lanes = self._lanes
        lane = self._context.egress.lane(self, message_type, lanes.values(), acked=self._acks is not None)
        if lane is not None:
            lanes[message_type] = lane
        return lane

    def _reject(self, raw: bytes, reason: str) -> None:
        self._context.egress.dead_letter(self, raw, reason, self._next_index())
        self.received += 1
        self._log(self._context.log_refused, "message refused", reason=reason)

    def _next_index(self) -> int:
        """The number of the message at hand, 0 for a client that is told nothing."""
        return 0 if self._acks is None else self.received + 1

    # What becomes of it (the Origin port)

    def settle(self, index: int) -> None:
        """Message ``index`` is in Kafka, in the spool, or dropped and reported."""
        if self._acks is not None and self._acks.settle(index):
            self._context.notify(self)

    def note_rejected(self, reason: str, index: int) -> None:
        """Message ``index`` has become a dead letter."""
        if self._acks is not None:
            if self._rejections is None:
                self._rejections = {}
            count, last = self._rejections.get(reason, (0, 0))
            self._rejections[reason] = (count + 1, max(last, index))
            self._context.notify(self)

    def resume(self) -> None:
        backlog = self._backlog
        if backlog is None:
            return
        if self.state == ENDED:
            self.forget_routes()  # its company's books may have been closed since the last time
        chunk = [backlog.popleft() for _ in range(min(RESUMED_MESSAGES, len(backlog)))]
        self._note_held(-_weight(chunk))
        try:
            rest = self._hand_over(chunk)
        except BaseException:
            self._forget_backlog()
            raise
        if rest:
            self._put_back(rest)
        elif self._backlog:
            self._readiness.defer(self)
        else:
            self._forget_backlog()

    def _forget_backlog(self) -> None:
        self._note_held(-self._held_bytes)
        self._backlog = None
        self._readiness.want_read(self, True)

    def wait_alone(self) -> None:
        """This user's partition takes nothing: hold what comes; nobody else waits with it."""
        self._alone = True
        if self._backlog is None:
            self._backlog = deque()
        self.tell_degraded(True)

    def go_on(self) -> None:
        """Hand over what has gathered, when it is this connection's turn."""
        self._alone = False
        self._readiness.defer(self)
        self.tell_degraded(False)

    @property
    def backlog(self) -> int:
        """Messages that were read and could not be handed over yet."""
        return len(self._backlog or ())

    @property
    def unsettled(self) -> bool:
        """Open, with messages that are not settled yet."""
        acks = self._acks
        return self.state == OPEN and acks is not None and acks.settled < self.received

    def forget_routes(self) -> None:
        """Look every route up anew: the table has changed. What is in flight keeps its old lane."""
        self._lanes = {}
        self._last_lane = None

    # What the client is told

    def _greet(self) -> None:
        if self.subprotocol is not None:
            limits = self._limits
            self._tell(
                notices.welcome(
                    connection_id=self.connection_id,
                    principal=self.principal,
                    max_message_bytes=limits.max_message_bytes,
                    ping_interval_s=limits.ping_interval_s,
                    ack_interval_ms=self._context.ack_interval_ms,
                )
            )

    def _tell(self, message: dict[str, object]) -> None:
        if self.subprotocol is None:
            return
        encoded = notices.encode(message, self.subprotocol)
        if isinstance(encoded, str):
            self.send(frames.TEXT, encoded.encode())
        else:
            self.send(frames.BINARY, encoded)

    def send_notices(self) -> None:
        """Send what has gathered for the client since the last time."""
        rejections, self._rejections = self._rejections, None
        for reason, (count, last) in (rejections or {}).items():
            self._tell(notices.rejected(count, reason, last))
        acks = self._acks
        if acks is not None and acks.settled > acks.told:
            acks.told = acks.settled
            self._tell(notices.ack(acks.settled))

    def _last_words(self) -> None:
        self.send_notices()

    def tell_degraded(self, degraded: bool) -> None:
        """Say once that reading has stopped, and once that it goes on: not while this connection waits alone."""
        degraded = degraded or self._alone
        if degraded != self._degraded:
            self._degraded = degraded
            self._tell(notices.degraded() if degraded else notices.recovered())

    def announce_restart(self) -> bool:
        """Say that the connection will be closed soon; true when the client understands such notices.

        A client that does sends nothing more, so that it can be told of everything it sent before the close.
        """
        self._announce(catalogue.CLOSE_RESTART, catalogue.CLOSE_RESTART.reason)
        return self.subprotocol is not None

    def _announce(self, close: Close, reason: str) -> None:
        if self.subprotocol is not None and self.state == OPEN and not self._announced:
            self._announced = True
            window_ms = self._context.reconnect_window_ms if close.advice.reconnects else 0
            self._tell(notices.closing(close.code, reason, random.randint(0, window_ms)))  # noqa: S311  # jitter

    # Looked after by Heartbeat

    def tick(self, now: float) -> None:
        remaining_s = self.principal.expires_at + self._context.leeway_s() - time.time()
        if remaining_s <= 0:
            self.close(catalogue.CLOSE_TOKEN_EXPIRED)
            return
        super().tick(now)
        self.due = min(self.due, now + remaining_s)

    # What the log is told

    def _log_failure(self, close: Close, detail: str) -> None:
        self._log(self._context.log_refused, "connection failed", code=close.code, detail=detail)

    def _log_crash(self, error: Exception) -> None:
        self._log(self._context.log_crash, "session crashed", exc_info=error)

    def _log(self, write: RateLimited, event: str, **fields: object) -> None:
        write(event, connection=self.connection_id, user_id=self.principal.user_id, **fields)
