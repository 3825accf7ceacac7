"""A client that loses nothing: it keeps every message until the gateway has acked it."""

from __future__ import annotations

import ssl
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio
import trio_websocket
from trio_util import AsyncValue

from gateway.client.backoff import Backoff, delay_or_raise
from gateway.client.connection import Connection, connect
from gateway.errors import ClientError, ConfigError, ConnectionLost, leaf
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_UNACKED: Final = 10_000
"""Messages kept by default, sent or not, before `GatewayClient.send` waits."""


class GatewayClient:
    """Sends at least once, over as many connections as it takes. Use `open_client`."""

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str],
        *,
        account: str | None,
        tls: ssl.SSLContext | None,
        max_unacked: int,
        say: Callable[[str], None],
    ) -> None:
        self._url = url
        self._token = token
        self._account = account
        self._tls = tls
        self._max_unacked = max_unacked
        self._say = say
        self._waiting: deque[MessageEnvelope] = deque()  # not sent on the present connection
        self._sent: deque[MessageEnvelope] = deque()  # sent on it and not acked
        self._acked_here = 0
        self._max_message_bytes = 65_536  # until a welcome says otherwise
        self._identity_bytes = 0
        self._backoff = Backoff()
        self._work = trio.Event()
        self._unacked = AsyncValue(0)
        self._leaving = trio.Event()
        self.acked = 0
        """Messages the gateway has settled."""
        self.rejected = 0
        """Messages that became dead letters; one that is sent again may be counted again."""
        self.resent = 0
        """Messages sent again after a connection was lost."""
        self.reconnects = 0

    @property
    def unacked(self) -> int:
        """Messages kept: not sent yet, or sent and not acked."""
        unacked: int = self._unacked.value
        return unacked

    async def send(
        self, message_type: str, payload: bytes, *, timestamp_ms: int | None = None, correlation_id: str = ""
    ) -> None:
        """Keep one message and let it be sent; waits while ``max_unacked`` are kept.

        Messages are sent in the order of these calls, and again in that order. Always a checkpoint; cancelled, nothing
        is kept. Raises TypeError or ValueError for what no envelope can hold, and for one larger than the gateway
        takes.
        """
        now_ms = time.time_ns() // 1_000_000
        message = MessageEnvelope(
            message_type=message_type,
            payload=payload,
            timestamp=now_ms if timestamp_ms is None else timestamp_ms,
            correlation_id=correlation_id,
        )
        size = message.ByteSize() + self._identity_bytes
        if size > self._max_message_bytes:
            raise ValueError(f"message of {size} bytes; the gateway takes {self._max_message_bytes}")
        await trio.lowlevel.checkpoint()
        while self.unacked >= self._max_unacked:
            await self._unacked.wait_value(lambda unacked: unacked < self._max_unacked)
        self._waiting.append(message)
        self._unacked.value += 1
        self._work.set()

    async def flush(self) -> None:
        """Wait until everything is acked. Bound it with a cancel scope where that may take too long."""
        await self._unacked.wait_value(0)

    async def run(self) -> None:
        """Keep a connection until `leave`. Raises ClientError for what another attempt would meet again."""
        while not self._leaving.is_set():
            connection: Connection | None = None
            delay_s = 0.0
            try:
                token = self._token if isinstance(self._token, str) else self._token()
                async with connect(self._url, token, account=self._account, tls=self._tls) as connection:
                    await self._talk(connection)
            except* (ClientError, OSError, trio.TooSlowError) as group:
                if not self._leaving.is_set():  # everything is acked then: how the connection ends does not matter
                    error = leaf(group)
                    delay_s = delay_or_raise(error, connection, self._backoff)
                    self._say(f"{error}; again in {delay_s:.1f} s")
                    self.reconnects += 1
            with trio.move_on_after(delay_s):
                await self._leaving.wait()

    def leave(self) -> None:
        """Close the connection and end `run`."""
        self._leaving.set()

    async def _talk(self, connection: Connection) -> None:
        """Send and take acks until told to leave. Raises ConnectionLost when the connection ends before."""
        self.resent += len(self._sent)
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._acked_here = 0
        welcome = connection.welcome
        self._max_message_bytes = welcome["limits"]["max_message_bytes"]
        self._identity_bytes = len(welcome["user_id"].encode()) + len(welcome["company_id"].encode()) + 8
        connection.tell(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all, connection)
            nursery.start_soon(self._until_lost, connection)
            nursery.start_soon(self._probe, connection)
            await self._leaving.wait()
            nursery.cancel_scope.cancel()

    async def _send_all(self, connection: Connection) -> None:
        while True:
            self._work = trio.Event()
            # After a closing notice nothing more is sent: what the gateway has is acked before it closes. One that is
            # degraded keeps little, and would soon not even see a ping behind what it does not read.
            while self._waiting and not connection.closing and not connection.degraded:
                message = self._waiting[0]
                message.user_id = connection.welcome["user_id"]
                message.company_id = connection.welcome["company_id"]
                # Counted as sent before it is: its ack may come before `send` returns.
                self._sent.append(self._waiting.popleft())
                await connection.send(message.SerializeToString())
            await self._work.wait()

    async def _until_lost(self, connection: Connection) -> None:
        await connection.ended.wait()
        closed = connection.socket.closed
        raise ConnectionLost(closed.code if closed else 1006, (closed and closed.reason) or "")

    async def _probe(self, connection: Connection) -> None:
        """Ping as often as the gateway does; a peer that is gone without a word is found out."""
        interval_s = float(connection.welcome["ping_interval_s"])
        while True:
            await trio.sleep(interval_s)
            if connection.degraded:
                continue
            with trio.move_on_after(2 * interval_s) as waiting:
                try:
                    await connection.socket.ping()
                except trio_websocket.ConnectionClosed:
                    return  # `_until_lost` says so
            if waiting.cancelled_caught and not connection.degraded:
                raise ConnectionLost(1006, f"no answer to a ping within {2 * interval_s:g} s")

    def take_recovered(self) -> None:
        """The gateway hands over again."""
        self._work.set()

    def take_rejected(self, count: int) -> None:
        """``count`` messages have become dead letters."""
        self.rejected += count

    def take_ack(self, count: int) -> None:
        """The first ``count`` messages of this connection are settled. Raises ValueError for what cannot be."""
        self._backoff.reset()  # it works: not only does it accept connections
        settled = count - self._acked_here
        if not 0 <= settled <= len(self._sent):
            raise ValueError(f"ack of {count} messages, {self._acked_here + len(self._sent)} were sent")
        for _ in range(settled):
            self._sent.popleft()
        self._acked_here = count
        self.acked += settled
        self._unacked.value -= settled


@asynccontextmanager
async def open_client(
    url: str,
    token: str | Callable[[], str],
    *,
    account: str | None = None,
    tls: ssl.SSLContext | None = None,
    max_unacked: int = MAX_UNACKED,
    say: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[GatewayClient]:
    """A client that sends at least once while the context lasts.

    ``token`` may be a function, asked before every attempt. ``say`` is told of every lost connection. Leaving the
    context waits until everything is acked, then closes; leaving it by an exception closes at once, and what is not
    acked may be lost. Raises HandshakeRejected for a refusal, and ConnectionLost for a close code, that another attempt
    would meet again, and ConfigError for a URL that is none; the body is cancelled then.
    """
    client = GatewayClient(url, token, account=account, tls=tls, max_unacked=max_unacked, say=say)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            yield client
            await client.flush()
            client.leave()
    except BaseExceptionGroup as group:
        final, rest = group.split((ClientError, ConfigError))
        if final is None or rest is not None:
            raise
        raise leaf(final) from None
