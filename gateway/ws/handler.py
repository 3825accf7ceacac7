"""What stands behind a connection: its handler, and what that may do with it.

`gateway.ws` reads, writes, pings and closes; what messages mean is the handler's business. A handler knows its
connection as a `Link`, so that it can be tried without a socket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from gateway.ws import frames
from gateway.ws.outbox import Full

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.core.catalogue import Close
    from gateway.ws.frames import Payload

OPEN: Final = 0
CLOSING: Final = 1
ENDED: Final = 2
"""The states of a connection (`gateway.ws.connection`)."""

FLOOD_S: Final = 10
"""How long control frames may come faster than allowed. What one read brings counts as one second's worth at most: it
may have gathered while the gateway or the network stood still."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one connection; one instance is shared by all."""

    max_message_bytes: int
    max_controls_per_s: int
    """Control frames a second, over `FLOOD_S` of reading, before the connection is closed with 1008."""
    max_unsent_bytes: int
    """Bytes the peer has not taken yet."""
    unsent_timeout_s: float
    """How long bytes may wait for the peer to take them."""
    ping_interval_s: float
    idle_timeout_s: float
    """Silence, pongs included, after which the connection is closed with 4408."""
    close_timeout_s: float
    """How long the peer may take for its part of the close, and again for its end of file."""
    max_fragments: int = frames.MAX_FRAGMENTS
    max_text_bytes: int | None = None
    """Of a text message, where they are taken; None is ``max_message_bytes``."""
    when_full: Full = Full.END
    """What becomes of a frame beyond ``max_unsent_bytes``."""


class Link(Protocol):
    """A connection as its handler sees it; all methods are synchronous."""

    @property
    def limits(self) -> ConnectionLimits:
        """Its bounds."""

    @property
    def state(self) -> int:
        """`OPEN`, `CLOSING` or `ENDED`."""

    @property
    def due(self) -> float:
        """When it wants to be looked after (`tick`), in Trio's seconds."""

    @property
    def is_read(self) -> bool:
        """What the peer sends is read at the moment."""

    @property
    def unsent_bytes(self) -> int:
        """What the peer has not taken yet."""

    def tick(self, now: float) -> None:
        """Do what is due at ``now``."""

    def send(self, frame: bytes) -> bool:
        """Send one encoded frame; false when it was not taken."""

    def want_read(self, wanted: bool) -> None:
        """Say whether the peer is to be read."""

    def close(self, close: Close, *, take_rest: bool = False) -> None:
        """Start the close handshake; ``take_rest`` still takes what the peer sent before it answers."""

    def crash(self, error: Exception) -> None:
        """End with 1011 because of ``error``. Never raises."""


class Handler(Protocol):
    """What a connection's messages mean, and what is to be said to its peer. All methods are synchronous.

    They are called in the order opened, then any number of received and tick and at most one closing, then ended.
    What they raise ends the connection with 1011 (`crashed`), and nobody else's; what `ended` raises is logged.
    `opened` is not called when the peer went away before the handshake was answered; `ended` is, always and once.
    A handler that closes while it takes a list of messages gets no other; the rest of that list is its own to skip.
    """

    def opened(self, connection: Link, /) -> None:
        """The handshake is done: say the first words."""

    def received(self, messages: Sequence[Payload], /) -> None:
        """Whole messages, in order: bytes of binary ones, str of text ones."""

    def tick(self, now: float, /) -> float:
        """It is time: do what is due at ``now`` and return when to be asked again, both in Trio's seconds."""

    def closing(self, close: Close | None, detail: str, /) -> None:
        """A close frame is about to be sent: the last chance to say something.

        ``close`` is None when the peer closes; ``detail`` says what the peer did wrong, if it did.
        """

    def crashed(self, error: Exception, /) -> None:
        """Handling the connection's input, or one of these methods, has raised. The handler says so in the log."""

    def ended(self, outcome: str, /) -> None:
        """The connection is over and its socket closed; nothing is called after this.

        ``outcome``: a close's name, ``peer_closed``, ``peer_lost``, ``stalled_peer`` or ``cancelled``.
        """


class _Gone:
    """The handler of a connection that is over: both would wait for the garbage collector if it kept its own."""

    def opened(self, _: Link) -> None:
        """Nothing."""

    def received(self, _: Sequence[Payload]) -> None:
        """Nothing."""

    def tick(self, _: float) -> float:
        """Nothing."""
        return math.inf

    def closing(self, _: Close | None, __: str) -> None:
        """Nothing."""

    def crashed(self, _: Exception) -> None:
        """Nothing."""

    def ended(self, _: str) -> None:
        """Nothing."""


GONE: Final = _Gone()
