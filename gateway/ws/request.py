"""The HTTP/1.1 request head of a handshake, without I/O: strict where RFC 9112 lets a server be strict.

`head_end` finds the end of the head in what has arrived so far and enforces every size limit before more is
kept; `parse` reads it. Both raise Refused. What MT5 clients do differently from browsers is served: absolute-form
targets, a Host without its port, a Host that carries the path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gateway.core import catalogue
from gateway.errors import Refused

MAX_HEAD_BYTES: Final = 16_384
MAX_LINE_BYTES: Final = 8_192
MAX_TARGET_BYTES: Final = 8_192
MAX_HEADERS: Final = 128
MAX_EMPTY_LINES: Final = 16
"""Before a request; RFC 9112 2.2 asks for one at least."""
_MAX_REQUEST_LINE_BYTES: Final = MAX_TARGET_BYTES + 64  # room for the method and the version

_BARE_LF = re.compile(rb"(?<!\r)\n")
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}\Z")
_BEGINNING = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]|\r?\Z")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_TARGET = re.compile(r"[!-~]+\Z")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")
_ASCII_HEADERS: Final = frozenset(
    {
        "host",
        "connection",
        "upgrade",
        "origin",
        "authorization",
        "sec-websocket-key",
        "sec-websocket-version",
        "sec-websocket-protocol",
        "sec-websocket-extensions",
        "content-length",
        "transfer-encoding",
    }
)


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed head. Header names are lower case, each with its values in order; ``host`` is without port."""

    method: str
    path: str
    query: str
    host: str
    port: int | None
    headers: dict[str, list[str]]

    def one(self, name: str) -> str | None:
        """The value of a header that may occur once; None when absent; Refused when repeated."""
        values = self.headers.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise Refused(catalogue.BAD_REQUEST, f"{name} is repeated")
        return values[0]

    def tokens(self, name: str) -> list[str]:
        """The comma-separated elements of a list header, over all its lines (RFC 9110 5.6.1)."""
        return [
            element
            for value in self.headers.get(name, ())
            for element in (part.strip(" \t") for part in value.split(","))
            if element
        ]


def _bad(detail: str) -> Refused:
    return Refused(catalogue.BAD_REQUEST, detail)


def skip_empty_lines(buffer: bytearray) -> int:
    """Drop the empty lines that some clients send before a request (RFC 9112 2.2); how many there were."""
    count = 0
    while buffer.startswith(b"\r\n", 2 * count):
        count += 1
    del buffer[: 2 * count]
    return count


def head_end(buffer: bytes | bytearray, seen: int = 0) -> int:
    """Where the head ends in ``buffer`` (after its empty line), or -1 while it has not arrived whole.

    ``seen`` is how much of the buffer an earlier call has looked at: only the rest is searched, so that a head that
    comes byte by byte costs no more than one that comes at once. Raises Refused as soon as what is there breaks a
    limit or cannot become a head.
    """
    end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
    stop = len(buffer) if end < 0 else end + 4
    if not _BEGINNING.match(buffer):  # a TLS record begins with 0x16
        raise _bad("not an HTTP request")
    if _BARE_LF.search(buffer, seen, stop):
        raise _bad("bare line feed")
    if stop > _MAX_REQUEST_LINE_BYTES and buffer.find(b"\r\n", 0, _MAX_REQUEST_LINE_BYTES) < 0:
        raise Refused(catalogue.TARGET_TOO_LONG)
    if stop > MAX_HEAD_BYTES:
        raise Refused(catalogue.HEAD_TOO_LARGE)
    return -1 if end < 0 else end + 4


def parse(head: bytes) -> Request:
    """Read a whole head, its empty line included. Raises Refused."""
    lines = head[:-4].split(b"\r\n")
    method, target = _request_line(lines[0])
    headers = _headers(lines[1:])
    if "transfer-encoding" in headers or headers.get("content-length", ["0"]) != ["0"]:
        raise Refused(catalogue.BODY_NOT_ALLOWED)
    hosts = headers.get("host", [])
    if len(hosts) != 1:
        raise Refused(catalogue.BAD_HOST, f"{len(hosts)} Host headers")
    authority, slash, host_path = hosts[0].partition("/")
    host, port = _authority(authority)
    path, query = _target(target)
    if path == "/" and slash:  # an MT5 client that put the path into Host
        path, _, host_query = (slash + host_path).partition("?")
        query = query or host_query
    return Request(method, path, query, host, port, headers)


def _request_line(line: bytes) -> tuple[str, str]:
    try:
        method, target, version = line.decode("ascii").split(" ")
    except ValueError:
        raise _bad("request line is not 'METHOD target HTTP/1.1'") from None
    if not _METHOD.match(method) or not re.fullmatch(r"HTTP/\d\.\d", version):
        raise _bad("request line is not 'METHOD target HTTP/1.1'")
    if len(target) > MAX_TARGET_BYTES:
        raise Refused(catalogue.TARGET_TOO_LONG)
    if version != "HTTP/1.1":
        raise Refused(catalogue.VERSION_NOT_SUPPORTED, version)
    if method != "GET":
        raise Refused(catalogue.METHOD_NOT_ALLOWED)
    if not _TARGET.match(target) or "#" in target:
        raise _bad("target has characters that are not allowed")
    return method, target


def _headers(lines: list[bytes]) -> dict[str, list[str]]:
    if len(lines) > MAX_HEADERS:
        raise Refused(catalogue.HEAD_TOO_LARGE, f"over {MAX_HEADERS} headers")
    headers: dict[str, list[str]] = {}
    for line in lines:
        if len(line) > MAX_LINE_BYTES:
            raise Refused(catalogue.HEAD_TOO_LARGE, "header line over 8 KiB")
        raw_name, colon, raw_value = line.partition(b":")
        if not colon or not _NAME.match(raw_name):  # obs-fold begins with white space and fails here too
            raise _bad("malformed header line")
        value = raw_value.strip(b" \t")
        if _BAD_VALUE.search(value):
            raise _bad("control character in a header")
        name = raw_name.decode("ascii").lower()
        if name in _ASCII_HEADERS and not value.isascii():
            raise _bad(f"non-ASCII bytes in {name}")
        headers.setdefault(name, []).append(value.decode("latin-1"))
    return headers


def _target(target: str) -> tuple[str, str]:
    """Path and query of an origin-form or absolute-form target (RFC 9112 3.2)."""
    if not target.startswith("/"):
        try:
            url = urlsplit(target)
        except ValueError:
            raise _bad("malformed target") from None
        if url.scheme.lower() not in ("ws", "wss", "http", "https") or not url.netloc:
            raise _bad("target is neither a path nor a WebSocket URL")
        _authority(url.netloc)
        return url.path or "/", url.query
    path, _, query = target.partition("?")
    return path, query


def _authority(authority: str) -> tuple[str, int | None]:
    """Host and port of a Host header (RFC 9110 7.2); raises Refused with bad_host."""
    bad = Refused(catalogue.BAD_HOST, "malformed Host")
    if authority.startswith("["):
        literal, bracket, rest = authority[1:].partition("]")
        try:
            host = f"[{ipaddress.IPv6Address(literal)}]"
        except ValueError:
            raise bad from None
        if not bracket or (rest and not rest.startswith(":")):
            raise bad
        port = rest[1:]
    else:
        host, _, port = authority.partition(":")
        labels = host.removesuffix(".").split(".")
        if len(host) > 253 or not all(_HOST_LABEL.match(label) and _decodes(label) for label in labels):
            raise bad
    if port and not (_PORT.match(port) and int(port) <= 65535):
        raise bad
    return host.lower(), int(port) if port else None


def _decodes(label: str) -> bool:
    """False for an ``xn--`` label that is no Punycode (RFC 3492)."""
    if label[:4].lower() != "xn--":
        return True
    try:
        return bool(label[4:]) and not label[4:].encode().decode("punycode").isascii()
    except (UnicodeError, ValueError, OverflowError):
        return False
