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
from gateway.core.limits import Bucket
from gateway.errors import ClientError, ConfigError, ConnectionLost, leaf
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PACE_S: Final = 0.1
MAX_UNACKED: Final = 10_000
"""Messages kept by default, sent or not, before `GatewayClient.send` waits."""


RENEW_BEFORE_S: Final = 60.0
RENEW_AFTER: Final = 0.9
"""A newer token is offered so long before the old one ends, or when so much of what it had left has passed."""
RENEW_PAUSE_S: Final = 1.0
"""Between two attempts at least."""
MAX_THROTTLE_S: Final = 60.0
"""How long a throttle notice is obeyed at most: a spent budget of a day is asked about again."""


class Pace:
    """Keeps to a rate of messages a second; 0 is none. A tenth of a second's worth may go at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._bucket = Bucket(1.0, trio.current_time())

    async def wait(self) -> None:
        """Wait until another message may be sent."""
        if not self._rate:
            return
        level = self._bucket.fill(self._rate, max(1.0, self._rate * PACE_S), trio.current_time())
        self._bucket.take(1.0)
        if level < 1.0:
            await trio.sleep((1.0 - level) / self._rate)


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
        self._allowed_at = 0.0  # Trio's seconds
        self._token_ends = 0.0  # seconds since the epoch
        self._work = trio.Event()
        self._unacked = AsyncValue(0)
        self._leaving = trio.Event()
        self.acked = 0
        """Messages the gateway has settled."""
        self.rejected = 0
        """Messages that became dead letters; one that is sent again may be counted again."""
        self.throttled = 0
        """Messages the gateway dropped because they were over a limit: they are settled, and nowhere."""
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
            if not isinstance(self._token, str):
                nursery.start_soon(self._renew, connection, self._token)
            await self._leaving.wait()
            nursery.cancel_scope.cancel()

    async def _send_all(self, connection: Connection) -> None:
        pace = Pace(connection.welcome["limits"]["messages_per_second"])
        while True:
            self._work = trio.Event()
            # After a closing notice nothing more is sent: what the gateway has is acked before it closes. One that is
            # degraded keeps little, and would soon not even see a ping behind what it does not read.
            while self._waiting and not connection.closing and not connection.degraded:
                await pace.wait()
                await self._until_allowed()
                if connection.closing or connection.degraded:
                    break
                message = self._waiting[0]
                message.user_id = connection.welcome["user_id"]
                message.company_id = connection.welcome["company_id"]
                # Counted as sent before it is: its ack may come before `send` returns.
                self._sent.append(self._waiting.popleft())
                await connection.send(message.SerializeToString())
            await self._work.wait()

    async def _until_allowed(self) -> None:
        """Wait as long as a throttle notice said, if there was one."""
        if self._allowed_at > trio.current_time():
            await trio.sleep_until(self._allowed_at)

    async def _renew(self, connection: Connection, token: Callable[[], str]) -> None:
        """Offer a newer token before the old one ends, so that the connection need not."""
        self._token_ends = connection.welcome["token_expires_at"]
        while True:
            left_s = self._token_ends - time.time()
            await trio.sleep(max(RENEW_PAUSE_S, left_s - RENEW_BEFORE_S, left_s * RENEW_AFTER))
            await connection.authenticate(token())

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

    def take_throttle(self, dropped: int, retry_after_s: float) -> None:
        """Messages were over a limit of this user or its company: send nothing for a while."""
        self.throttled += dropped
        self._allowed_at = trio.current_time() + min(retry_after_s, MAX_THROTTLE_S)
        self._say(f"{dropped} messages dropped over a limit; again in {retry_after_s:.1f} s")

    def take_renewed(self, expires_at: float) -> None:
        """A newer token counts."""
        self._token_ends = expires_at

    def take_not_renewed(self, code: str) -> None:
        """A newer token does not count: the old one does, until it ends."""
        self._say(f"the newer token was refused: {code}")

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

    ``token`` may be a function, asked before every attempt and before the token of a connection ends. Messages are sent
    no faster than the gateway says it takes them; where other connections of the user share that rate, some may be
    dropped (``throttled``). ``say`` is told of every lost connection. Leaving the
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
