"""When to try again, and whether at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from gateway.core import catalogue
from gateway.core.backoff import Doubling
from gateway.core.catalogue import Advice
from gateway.errors import ConnectionLost, HandshakeRejected

if TYPE_CHECKING:
    from gateway.client.connection import Connection

FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0


class Backoff:
    """Delays between attempts, doubling from `FIRST_DELAY_S` to `MAX_DELAY_S`, each between half of it and all."""

    def __init__(self) -> None:
        self._delays = Doubling(FIRST_DELAY_S, MAX_DELAY_S)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._delays.reset()

    def next_s(self, at_least_s: float = 0.0) -> float:
        """The next delay; ``at_least_s`` is what the server asked for."""
        delay_s = self._delays.next_s()
        return max(at_least_s, random.uniform(delay_s / 2, delay_s))  # noqa: S311  # jitter


def delay_or_raise(error: Exception, connection: Connection | None, backoff: Backoff) -> float:
    """How long to wait before the next attempt; raises what another attempt would meet again.

    The catalogue says which is which. A handshake that wants a new token is final: the token was asked for just now.
    """
    if isinstance(error, HandshakeRejected):
        if catalogue.refusal_advice(error.status, error.code) is not Advice.LATER:
            raise error
        return backoff.next_s(error.retry_after_s or 0.0)
    if isinstance(error, ConnectionLost) and not catalogue.close_advice(error.code).reconnects:
        raise error
    if connection is not None and connection.closing:
        return backoff.next_s(float(connection.closing["reconnect_after_ms"]) / 1000)
    return backoff.next_s()
