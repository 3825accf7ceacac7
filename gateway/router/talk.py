"""What a client that negotiated notices is told (`gateway.core.notices`): welcome, acks, rejections, and what is wrong.

Acks and rejections gather until `Talk.send_notices`; everything else is said at once. A client that negotiated none,
which a plain MT5 client is, has no `Talk`, and nobody counts its acks.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.core import notices
from gateway.core.acks import Acks
from gateway.ws import frames

if TYPE_CHECKING:
    from gateway.core.catalogue import Close, Reason
    from gateway.core.principal import Principal
    from gateway.core.tenants import User
    from gateway.ws.handler import Link


THROTTLE_S: Final = 1.0
"""``throttle`` is told once in this time at most."""


class Throttle(NamedTuple):
    """What one ``throttle`` says."""

    scope: str
    dropped: int
    messages_per_second: float
    retry_after_ms: int


class Throttles:
    """What was over limits and is not told yet."""

    __slots__ = ("told_at", "untold")

    def __init__(self) -> None:
        self.untold: dict[str, Throttle] = {}
        """By scope."""
        self.told_at = -math.inf

    def add(self, new: Throttle) -> None:
        """So much more."""
        old = self.untold.get(new.scope)
        self.untold[new.scope] = new if old is None else new._replace(dropped=old.dropped + new.dropped)

    def take(self, now: float) -> list[Throttle]:
        """All of it, told at ``now``."""
        untold, self.untold, self.told_at = self.untold, {}, now
        return [*untold.values()]


class Talk:
    """One connection's notices."""

    __slots__ = ("_acks", "_announced", "_connection", "_degraded", "_rejections", "_subprotocol", "_throttles")

    def __init__(self, connection: Link, subprotocol: str) -> None:
        self._connection = connection
        self._subprotocol = subprotocol
        self._acks = Acks()
        self._rejections: dict[Reason, tuple[int, int]] | None = None
        self._throttles: Throttles | None = None
        self._announced = False
        self._degraded = False

    def tell(self, message: dict[str, object]) -> None:
        """Say one thing at once."""
        encoded = notices.encode(message, self._subprotocol)
        if isinstance(encoded, str):
            self._connection.send(frames.encode(frames.TEXT, encoded.encode()))
        else:
            self._connection.send(frames.encode(frames.BINARY, encoded))

    def send_welcome(self, connection_id: str, principal: Principal, user: User, ack_interval_ms: int) -> None:
        """Say who the client is and what holds for it."""
        limits = self._connection.limits
        self.tell(
            notices.welcome(
                connection_id=connection_id,
                principal=principal,
                tier=user.company.tier,
                limits=user.company.limits,
                max_message_bytes=limits.max_message_bytes,
                ping_interval_s=limits.ping_interval_s,
                ack_interval_ms=ack_interval_ms,
            )
        )

    def settle(self, index: int) -> bool:
        """Message ``index`` is settled; true when there is something to tell now, and was not before."""
        return self._acks.settle(index)

    def note_rejected(self, reason: Reason, index: int) -> None:
        """Message ``index`` was rejected."""
        if self._rejections is None:
            self._rejections = {}
        count, last = self._rejections.get(reason, (0, 0))
        self._rejections[reason] = (count + 1, max(last, index))

    def note_throttled(self, scope: str, dropped: int, messages_per_second: float, retry_after_ms: int) -> None:
        """Over a limit of this ``scope``; so many messages were dropped for it."""
        if self._throttles is None:
            self._throttles = Throttles()
        self._throttles.add(Throttle(scope, dropped, messages_per_second, retry_after_ms))

    def send_notices(self, now: float = math.inf) -> bool:
        """Send what has gathered since the last time; true when something has to wait, as ``throttle`` may, which is
        sent once in `THROTTLE_S` at most. ``now`` is in Trio's seconds; without it nothing waits."""
        rejections, self._rejections = self._rejections, None
        for reason, (count, last) in (rejections or {}).items():
            self.tell(notices.rejected(count, reason, last))
        waits = self._throttles is not None and not self._send_throttles(self._throttles, now)
        acks = self._acks
        if acks.settled > acks.told:
            acks.tell()
            self.tell(notices.ack(acks.settled))
        return waits

    def _send_throttles(self, throttles: Throttles, now: float) -> bool:
        """False when it is not time yet."""
        if not throttles.untold:
            return True
        if now < throttles.told_at + THROTTLE_S:
            return False
        for one in throttles.take(now):
            self.tell(notices.throttle(one.dropped, one.scope, one.messages_per_second, one.retry_after_ms))
        return True

    def is_unsettled(self, received: int) -> bool:
        """Whether some of ``received`` messages are not settled yet."""
        return self._acks.settled < received

    def tell_degraded(self, degraded: bool) -> None:
        """Say once that reading has stopped, and once that it goes on."""
        if degraded != self._degraded:
            self._degraded = degraded
            self.tell(notices.degraded() if degraded else notices.recovered())

    def announce(self, close: Close, reason: str, reconnect_window_ms: int) -> None:
        """Say once that the connection is about to be closed, and when to come back if that may help."""
        if not self._announced:
            self._announced = True
            window_ms = reconnect_window_ms if close.advice.reconnects else 0
            self.tell(notices.closing(close.code, reason, random.randint(0, window_ms)))  # noqa: S311  # jitter
