"""A client of the gateway on trio-websocket, for `gateway stream`, the demo and the tests."""

from __future__ import annotations

import json
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import trio
import trio_websocket

from gateway.core.control import JSON
from gateway.errors import ConfigError, ConnectionLost, HandshakeRejected
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONNECT_TIMEOUT_S = 10.0


def tls_context(url: str, ca_file: Path | None) -> ssl.SSLContext | None:
    """The client's TLS context for a ``wss`` URL, None for ``ws``. Raises ConfigError naming the CA file."""
    if not url.startswith("wss:"):
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"--ca {ca_file}: {getattr(error, 'strerror', None) or error}"]) from error


@dataclass
class GatewayClient:
    """One open connection. Use `connect`; ``welcome`` is the gateway's first control message."""

    socket: trio_websocket.WebSocketConnection
    welcome: dict[str, Any]
    rejected: int = 0
    """Messages the gateway said it put aside as dead letters."""
    closing: dict[str, Any] = field(default_factory=dict)
    """The gateway's closing notice, once it has come."""

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
        """Take control messages until the connection ends; run it beside the sender."""
        try:
            while True:
                message = json.loads(await self.socket.get_message())
                if message["type"] == "rejected":
                    self.rejected += message["count"]
                elif message["type"] == "closing":
                    self.closing = message
        except trio_websocket.ConnectionClosed:
            return


def _lost(error: trio_websocket.ConnectionClosed) -> ConnectionLost:
    reason = error.reason
    return ConnectionLost(1006 if reason is None else reason.code, (reason and reason.reason) or "")


@asynccontextmanager
async def connect(
    url: str, token: str, *, account: str | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[GatewayClient]:
    """Connect, authenticate and wait for the welcome; leaving closes with 1000 and waits for the answer.

    When it leaves without an exception, the gateway has routed everything that was sent. Raises HandshakeRejected,
    ConnectionLost, OSError, alone or in an exception group.
    """
    parts = urlsplit(url)
    if parts.hostname is None or parts.scheme not in ("ws", "wss"):
        raise ConfigError([f"{url}: not a ws:// or wss:// URL"])
    if parts.scheme == "wss" and tls is None:
        tls = tls_context(url, None)
    query = "&".join(filter(None, (parts.query, f"account={quote(account)}" if account else "")))
    resource = (parts.path or "/") + (f"?{query}" if query else "")
    with trio.fail_after(CONNECT_TIMEOUT_S):
        stream = await _open_stream(parts.hostname, parts.port or (443 if tls else 80), tls)
    try:
        async with trio.open_nursery() as nursery:
            client = await _shake_hands(nursery, stream, parts.netloc, resource, token)
            nursery.start_soon(client.listen)
            yield client
            await client.socket.aclose()
            closed = client.socket.closed
            if closed is not None and closed.code != 1000:
                raise ConnectionLost(closed.code, closed.reason or "")
    except BaseExceptionGroup as group:
        # trio-websocket's reader task raises a rejection into the nursery
        rejections = group.subgroup(trio_websocket.ConnectionRejected)
        if rejections is None:
            raise
        error: BaseException = rejections
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, trio_websocket.ConnectionRejected)  # noqa: S101  # from the subgroup
        raise _rejected(error) from None
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
) -> GatewayClient:
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
            return GatewayClient(socket, json.loads(await socket.get_message()))
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
