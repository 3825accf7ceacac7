"""The opening handshake: read the request, decide, answer (RFC 6455 4.2).

`Handshake.decide` is the whole decision, without I/O: a `Request` in, an `Admitted` out, or Refused. The order of its
checks is the order of the answers a client gets: HTTP, path, upgrade, Origin, admission, account, token. The rate of an
address has been asked before, when its connection was accepted (`gateway.ws.listener`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import trio

from gateway.core import catalogue, notices
from gateway.errors import Disconnected, InvalidToken, Refused
from gateway.ws import request as http
from gateway.ws.connection import BLOCKED, READ_BYTES, WRITE_BLOCKED

if TYPE_CHECKING:
    import socket

    from gateway.core.admission import Admission
    from gateway.core.catalogue import Refusal
    from gateway.core.credentials import TokenRules
    from gateway.core.origins import OriginRules
    from gateway.core.principal import Principal
    from gateway.ws.request import Request

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
_ACCOUNT = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class Admitted:
    """An accepted handshake. ``account`` is the MT5 account, the user_id when none was named."""

    principal: Principal
    account: str
    path: str
    subprotocol: str | None
    accept: str


@dataclass(slots=True)
class Handshake:
    """The rules of the opening handshake; ``rules`` may be replaced while running (reload)."""

    path: str
    origins: OriginRules
    allow_query_token: bool
    rules: TokenRules
    admission: Admission

    def decide(self, request: Request) -> Admitted:
        """Accept or raise Refused. Reads the clock, touches no socket."""
        if (request.path.rstrip("/") or "/") != self.path:
            raise Refused(catalogue.NOT_FOUND)
        key = _check_upgrade(request)
        self._check_origin(request)
        self.admission.check()
        query = _query(request.query)
        account = _account(query)
        token, subprotocol = self._token(request, query)
        try:
            principal = self.rules.authenticate(token, time.time())
        except InvalidToken as error:
            raise Refused(catalogue.INVALID_TOKEN, error.reason) from None
        return Admitted(principal, account or principal.user_id, request.path, subprotocol, accept_key(key))

    def _check_origin(self, request: Request) -> None:
        """Refuse a browser page of somebody else's (RFC 6455 10.2): absent and same-host Origins pass."""
        origin = request.one("origin")
        if origin is not None and not self.origins.admit(origin, request.host, request.port):
            host = request.headers["host"][0].partition("/")[0]
            raise Refused(catalogue.ORIGIN_NOT_ALLOWED, f"Origin {_without_path(origin)!r}, Host {host!r}")

    def _token(self, request: Request, query: dict[str, list[str]]) -> tuple[str, str | None]:
        """The token and the subprotocol to answer with, from the first place that has one."""
        offered = request.tokens("sec-websocket-protocol")
        chosen = next((name for name in offered if name in notices.CONTROL_SUBPROTOCOLS), None)
        authorization = request.headers.get("authorization")
        if authorization is not None:
            scheme, _, token = authorization[0].partition(" ")
            if len(authorization) > 1 or scheme.lower() != "bearer":
                raise Refused(catalogue.INVALID_TOKEN, "bad_authorization")
            if chosen is None and notices.BEARER in offered:
                chosen = notices.BEARER
            return token.strip(" "), chosen
        if notices.BEARER in offered[:-1]:
            token = offered[offered.index(notices.BEARER) + 1]
            return token, chosen or notices.BEARER
        in_query = query.get("access_token", [])
        if self.allow_query_token and len(in_query) == 1:
            return in_query[0], chosen
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


def _query(query: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    try:
        for name, value in parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=32):
            values.setdefault(name, []).append(value)
    except ValueError:
        raise Refused(catalogue.BAD_REQUEST, "malformed query") from None
    return values


def _account(query: dict[str, list[str]]) -> str | None:
    accounts = query.get("account")
    if accounts is None:
        return None
    if len(accounts) != 1 or not _ACCOUNT.match(accounts[0]):
        raise Refused(catalogue.BAD_ACCOUNT)
    return accounts[0]


async def read_request(sock: socket.socket, buffer: bytearray) -> Request:
    """Read the head from a non-blocking socket; leave in ``buffer`` what came after it.

    Raises Refused, Disconnected or OSError. The caller's deadline bounds it; cancelled, it has taken nothing
    that matters.
    """
    empty_lines = 0
    while True:
        try:
            data = sock.recv(READ_BYTES)  # a whole TLS record: see READ_BYTES
        except BLOCKED:
            await trio.lowlevel.wait_readable(sock.fileno())
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


def acceptance(admitted: Admitted) -> bytes:
    """The 101 answer (RFC 6455 4.2.2). MT5 clients compare the header's name with its case."""
    protocol = f"Sec-WebSocket-Protocol: {admitted.subprotocol}\r\n" if admitted.subprotocol else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {admitted.accept}\r\n{protocol}\r\n"
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
    return f"HTTP/1.1 {refusal.status} {refusal.status.phrase}\r\n{head}\r\n".encode() + body
