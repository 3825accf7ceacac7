"""One connection to a gateway, on trio-websocket."""

from __future__ import annotations

import json
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, urlsplit

import trio
import trio_websocket
from wsproto.utilities import LocalProtocolError

from gateway.core.catalogue import CLOSE_TLS_FAILED
from gateway.core.notices import JSON
from gateway.errors import BadControlMessage, ConfigError, ConnectionLost, HandshakeRejected, leaf
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 5.0
RENEWAL: Final = "renewal"
"""The ``id`` of the control messages that offer a newer token."""


def tls_context(url: str, ca_file: Path | None) -> ssl.SSLContext | None:
    """The client's TLS context for a ``wss`` URL, None for ``ws``. Raises ConfigError naming the CA file."""
    if urlsplit(url).scheme != "wss":
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"--ca {ca_file}: {getattr(error, 'strerror', None) or error}"]) from error


class Listener(Protocol):
    """Who is told of a connection's notices."""

    def take_ack(self, count: int) -> None:
        """The first ``count`` messages of this connection are settled. May raise ValueError."""

    def take_rejected(self, count: int) -> None:
        """``count`` more messages have become dead letters."""

    def take_recovered(self) -> None:
        """The gateway hands over again."""

    def take_throttle(self, dropped: int, retry_after_s: float) -> None:
        """``dropped`` messages were over a limit; one may be sent again after ``retry_after_s``."""

    def take_renewed(self, expires_at: float) -> None:
        """A newer token counts, until ``expires_at`` in seconds since the epoch."""

    def take_not_renewed(self, code: str) -> None:
        """A newer token does not count, for this reason; the old one does."""


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
    listener: Listener | None = None
    """Who is told of notices, from `tell` on."""
    throttled: int = 0
    """Messages the gateway dropped because they were over a limit."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when the gateway or the network has ended it."""

    def tell(self, listener: Listener) -> None:
        """Tell ``listener`` of notices from now on."""
        self.listener = listener

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

    async def authenticate(self, token: str) -> None:
        """Offer a newer token; the answer goes to the listener. Raises ConnectionLost."""
        try:
            await self.socket.send_message(json.dumps({"type": "authenticate", "id": RENEWAL, "token": token}))
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
                if self.listener is not None:
                    self.listener.take_rejected(_count(message))
            elif kind in ("degraded", "recovered"):
                self.degraded = kind == "degraded"
                if not self.degraded and self.listener is not None:
                    self.listener.take_recovered()
            elif kind == "ack":
                count = _count(message)
                if self.listener is not None:
                    self.listener.take_ack(count)
            elif kind == "throttle":
                dropped, retry_after_s = _count(message, "dropped"), float(message["retry_after_ms"]) / 1000
                self.throttled += dropped
                if self.listener is not None:
                    self.listener.take_throttle(dropped, retry_after_s)
            elif message.get("id") == RENEWAL and self.listener is not None:
                if kind == "authenticated":
                    self.listener.take_renewed(float(message["token_expires_at"]))
                elif kind == "error":
                    self.listener.take_not_renewed(str(message["code"]))
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


def _count(message: dict[str, Any], name: str = "count") -> int:
    """A number of messages. Raises ValueError for what is none."""
    count = message[name]
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
        message["limits"]["messages_per_second"] = float(message["limits"]["messages_per_second"])
        message["token_expires_at"] = float(message["token_expires_at"])
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
        raise ConnectionLost(CLOSE_TLS_FAILED.code, str(error.__cause__ or error)) from error
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
        code = str(json.loads(error.body or b"")["error"]["code"])
    except (ValueError, KeyError, TypeError, RecursionError):
        code = ""
    retry_after = dict(error.headers or ()).get(b"retry-after", b"")
    return HandshakeRejected(error.status_code, code, float(retry_after) if retry_after.isdigit() else None)
