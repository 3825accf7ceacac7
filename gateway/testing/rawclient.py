"""A client that sends exactly the bytes a test wants and reads exactly what comes back. Blocking, with timeouts."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import struct
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from gateway.errors import GatewayError

TIMEOUT_S = 15.0


class Closed(GatewayError):
    """The server ended the TCP connection."""


class RawClient:
    """One TCP (or TLS) connection to a WebSocket URL."""

    def __init__(self, url: str, *, tls: ssl.SSLContext | None = None, source: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path
        bind = (source, 0) if source else None
        self.sock: socket.socket = socket.create_connection(
            (self.host, self.port), timeout=TIMEOUT_S, source_address=bind
        )
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname=self.host)
        self.buffer = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.sock.close()

    # HTTP

    def headers(self, token: str | None = None, **changes: str | None) -> list[tuple[str, str]]:
        """The headers of a good handshake; ``changes`` replace or, with None, remove them."""
        headers: dict[str, str | None] = {
            "Host": f"{self.host}:{self.port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
        }
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        return [(name, value) for name, value in headers.items() if value is not None]

    def request(
        self, headers: list[tuple[str, str]], *, target: str | None = None, line: str | None = None
    ) -> Response:
        """Send a request and read the answer's head, and its body unless it is a 101."""
        first = line or f"GET {target or self.path} HTTP/1.1"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return self.raw_request(f"{first}\r\n{head}\r\n".encode("latin-1"))

    def raw_request(self, data: bytes) -> Response:
        """Send these bytes; read an answer."""
        with suppress(ConnectionError):  # an early refusal: the answer may already be here
            self.sock.sendall(data)
        return self.read_response()

    def read_response(self) -> Response:
        """Read one HTTP answer. Raises Closed when there is none."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split(" ")[1])
        body = b""
        if status != 101:
            length = int(headers.get("content-length", "0"))
            while len(self.buffer) < length:
                self._more()
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Response(status, headers, body, head.decode("latin-1"))

    def upgrade(self, token: str, *, protocols: str | None = None, target: str | None = None) -> Response:
        """A good handshake; fails the test when it is not answered with 101."""
        answer = self.request(self.headers(token, Sec_WebSocket_Protocol=protocols), target=target)
        assert answer.status == 101, answer
        return answer

    # WebSocket

    def send_frame(
        self,
        opcode: int,
        payload: bytes = b"",
        *,
        fin: bool = True,
        rsv: int = 0,
        masked: bool = True,
        length_form: int | None = None,
    ) -> None:
        """Send one frame; ``length_form`` 126 or 127 forces a longer length field."""
        self.sock.sendall(frame(opcode, payload, fin=fin, rsv=rsv, masked=masked, length_form=length_form))

    def send_binary(self, payload: bytes) -> None:
        """Send one binary message."""
        self.send_frame(0x2, payload)

    def read_frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next server frame. Raises Closed at the end of the stream."""
        while True:
            if len(self.buffer) >= 2:
                length, start = self.buffer[1] & 0x7F, 2
                assert not self.buffer[1] & 0x80, "a server frame must not be masked"
                if length == 126 and len(self.buffer) >= 4:
                    length, start = int.from_bytes(self.buffer[2:4], "big"), 4
                elif length == 127 and len(self.buffer) >= 10:
                    length, start = int.from_bytes(self.buffer[2:10], "big"), 10
                if (length < 126 or start > 2) and len(self.buffer) >= start + length:
                    opcode = self.buffer[0] & 0x0F
                    payload = self.buffer[start : start + length]
                    self.buffer = self.buffer[start + length :]
                    return opcode, payload
            self._more()

    def read_close(self) -> tuple[int, str]:
        """Code and reason of the server's close frame; frames before it are skipped."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == 0x8:
                if not payload:
                    return 1005, ""
                return struct.unpack("!H", payload[:2])[0], payload[2:].decode()

    def read_control(self, kind: str | None = None) -> dict[str, Any]:
        """The next JSON control message, or the next one of a kind."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == 0x1:
                message: dict[str, Any] = json.loads(payload)
                if kind is None or message["type"] == kind:
                    return message

    def ping(self) -> None:
        """A ping and its pong: everything sent before has been handled when this returns."""
        self.send_frame(0x9, b"are you there")
        while True:
            opcode, payload = self.read_frame()
            if opcode == 0xA and payload == b"are you there":
                return

    def close(self, code: int = 1000) -> tuple[int, str]:
        """The client's close handshake: close frame, the answer, end of stream."""
        self.send_frame(0x8, struct.pack("!H", code))
        answer = self.read_close()
        self.expect_end()
        return answer

    def expect_end(self) -> None:
        """The server ends the TCP connection (within `TIMEOUT_S`)."""
        try:
            while True:
                self._more()
        except (Closed, ConnectionError):
            return

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise Closed
        self.buffer += data


class Response:
    """An HTTP answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, head: str) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.head = head

    def __repr__(self) -> str:
        return f"{self.head}\n{self.body.decode(errors='replace')}"

    @property
    def code(self) -> str:
        """The error code of the JSON body."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length_form: int | None = None,
    mask: bytes | None = None,
) -> bytes:
    """The bytes of one client frame, masked with a key by chance or with ``mask``."""
    length = len(payload)
    form = length_form or (length if length < 126 else 126 if length < 65536 else 127)
    head = bytes(((0x80 if fin else 0) | rsv << 4 | opcode, (0x80 if masked else 0) | form))
    if form == 126:
        head += struct.pack("!H", length)
    elif form == 127:
        head += struct.pack("!Q", length)
    if not masked:
        return head + payload
    mask = mask or os.urandom(4)
    if mask == bytes(4):
        return head + mask + payload
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
