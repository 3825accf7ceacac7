"""What a client that negotiated notices is told (`gateway.core.notices`): welcome, acks, rejections, and what is wrong.

Acks and rejections gather until `Talk.send_notices`; everything else is said at once. A client that negotiated none,
which a plain MT5 client is, has no `Talk`, and nobody counts its acks.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from gateway.core import notices
from gateway.core.acks import Acks
from gateway.ws import frames

if TYPE_CHECKING:
    from gateway.core.catalogue import Close, Reason
    from gateway.core.principal import Principal
    from gateway.ws.handler import Link


class Talk:
    """One connection's notices."""

    __slots__ = ("_acks", "_announced", "_connection", "_degraded", "_rejections", "_subprotocol")

    def __init__(self, connection: Link, subprotocol: str) -> None:
        self._connection = connection
        self._subprotocol = subprotocol
        self._acks = Acks()
        self._rejections: dict[Reason, tuple[int, int]] | None = None
        self._announced = False
        self._degraded = False

    def _tell(self, message: dict[str, object]) -> None:
        encoded = notices.encode(message, self._subprotocol)
        if isinstance(encoded, str):
            self._connection.send(frames.encode(frames.TEXT, encoded.encode()))
        else:
            self._connection.send(frames.encode(frames.BINARY, encoded))

    def send_welcome(self, connection_id: str, principal: Principal, ack_interval_ms: int) -> None:
        """Say who the client is and what holds for it."""
        limits = self._connection.limits
        self._tell(
            notices.welcome(
                connection_id=connection_id,
                principal=principal,
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

    def send_notices(self) -> None:
        """Send what has gathered since the last time."""
        rejections, self._rejections = self._rejections, None
        for reason, (count, last) in (rejections or {}).items():
            self._tell(notices.rejected(count, reason, last))
        acks = self._acks
        if acks.settled > acks.told:
            acks.tell()
            self._tell(notices.ack(acks.settled))

    def is_unsettled(self, received: int) -> bool:
        """Whether some of ``received`` messages are not settled yet."""
        return self._acks.settled < received

    def tell_degraded(self, degraded: bool) -> None:
        """Say once that reading has stopped, and once that it goes on."""
        if degraded != self._degraded:
            self._degraded = degraded
            self._tell(notices.degraded() if degraded else notices.recovered())

    def announce(self, close: Close, reason: str, reconnect_window_ms: int) -> None:
        """Say once that the connection is about to be closed, and when to come back if that may help."""
        if not self._announced:
            self._announced = True
            window_ms = reconnect_window_ms if close.advice.reconnects else 0
            self._tell(notices.closing(close.code, reason, random.randint(0, window_ms)))  # noqa: S311  # jitter
