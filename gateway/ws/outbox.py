"""What one connection has to say and its peer has not taken yet: whole frames, oldest first.

Frames come encoded (`gateway.ws.frames.encode`), so one that many connections send is encoded once. Whatever is put in
during a turn of `gateway.ws.readiness` goes out in one send when the turn ends. What the peer does not take is bounded;
`Full` says what becomes of a frame for which there is no room.
"""

from __future__ import annotations

import ssl
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

BLOCKED: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError)
WRITE_BLOCKED: Final = (*BLOCKED, ssl.SSLWantWriteError)


class Full(Enum):
    """What a connection does with a frame that finds its outbox full."""

    END = "the peer is too slow: its connection ends"
    REFUSE = "the frame is not taken, and whoever wanted to send it knows"


class Outbox:
    """Frames that wait. It exists only while there are some: an idle connection has none."""

    __slots__ = ("_frames", "_sent", "size_bytes", "waiting_since")

    def __init__(self, now: float) -> None:
        self._frames: deque[bytes] = deque()
        self._sent = 0  # bytes of the first frame that the socket has taken
        self.size_bytes = 0
        """Bytes that wait."""
        self.waiting_since = now
        """When the peer last took anything, or the outbox was empty; in Trio's seconds."""

    def __bool__(self) -> bool:
        return bool(self._frames)

    def put(self, frame: bytes) -> None:
        """Add a frame behind all others."""
        self._frames.append(frame)
        self.size_bytes += len(frame)

    def send(self, sock: socket.socket, now: float) -> None:
        """Offer all of it to a non-blocking socket, in one send. Raises OSError, but not because it would block."""
        frames = self._frames
        if not frames:
            return
        first = frames[0][self._sent :] if self._sent else frames[0]
        try:
            sent = sock.send(first if len(frames) == 1 else b"".join((first, *list(frames)[1:])))
        except WRITE_BLOCKED:
            return
        self.waiting_since = now
        self.size_bytes -= sent
        sent += self._sent
        while frames and sent >= len(frames[0]):
            sent -= len(frames.popleft())
        self._sent = sent
