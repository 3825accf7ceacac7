"""JSON, a line for each message, over a stream of bytes: how workers and their parent talk about places."""

from __future__ import annotations

import json
from typing import Any, Final

import trio

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
"""A worker's 100,000 places are some 10 MB."""


class Lines:
    """One end of a stream. Sending keeps the order of the calls; raises trio.BrokenResourceError."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._received = b""

    async def send(self, *message: Any) -> None:
        """Send one message. Cancelled half-way, the stream is unusable."""
        async with self._sending:
            await self._stream.send_all(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def aclose(self) -> None:
        """Close the stream at once."""
        await trio.aclose_forcefully(self._stream)

    async def receive(self) -> list[Any] | None:
        """The next message, None when the other end has closed. Raises ValueError for what is none.

        One task may receive at a time; cancelled, nothing is lost.
        """
        while b"\n" not in self._received:
            if len(self._received) > MAX_LINE_BYTES:
                raise ValueError("a message without an end")
            data = await self._stream.receive_some()
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, list):
            raise ValueError("not a message")  # noqa: TRY004  # a line of another form, like any other
        return message
