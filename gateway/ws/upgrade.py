"""The opening handshake: read the request, decide, answer (RFC 6455 4.2).

`Upgrade.decide` is the whole decision, without I/O: a `Request` in, an `Accepted` out, or Refused. The order of its
checks is the order of the answers a client gets: HTTP, path, upgrade, Origin, admission, and then what the endpoint
asks for: account, token. The rate of an address has been asked before, when its connection was accepted
(`gateway.ws.listener`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import trio

from gateway.core import catalogue
from gateway.errors import Disconnected, Refused
from gateway.ws import request as http
from gateway.ws.connection import READ_BYTES
from gateway.ws.endpoints import Asked
from gateway.ws.outbox import BLOCKED, WRITE_BLOCKED

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from gateway.core.admission import Admission
    from gateway.core.catalogue import Refusal
    from gateway.ws.endpoints import Endpoint, Endpoints, Granted
    from gateway.ws.request import Request
    from gateway.ws.turnstile import Turnstile

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
BEARER: Final = "bearer"
"""The subprotocol behind which a client that can set no header gives its token."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted handshake: Sec-WebSocket-Accept, where it leads, and what that endpoint granted."""

    accept: str
    endpoint: Endpoint
    granted: Granted


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The rules of the opening handshake that are the same for every endpoint."""

    endpoints: Endpoints
    admission: Admission

    def decide(self, request: Request) -> Accepted:
        """Accept or raise Refused. Touches no socket."""
        endpoint, parameters = self.endpoints.find(request.path)
        key = _check_upgrade(request)
        _check_origin(request, endpoint)
        self.admission.check()
        offered = request.tokens("sec-websocket-protocol")
        asked = Asked(request, parameters, _query(request.query), offered, endpoint.subprotocols)
        return Accepted(accept_key(key), endpoint, endpoint.authorise(asked))


def _check_origin(request: Request, endpoint: Endpoint) -> None:
    """Refuse a browser page of somebody else's (RFC 6455 10.2): absent and same-host Origins pass."""
    origin = request.one("origin")
    if origin is not None and not endpoint.origins.admit(origin, request.host, request.port):
        host = request.headers["host"][0].partition("/")[0]
        raise Refused(catalogue.ORIGIN_NOT_ALLOWED, f"Origin {_without_path(origin)!r}, Host {host!r}")


def bearer_token(asked: Asked, *, in_query: bool) -> tuple[str, str | None]:
    """The token, and the subprotocol to answer with, from the first place that has one. Raises Refused.

    The places are Authorization (RFC 6750 2.1), the subprotocol behind `BEARER`, and with ``in_query`` the parameter
    ``access_token``.
    """
    offered = asked.offered
    chosen = next((name for name in offered if name in asked.spoken), None)
    authorization = asked.request.headers.get("authorization")
    if authorization is not None:
        scheme, _, token = authorization[0].partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer":
            raise Refused(catalogue.INVALID_TOKEN, "bad_authorization")
        if chosen is None and BEARER in offered:
            chosen = BEARER
        return token.strip(" "), chosen
    if BEARER in offered[:-1]:
        token = offered[offered.index(BEARER) + 1]
        return token, chosen or BEARER
    given = asked.query.get("access_token", [])
    if in_query and len(given) == 1:
        return given[0], chosen
    raise Refused(catalogue.INVALID_TOKEN, "no_token")


def _without_path(origin: str) -> str:
    """An Origin for the log: what stands behind its host, and before it, may be secret."""
    found = re.match(r"(?:[^/?#]*//)?(?:[^/?#]*@)?([^/?#]*)", origin)
    scheme, slashes, _ = origin.partition("//")
    return f"{scheme}{slashes}{found[1]}" if found and slashes and "?" not in scheme else (found[1] if found else "")


def accept_key(key: str) -> str:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def _check_upgrade(request: Request) -> str:
    """Check what makes the request an upgrade (RFC 6455 4.2.1); return the key."""
    upgrade = [token.lower() for token in request.tokens("upgrade")]
    connection = [token.lower() for token in request.tokens("connection")]
    if "websocket" not in upgrade or "upgrade" not in connection:
        raise Refused(catalogue.UPGRADE_REQUIRED)
    if request.headers.get("sec-websocket-version") != ["13"]:
        raise Refused(catalogue.UPGRADE_REQUIRED, "version")
    keys = request.headers.get("sec-websocket-key", [])
    try:
        valid = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except binascii.Error:
        valid = False
    if not valid:
        raise Refused(catalogue.BAD_KEY)
    return keys[0]


def _query(query: str) -> Mapping[str, list[str]]:
    values: dict[str, list[str]] = {}
    try:
        for name, value in parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=32):
            values.setdefault(name, []).append(value)
    except ValueError:
        raise Refused(catalogue.BAD_REQUEST, "malformed query") from None
    return values


async def read_request(sock: socket.socket, buffer: bytearray, turnstile: Turnstile) -> Request:
    """Read the head from a non-blocking socket when it is its turn; leave in ``buffer`` what came after it.

    Raises Refused, Disconnected or OSError. The caller's deadline bounds it; cancelled, it has taken nothing
    that matters.
    """
    empty_lines = 0
    while True:
        try:
            data = sock.recv(READ_BYTES)  # a whole TLS record: see READ_BYTES
        except BLOCKED:
            await turnstile.wait_readable(sock)
            continue
        if not data:
            raise Disconnected
        seen = len(buffer)
        buffer += data
        if buffer.startswith(b"\r"):
            empty_lines += http.skip_empty_lines(buffer)
            if empty_lines > http.MAX_EMPTY_LINES:
                raise Refused(catalogue.BAD_REQUEST, "nothing but empty lines")
            seen = 0
        end = http.head_end(buffer, seen)
        if end >= 0:
            head = bytes(buffer[:end])
            del buffer[:end]
            return http.parse(head)


async def write_all(sock: socket.socket, data: bytes) -> None:
    """Write everything to a non-blocking socket. Raises OSError; the caller's deadline bounds it."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except WRITE_BLOCKED:
            await trio.lowlevel.wait_writable(sock.fileno())


def acceptance(accepted: Accepted) -> bytes:
    """The 101 answer (RFC 6455 4.2.2). MT5 clients compare the header's name with its case."""
    subprotocol = accepted.granted.subprotocol
    protocol = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accepted.accept}\r\n{protocol}\r\n"
    ).encode()


def refusal_answer(refusal: Refusal, retry_after_s: int | None) -> bytes:
    """The HTTP answer for a refusal, connection closed after it."""
    body = json.dumps({"error": {"code": refusal.code, "message": refusal.message}}).encode()
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("Connection", "close, Upgrade" if refusal.status == 426 else "close"),  # RFC 9110 7.8
        *refusal.headers,
    ]
    if retry_after_s is not None:
        headers.append(("Retry-After", str(retry_after_s)))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {refusal.status} {refusal.phrase}\r\n{head}\r\n".encode() + body
