"""A connection whose messages are routed: the envelope's header judged, its bytes handed to Kafka.

Everything here runs inside `Readiness`' turn, synchronously. One connection's messages are handed over in the order
in which they were received: when the producer has no room, and while handing over is paused, they wait in ``_backlog``,
in order, up to the connection's share; then it is not read any more. Pings and a close are answered meanwhile. What a
connection leaves behind in its backlog is handed over without it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

import trio

from gateway.core import catalogue, notices
from gateway.core.envelope import NO_PATTERN, head, is_timestamp, parse, repeats, tracing_stamp
from gateway.core.pairs import LOOK_S
from gateway.core.tenants import Over
from gateway.core.verdict import NOT_AN_ENVELOPE, Verdict, judge
from gateway.errors import NotAnEnvelope
from gateway.kafka.producer import PRODUCE_ERRORS
from gateway.router.controls import Controls
from gateway.router.delivery import Room
from gateway.router.inspection import symbols_of
from gateway.router.talk import Talk
from gateway.ws.handler import ENDED, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gateway.core.catalogue import Close, Reason
    from gateway.core.envelope import Pattern
    from gateway.core.principal import Principal
    from gateway.core.protection import Protection
    from gateway.core.tenants import User
    from gateway.router.controls import Tokens
    from gateway.router.delivery import Delivery
    from gateway.router.inspection import Inspection
    from gateway.router.lanes import Lane
    from gateway.telemetry.logging import RateLimited
    from gateway.ws.frames import Payload
    from gateway.ws.handler import Link
    from gateway.ws.readiness import Readiness


# long: the hot path and what holds it up belong together; what is told is in `gateway.router.talk`

RESUMED_MESSAGES: Final = 256
"""Messages of a backlog handed over before another connection's turn: about a millisecond."""
ITEM_BYTES: Final = 64
"""What a message in a backlog takes beside its bytes."""


def _weight(messages: Iterable[bytes]) -> int:
    """Bytes that messages take in a backlog, about."""
    return sum(ITEM_BYTES + len(message) for message in messages)


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What all sessions share."""

    readiness: Readiness
    delivery: Delivery
    inspection: Inspection
    throttled: Callable[[User, int, str], None]
    """Told of every drop over a limit: whose messages, how many, and why."""
    ack_interval_ms: int
    reconnect_window_ms: int
    """``closing.reconnect_after_ms`` is drawn from 0 to this, so that clients do not all come back at once."""
    tokens: Tokens
    trip: Callable[[User], None]
    """Called when too much of what a user sends is rejected or dropped: it is shut out (`gateway.router.sessions`)."""
    protection: Protection
    notify: Callable[[Session], None]
    """Called when a session has something to say that may wait for ``ack_interval_ms``."""
    log_rejected: RateLimited
    """Takes lines that clients cause: broken frames, dead letters."""
    log_crash: RateLimited


class Home(Protocol):
    """Where sessions are kept (`gateway.router.sessions`)."""

    def leave(self, session: Session, outcome: str) -> None:
        """The session's connection is over."""

    def renewed(self, session: Session) -> None:
        """The session has a newer token."""


class Session:
    """An authenticated connection: the handler of what it receives, the sender of what it hands over."""

    __slots__ = (
        "_alone",
        "_backlog",
        "_context",
        "_controls",
        "_due_close",
        "_edition",
        "_held_bytes",
        "_home",
        "_key",
        "_lanes",
        "_last_lane",
        "_last_pattern",
        "_look_at",
        "_subprotocol",
        "_talk",
        "account",
        "connection",
        "connection_id",
        "path",
        "principal",
        "received_messages",
        "user",
    )

    def __init__(
        self,
        context: SessionContext,
        home: Home,
        *,
        connection_id: str,
        principal: Principal,
        user: User,
        account: str,
        path: str,
        subprotocol: str | None,
    ) -> None:
        self._context = context
        self._home = home
        self.user = user
        self._look_at = 0.0 if context.inspection.wanted else math.inf  # into the ticks of a message
        self._key = b""  # the user_id, from the first lane on: an idle connection needs none
        self._lanes: dict[str, Lane] = {}
        self._last_lane: Lane | None = None
        self._last_pattern: Pattern = NO_PATTERN
        self._edition = context.delivery.edition
        self._backlog: deque[bytes | Over] | None = None
        self._held_bytes = 0
        self._alone = False
        self._due_close: Close | None = None  # once there is a connection
        self._subprotocol = subprotocol
        self._talk: Talk | None = None
        self._controls: Controls | None = None
        self.connection: Link | None = None
        self.connection_id = connection_id
        self.principal = principal
        self.account = account
        self.path = path
        self.received_messages = 0
        """Messages handed over so far: the index, from 1, of the last one."""

    # Its connection (the handler of `gateway.ws.handler`)

    def opened(self, connection: Link) -> None:
        """The handshake is done."""
        self.connection = connection
        if self._subprotocol in notices.CONTROL_SUBPROTOCOLS:
            self._talk = Talk(connection, self._subprotocol)
            self._talk.send_welcome(self.connection_id, self.principal, self.user, self._context.ack_interval_ms)
        if self._due_close is not None:
            self._close(self._due_close)

    def received(self, messages: Sequence[Payload]) -> None:
        """Hand over what one read brought, or keep it while that may not be; what is over a limit is dropped.

        Text is control messages, which are answered at once.
        """
        if self._talk is not None and str in map(type, messages):
            messages = self._take_controls(messages)
        readiness = self._context.readiness
        # hot: once a read, for all that it brought; what is over the rate, and budgets of the company, are looked at in
        # `User.grant`
        now, user, over = readiness.now, self.user, None
        count, limits = len(messages), user.company.limits
        full_at = (user.full_at if user.full_at > now else now) + count * limits.pace * user.weight
        if full_at - now <= limits.allowance:
            user.full_at = full_at
        else:
            over = user.grant(messages, now, datetime.now(UTC))  # type: ignore[arg-type]
            if over is not None:
                messages = messages[: count - over.dropped]
        # Bytes alone are left; `typing.cast` would be a call.
        if self._backlog is not None or readiness.paused:
            self._hold(messages)  # type: ignore[arg-type]
        else:
            self._hand_over(messages)  # type: ignore[arg-type]
        if over is not None:
            self._drop_next(over)
        if now >= self._look_at:
            self._inspect(messages, now)

    def tick(self, now: float) -> float:
        """Close when the token has ended."""
        tokens = self._context.tokens
        remaining_s = self.principal.expires_at + tokens.leeway_s - time.time()
        if self.connection is not None:
            if remaining_s <= 0:
                self.connection.close(catalogue.CLOSE_TOKEN_EXPIRED)
            elif tokens.is_revoked(self.principal):
                self.connection.close(catalogue.CLOSE_TOKEN_REVOKED)
        return now + remaining_s

    def closing(self, close: Close | None, detail: str) -> None:
        """Say what has gathered, and that the connection is about to be closed."""
        if close is not None and detail:
            self._log(self._context.log_rejected, "connection failed", code=close.code, detail=detail)
        if self._talk is not None:
            self._talk.send_notices()
            if close is not None:
                self._talk.announce(close, detail or close.reason, self._context.reconnect_window_ms)

    def crashed(self, error: Exception) -> None:
        """Say that this session's code raised."""
        self._log(self._context.log_crash, "session crashed", exc_info=error)

    def ended(self, outcome: str) -> None:
        """Give back what it took; what is left in its backlog is handed over without it."""
        self._home.leave(self, outcome)
        self._forget_lanes()  # they know it: both would wait for the garbage collector

    # Limits

    def _drop_next(self, over: Over) -> None:
        """Drop what was over a limit, behind everything that came before it."""
        if self._backlog:
            self._backlog.append(over)
        else:
            self._drop(over)

    def _drop(self, over: Over) -> None:
        """Drop messages as they came: counted, settled, and told."""
        self._context.delivery.drop(self, over.reason, over.dropped, over.size)
        if self._talk is not None:
            first = self.received_messages + 1
            for index in range(first, first + over.dropped):
                self._talk.settle(index)
            self._talk.note_throttled(over.reason.scope, over.dropped, over.messages_per_second, over.retry_after_ms)
            self._context.notify(self)
        self._context.throttled(self.user, over.dropped, over.reason)
        self.received_messages += over.dropped
        self.user.count(self._context.readiness.now, came=over.dropped)
        self._note_failed(over.dropped)

    def _note_failed(self, count: int) -> None:
        """So many of the user's messages were rejected or dropped: that may be too much."""
        user, context = self.user, self._context
        now = context.readiness.now
        user.count(now, failed=count)
        if context.protection.trips(user, now):
            context.trip(user)

    def _inspect(self, messages: Sequence[Payload], now: float) -> None:
        """Look into one message for the pairs that the user streams."""
        inspection = self._context.inspection
        self._look_at = now + LOOK_S if inspection.wanted else math.inf
        symbols = symbols_of(messages[-1]) if messages and isinstance(messages[-1], bytes) else ()
        if not symbols or not self.user.note_pairs(symbols, now):
            return
        inspection.over.add()
        if self._talk is not None:
            self._talk.note_throttled("pairs", 0, 0, int(LOOK_S * 1000))
            self._context.notify(self)
        if self.user.pairs is not None and self.user.pairs.is_out_of_patience(now):
            self._context.trip(self.user)

    # Control messages

    def _take_controls(self, messages: Sequence[Payload]) -> Sequence[Payload]:
        """Answer the control messages among what one read brought; returns the others."""
        assert self._talk is not None  # noqa: S101  # text is taken from nobody else
        now = trio.current_time()
        if self._controls is None:
            self._controls = Controls(self, now)
        for message in messages:
            if isinstance(message, str) and self.connection is not None and self.connection.state == OPEN:
                answer, close = self._controls.take(message, now)
                self._talk.tell(answer)
                if close is not None:
                    self.connection.close(close)
        return [message for message in messages if not isinstance(message, str)]

    @property
    def tokens(self) -> Tokens:
        """Which tokens count."""
        return self._context.tokens

    def renew(self, principal: Principal) -> None:
        """A newer token of the same user counts from now on."""
        self.principal = principal
        self._home.renewed(self)

    # Judging

    def _hand_over(self, messages: Sequence[bytes]) -> None:  # long: one hot loop
        """Route messages that were accepted when they were read, whatever has become of the connection since.

        Those there is no room for go into the backlog, in front.
        """
        delivery, user, now = self._context.delivery, self.user, self._context.readiness.now
        if now >= user.slice_ends:
            user.roll(now)
        user.came += len(messages)
        if self._edition != delivery.edition:
            self._look_up_anew(delivery)
        produce, key = delivery.produce, self._key
        lane, pattern = self._last_lane, self._last_pattern
        refused: Room | None = None
        rest = iter(messages)
        # hot: the plain case in one go, with locals for all that a message touches; `Tally.receive` says the same, in
        # a call more. Whatever is not plain takes `_route`, which parses nothing twice. bench/micro.py has the gain.
        for raw in rest:
            size = len(raw)
            if (
                lane is None
                or size != pattern.length
                or not raw.startswith(pattern.start)
                or not is_timestamp(raw, pattern.tail)
            ):
                judged = self._judge(raw)
                if isinstance(judged, Verdict):
                    refused = self._route(raw, judged)
                    if refused is not None:
                        break
                    continue
                lane, pattern, key = judged, self._last_pattern, self._key
            try:
                produce(lane.topic, raw, key, -1, lane)
            except PRODUCE_ERRORS:
                refused = self._send(lane, lane.tally.message_type, raw, b"")
                if refused is not None:
                    break
                continue
            lane.waiting.append(raw)
            tally = lane.tally
            tally.received += 1
            tally.received_bytes += size
            tally.in_flight += 1
            tally.in_flight_bytes += size
            self.received_messages += 1
            if lane.indices is not None:
                lane.indices.append(self.received_messages)
        if refused is not None:
            self._put_back([raw, *rest], refused)

    def _judge(self, raw: bytes) -> Lane | Verdict:
        """The lane of a message that goes out as it came, the verdict on any other.

        A message that repeats the last one's header needs no other verdict (`gateway.core.envelope`).
        """
        lane = self._last_lane
        pattern = repeats(raw, lane.head) if lane is not None and lane.head else None
        if lane is None or pattern is None:
            try:
                envelope = parse(raw)
            except NotAnEnvelope:
                return NOT_AN_ENVELOPE
            verdict = judge(envelope, self.principal, self._context.delivery.routes)
            if not verdict.plain:
                return verdict
            lane = self._lane(verdict)
            if lane.parked or lane.tally.message_type != verdict.message_type:
                return verdict
            if not lane.head:
                lane.learn(head(raw))
            self._last_lane = lane
        self._last_pattern = pattern or NO_PATTERN
        return lane

    def _route(self, raw: bytes, verdict: Verdict) -> Room | None:
        """Hand over one message that is not plain: to its topic, or as a dead letter. Returns why it was not taken."""
        if verdict.reason is not None:
            room = self._context.delivery.dead_letter(self, raw, verdict.reason, self.received_messages + 1)
            if room is not Room.TAKEN:
                return room
            self.received_messages += 1
            self._log(self._context.log_rejected, "message rejected", reason=verdict.reason)
            self._note_failed(1)
            return None
        stamp = verdict.stamp
        if verdict.traced:
            stamp += tracing_stamp(f"{self.connection_id}-{self.received_messages + 1}")
        return self._send(self._lane(verdict), verdict.message_type, raw, stamp)

    def _send(self, lane: Lane, message_type: str, raw: bytes, stamp: bytes) -> Room | None:
        room = self._context.delivery.send(lane, message_type, raw, stamp, self.received_messages + 1)
        if room is not Room.TAKEN:
            return room
        self.received_messages += 1
        return None

    def _lane(self, verdict: Verdict) -> Lane:
        """The session's one lane to a topic."""
        lane = self._lanes.get(verdict.topic)
        if lane is None:
            acked = self._talk is not None
            lane = self._context.delivery.open_lane(self, verdict.topic, verdict.message_type, acked=acked)
            self._lanes[verdict.topic] = lane
            self._key = self._key or self.principal.user_id.encode()
        return lane

    def _look_up_anew(self, delivery: Delivery) -> None:
        """The routes have changed, or which partitions take anything."""
        self._edition = delivery.edition
        self._last_lane = None
        for lane in self._lanes.values():
            delivery.look_again(lane)

    def _forget_lanes(self) -> None:
        """Open them anew; what is in flight keeps the old ones."""
        self._lanes = {}
        self._last_lane = None

    # What waits

    def _hold(self, messages: Sequence[bytes]) -> None:
        """Keep messages that cannot be handed over now, in order."""
        readiness = self._context.readiness
        if self._backlog is None:
            self._backlog = deque()
            readiness.defer(self)
        self._backlog.extend(messages)
        self._note_held(_weight(messages))
        if self.connection is not None and not readiness.may_hold(self._held_bytes):
            self.connection.want_read(False)  # until `_forget_backlog`

    def _put_back(self, messages: list[bytes], room: Room) -> None:
        """There is no room: these go first when there is, and everybody waits, or only this session."""
        if self._backlog is None:
            self._backlog = deque()
        self._backlog.extendleft(reversed(messages))
        self.user.came -= len(messages)  # hot: counted when they are handed over
        self._note_held(_weight(messages))
        if room is Room.NONE:
            self._context.readiness.stall(self)
        elif not self._alone:  # it has been let go on meanwhile
            self._context.readiness.defer(self)

    def _note_held(self, change: int) -> None:
        self._held_bytes += change
        self._context.readiness.note_held(change)

    def resume(self) -> None:
        """Hand over some of the backlog."""
        backlog = self._backlog
        if backlog is None:
            return
        if self.connection is None or self.connection.state == ENDED:
            self._forget_lanes()  # its company's books may have been closed since the last time
        chunk: list[bytes] = []
        while backlog and len(chunk) < RESUMED_MESSAGES and isinstance(backlog[0], bytes):
            chunk.append(backlog.popleft())  # type: ignore[arg-type]  # as seen
        self._note_held(-_weight(chunk))
        left = len(backlog)
        try:
            self._hand_over(chunk)
            if len(backlog) > left:
                return  # `_put_back` has said what is next
            while backlog and isinstance(backlog[0], Over):
                self._drop(backlog.popleft())  # type: ignore[arg-type]  # as seen
        except BaseException:
            self._forget_backlog()
            raise
        if backlog:
            self._context.readiness.defer(self)
        else:
            self._forget_backlog()

    def _forget_backlog(self) -> None:
        self._note_held(-self._held_bytes)
        self._backlog = None
        self.resume_reading()

    @property
    def is_open(self) -> bool:
        """Its connection is open."""
        return self.connection is not None and self.connection.state == OPEN

    @property
    def is_read(self) -> bool:
        """What its client sends is read at the moment."""
        return self.connection is not None and self.connection.is_read

    @property
    def held_bytes(self) -> int:
        """What it holds in memory, about: what is not handed over, and what its peer has not taken."""
        return self._held_bytes + (self.connection.unsent_bytes if self.connection is not None else 0)

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`, or until what it holds has been handed over."""
        if self.connection is not None:
            self.connection.want_read(False)

    def resume_reading(self) -> None:
        """Read again, if what it holds allows that."""
        if self.connection is not None and self._context.readiness.may_hold(self._held_bytes):
            self.connection.want_read(True)

    def crash(self, error: Exception) -> None:
        """End the connection because handing over its backlog, or a notice, has raised."""
        if self.connection is None or self.connection.state == ENDED:
            self.crashed(error)  # the connection knows its handler no longer
        else:
            self.connection.crash(error)

    def revoke(self, close: Close) -> None:
        """The place is another's: close the connection, once there is one. Never raises."""
        try:
            self._close(close)
        except Exception as error:  # the barrier around each connection
            self.crash(error)

    def _close(self, close: Close) -> None:
        """Start the close handshake, once there is a connection; before a restart, what was under way is taken."""
        self._due_close = close
        if self.connection is not None:
            self.connection.close(close, take_rest=close is catalogue.CLOSE_RESTART)

    @property
    def backlog(self) -> int:
        """Messages that were read and could not be handed over yet."""
        return len(self._backlog or ())

    # What becomes of its messages (the Sender of `gateway.router.messages`)

    def settle(self, index: int | None) -> None:
        """Message ``index`` is in Kafka, in the spool, or dropped and reported."""
        if self._talk is not None and index is not None and self._talk.settle(index):
            self._context.notify(self)

    def note_rejected(self, reason: Reason, index: int | None) -> None:
        """Message ``index`` has become a dead letter."""
        if self._talk is not None and index is not None:
            self._talk.note_rejected(reason, index)
            self._context.notify(self)

    def wait_alone(self) -> None:
        """This user's partition takes nothing: hold what comes; nobody else waits with it."""
        self._alone = True
        if self._backlog is None:
            self._backlog = deque()
        self.tell_degraded(True)

    def go_on(self) -> None:
        """Hand over what has gathered, when it is this connection's turn."""
        self._alone = False
        self._context.readiness.defer(self)
        self.tell_degraded(False)

    def keep(self) -> bool:
        """A message that is given up is nowhere else."""
        return False

    # What the client is told

    @property
    def unsettled(self) -> bool:
        """Open, with messages that are not settled yet."""
        return self.is_open and self._talk is not None and self._talk.is_unsettled(self.received_messages)

    def send_notices(self) -> None:
        """Send what has gathered for the client since the last time."""
        if self._talk is not None and self._talk.send_notices(trio.current_time()):
            self._context.notify(self)

    def tell_degraded(self, degraded: bool) -> None:
        """Say once that reading has stopped, and once that it goes on: not while this connection waits alone."""
        if self._talk is not None:
            self._talk.tell_degraded(degraded or self._alone)

    def announce_restart(self) -> bool:
        """Say that the connection will be closed soon; true when the client understands such notices.

        A client that does sends nothing more, so that it can be told of everything it sent before the close.
        """
        if self._talk is None:
            return False
        close = catalogue.CLOSE_RESTART
        self._talk.announce(close, close.reason, self._context.reconnect_window_ms)
        return True

    def close_for_restart(self) -> None:
        """Start the close handshake, once there is a connection; what was under way is still taken."""
        self._close(catalogue.CLOSE_RESTART)

    def _log(self, write: RateLimited, event: str, **fields: object) -> None:
        write(event, connection=self.connection_id, user_id=self.principal.user_id, **fields)
