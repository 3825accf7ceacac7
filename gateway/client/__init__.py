"""Clients of the gateway on trio-websocket.

`connect` is one connection. `open_client` is what a program wants that must not lose anything: it keeps every message
until the gateway has acked it (it is in Kafka then), reconnects with growing, jittered delays or when the gateway said,
and sends again what is not acked. At least once: a message whose ack was lost with its connection is sent twice.

    async with open_client("wss://gateway.example:8001/ws/mt5", token, account="5012345") as client:
        await client.send("tick_data", batch.SerializeToString())
        await client.flush()
"""

from __future__ import annotations

import json
import random
import ssl
import time
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import trio
import trio_websocket
from trio_util import AsyncValue
from wsproto.utilities import LocalProtocolError

from gateway.core import catalogue
from gateway.core.catalogue import Advice
from gateway.core.notices import JSON
from gateway.errors import BadControlMessage, ClientError, ConfigError, ConnectionLost, HandshakeRejected, leaf
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 5.0
FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0
MAX_UNACKED: Final = 10_000
"""Messages kept by default, sent or not, before `GatewayClient.send` waits."""


def tls_context(url: str, ca_file: Path | None) -> ssl.SSLContext | None:
    """The client's TLS context for a ``wss`` URL, None for ``ws``. Raises ConfigError naming the CA file."""
    if urlsplit(url).scheme != "wss":
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"--ca {ca_file}: {getattr(error, 'strerror', None) or error}"]) from error


@dataclass
class Connection:
    """One open connection. Use `connect`; ``welcome`` is the gateway's first control message."""

    socket: trio_websocket.WebSocketConnection
    welcome: dict[str, Any]
    rejected: int = 0
    """Messages the gateway said it put aside as dead letters."""
    closing: dict[str, Any] = field(default_factory=dict)
    """The gateway's closing notice, once it has come."""
    degraded: bool = False
    """True between the gateway's ``degraded`` and ``recovered``: it hands over nothing, and keeps only a little."""
    on_ack: Callable[[int], None] = lambda count: None
    on_rejected: Callable[[int], None] = lambda count: None
    on_recovered: Callable[[], None] = lambda: None
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when the gateway or the network has ended it."""

    @property
    def user_id(self) -> str:
        """Who the gateway says we are."""
        user_id: str = self.welcome["user_id"]
        return user_id

    def envelope(self, message_type: str, payload: bytes, timestamp_ms: int, correlation_id: str = "") -> bytes:
        """A serialised envelope of ours."""
        return MessageEnvelope(
            message_type=message_type,
            user_id=self.welcome["user_id"],
            company_id=self.welcome["company_id"],
            payload=payload,
            timestamp=timestamp_ms,
            correlation_id=correlation_id,
        ).SerializeToString()

    async def send(self, message: bytes) -> None:
        """Send one binary message. Raises ConnectionLost; cancelled half-way, the connection is unusable."""
        try:
            await self.socket.send_message(message)
        except trio_websocket.ConnectionClosed as error:
            raise _lost(error) from error

    async def listen(self) -> None:
        """Take control messages until the connection ends; run it beside the sender. Raises BadControlMessage."""
        try:
            while True:
                self._take(await self.socket.get_message())
        except trio_websocket.ConnectionClosed:
            return
        finally:
            self.ended.set()

    def _take(self, text: str | bytes) -> None:
        """Act on one control message; types that are not known are for newer clients."""
        try:
            message = _control(text)
            kind = message["type"]
            if kind == "rejected":
                self.rejected += _count(message)
                self.on_rejected(_count(message))
            elif kind in ("degraded", "recovered"):
                self.degraded = kind == "degraded"
                if not self.degraded:
                    self.on_recovered()
            elif kind == "ack":
                self.on_ack(_count(message))
            elif kind == "closing":
                self.closing = {**message, "reconnect_after_ms": float(message["reconnect_after_ms"])}
        except _MALFORMED as error:
            raise BadControlMessage(f"not a control message of gateway.v1: {text[:80]!r}") from error


_MALFORMED: Final = (KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What a message of any other form makes of reading it."""


def _control(text: str | bytes) -> dict[str, Any]:
    """The map that a control message holds. Raises ValueError."""
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("not a map")  # noqa: TRY004  # a value of the wrong form, like any other here
    return message


def _count(message: dict[str, Any]) -> int:
    """A number of messages. Raises ValueError for what is none."""
    count = message["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"count {count!r}")
    return count


def _welcome(text: str | bytes) -> dict[str, Any]:
    """The gateway's first message. Raises BadControlMessage."""
    try:
        message = _control(text)
        if message["type"] != "welcome":
            raise ValueError("another message")  # as the others
        for name in ("user_id", "company_id"):
            if not isinstance(message[name], str):
                raise TypeError(name)
        message["ping_interval_s"] = float(message["ping_interval_s"])
        message["limits"]["max_message_bytes"] = int(message["limits"]["max_message_bytes"])
    except _MALFORMED as error:
        raise BadControlMessage(f"not a welcome of gateway.v1: {text[:80]!r}") from error
    return message


def _lost(error: trio_websocket.ConnectionClosed) -> ConnectionLost:
    reason = error.reason
    return ConnectionLost(1006 if reason is None else reason.code, (reason and reason.reason) or "")


@asynccontextmanager
async def connect(
    url: str, token: str, *, account: str | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    """Connect, authenticate and wait for the welcome; leaving closes with 1000 and waits for the answer.

    When it leaves without an exception, the gateway has read everything that was sent. Raises HandshakeRejected,
    ConnectionLost, OSError, alone or in an exception group.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as fault:
        raise ConfigError([f"{url}: not a URL: {fault}"]) from fault
    if parts.hostname is None or parts.scheme not in ("ws", "wss"):
        raise ConfigError([f"{url}: not a ws:// or wss:// URL"])
    if parts.scheme == "wss" and tls is None:
        tls = tls_context(url, None)
    query = "&".join(filter(None, (parts.query, f"account={quote(account)}" if account else "")))
    resource = (parts.path or "/") + (f"?{query}" if query else "")
    with trio.fail_after(CONNECT_TIMEOUT_S):
        stream = await _open_stream(parts.hostname, port or (443 if tls else 80), tls)
    try:
        async with trio.open_nursery() as nursery:
            client = await _shake_hands(nursery, stream, parts.netloc, resource, token)
            nursery.start_soon(client.listen)
            yield client
            with trio.move_on_after(CLOSE_TIMEOUT_S) as closing:
                await client.socket.aclose()
            closed = client.socket.closed
            nursery.cancel_scope.cancel()
            if closing.cancelled_caught:
                raise ConnectionLost(1006, f"no answer to the close within {CLOSE_TIMEOUT_S:g} s")
            if closed is not None and closed.code != 1000:
                raise ConnectionLost(closed.code, closed.reason or "")
    except BaseExceptionGroup as group:
        # trio-websocket's reader task raises into the nursery: a rejection, or a protocol error of its own when the
        # gateway's ping crosses its close frame.
        theirs, rest = group.split((trio_websocket.ConnectionRejected, LocalProtocolError))
        if theirs is None or rest is not None:
            raise
        error = leaf(theirs)
        if isinstance(error, trio_websocket.ConnectionRejected):
            raise _rejected(error) from None
        raise ConnectionLost(1006, "closed") from None
    finally:
        await trio.aclose_forcefully(stream)


async def _open_stream(
    host: str, port: int, tls: ssl.SSLContext | None
) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
    if tls is None:
        return await trio.open_tcp_stream(host, port)
    stream = await trio.open_ssl_over_tcp_stream(host, port, ssl_context=tls, https_compatible=True)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise ConnectionLost(1015, str(error.__cause__ or error)) from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _shake_hands(
    nursery: trio.Nursery,
    stream: trio.SocketStream | trio.SSLStream[trio.SocketStream],
    host: str,
    resource: str,
    token: str,
) -> Connection:
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            socket = await trio_websocket.wrap_client_stream(
                nursery,
                stream,
                host,
                resource,
                subprotocols=[JSON],
                extra_headers=[(b"Authorization", b"Bearer " + token.encode())],
                message_queue_size=16,
            )
            return Connection(socket, _welcome(await socket.get_message()))
    except trio_websocket.ConnectionClosed as error:
        raise _lost(error) from error
    except trio.TooSlowError as error:
        raise ConnectionLost(1006, f"no welcome within {CONNECT_TIMEOUT_S:g} s") from error


def _rejected(error: trio_websocket.ConnectionRejected) -> HandshakeRejected:
    try:
        code = json.loads(error.body or b"")["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = ""
    retry_after = dict(error.headers or ()).get(b"retry-after", b"")
    return HandshakeRejected(error.status_code, code, float(retry_after) if retry_after.isdigit() else None)


class Backoff:
    """Delays between attempts, doubling from `FIRST_DELAY_S` to `MAX_DELAY_S`, each between half of it and all."""

    def __init__(self) -> None:
        self._delay_s = FIRST_DELAY_S

    def reset(self) -> None:
        """An attempt succeeded."""
        self._delay_s = FIRST_DELAY_S

    def next_s(self, at_least_s: float = 0.0) -> float:
        """The next delay; ``at_least_s`` is what the server asked for."""
        delay_s, self._delay_s = self._delay_s, min(MAX_DELAY_S, self._delay_s * 2)
        return max(at_least_s, random.uniform(delay_s / 2, delay_s))  # noqa: S311  # jitter


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
                    delay_s = _delay_or_raise(error, connection, self._backoff)
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
        connection.on_ack = self._take_ack
        connection.on_rejected = self._take_rejected
        connection.on_recovered = lambda: self._work.set()
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

    def _take_rejected(self, count: int) -> None:
        self.rejected += count

    def _take_ack(self, count: int) -> None:
        self._backoff.reset()  # it works: not only does it accept connections
        settled = count - self._acked_here
        if not 0 <= settled <= len(self._sent):
            raise ValueError(f"ack of {count} messages, {self._acked_here + len(self._sent)} were sent")
        for _ in range(settled):
            self._sent.popleft()
        self._acked_here = count
        self.acked += settled
        self._unacked.value -= settled


def _delay_or_raise(error: Exception, connection: Connection | None, backoff: Backoff) -> float:
    """How long to wait before the next attempt; raises what another attempt would meet again."""
    if isinstance(error, HandshakeRejected):
        if catalogue.refusal_advice(error.status, error.code) is not Advice.LATER:
            raise error
        return backoff.next_s(error.retry_after_s or 0.0)
    if isinstance(error, ConnectionLost) and not catalogue.close_advice(error.code).reconnects:
        raise error
    if connection is not None and connection.closing:
        return backoff.next_s(float(connection.closing["reconnect_after_ms"]) / 1000)
    return backoff.next_s()


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
