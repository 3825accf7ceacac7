"""RFC 6455 frames, server side, without I/O.

A `Decoder` belongs to one connection and is in one of three states:

* between messages: the next data frame opens a message;
* inside a message: fragments are gathered in ``_parts``; only continuation and control frames may come;
* failed or closed: ``done`` is true, every further byte is ignored.

Invariant: `Decoder.receive` returns the same items in the same order however the byte stream was
split. What is held between calls is bounded by the message limit plus one frame head, and grows only
with bytes that have really arrived: a declared length allocates nothing.
"""

from __future__ import annotations

import codecs
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from websockets.speedups import apply_mask

from gateway.core import catalogue
from gateway.core.catalogue import Close
from gateway.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# long: frames are one subject (RFC 6455 5)

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

MAX_FRAGMENTS: Final = 4096
"""Fragments of one message unless said otherwise, empty ones included: 16 bytes each for a 64 KiB message. A
flood of empty fragments would otherwise cost CPU for ever without ever reaching the size limit."""

_MAX_CONTROL_BYTES: Final = 125  # RFC 6455 5.5
_LONE_CLOSE_CODES: Final = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})
_FIN_BINARY: Final = 0x80 | BINARY


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping; it must be answered with the same payload (RFC 6455 5.5.2)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """A pong, asked for or not (RFC 6455 5.5.3)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerClose:
    """The peer's close frame. ``code`` is 1005 when the frame had none (RFC 6455 7.1.5)."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The peer broke the protocol; the connection must be closed with ``close`` (RFC 6455 7.1.7)."""

    close: Close
    detail: str


Payload = bytes | str
"""A whole message: bytes of a binary one, str of a text one."""
Event = Ping | Pong | PeerClose | Failure
"""Everything else that a client's frames can say."""
Item = Payload | Event
"""What `Decoder.receive` yields."""


class _Violation(GatewayError):  # control flow inside this module, never seen outside
    def __init__(self, close: Close, detail: str) -> None:
        self.failure = Failure(close, detail)


def _protocol_error(detail: str) -> _Violation:
    return _Violation(catalogue.CLOSE_PROTOCOL_ERROR, detail)


@lru_cache(maxsize=1024)
def _cutter(head_bytes: int, frame_bytes: int) -> Callable[[memoryview], Iterator[tuple[bytes, bytes, bytes]]]:
    """Cuts frames of one length, all at once, into head, masking key and payload."""
    return struct.Struct(f"{head_bytes}s4s{frame_bytes - head_bytes - 4}s").iter_unpack


def _take_alike(data: bytes, head: bytes, pos: int, step: int, items: list[Item]) -> int:
    """Take the whole frames from ``pos`` on that have the same head, so ``step`` bytes each; return where they end.

    A client that sends many messages at once sends many of one length; cut together they cost half as much.
    """
    whole = pos + (len(data) - pos) // step * step
    for other, key, payload in _cutter(len(head), step)(memoryview(data)[pos:whole]):
        if other != head:
            break
        items.append(apply_mask(payload, key))
        pos += step
    return pos


class Decoder:
    """Cuts one client's byte stream into messages and control events.

    ``max_message_bytes`` bounds a message, whole or joined from at most ``max_fragments`` fragments, and
    ``max_text_bytes`` one of text. With ``accept_text`` false a text frame fails the connection with 1003 as soon as
    its head has arrived.
    """

    __slots__ = (
        "_kind",
        "_max",
        "_max_fragments",
        "_max_text",
        "_need",
        "_parts",
        "_pending",
        "_size",
        "_text",
        "_utf8",
        "done",
        "only_messages",
    )

    def __init__(
        self,
        max_message_bytes: int,
        *,
        max_fragments: int = MAX_FRAGMENTS,
        accept_text: bool = False,
        max_text_bytes: int | None = None,
    ) -> None:
        self._max = max_message_bytes
        self._max_text = max_message_bytes if max_text_bytes is None else max_text_bytes
        self._max_fragments = max_fragments
        self._text = accept_text
        self._pending: bytearray | None = None
        self._need = 0
        self._kind = 0  # opcode of the fragmented message under way, 0 for none
        self._parts: list[bytes] | None = None
        self._size = 0
        self._utf8: codecs.IncrementalDecoder | None = None
        self.done = False
        """The stream has ended: no further byte counts."""
        self.only_messages = True
        """What `receive` returned last is messages, without an event between them."""

    def receive(self, data: bytes) -> list[Item]:  # long: one hot loop
        """Take the next bytes of the stream; return what they complete.

        A `PeerClose` or `Failure` is always the last item ever returned.
        """
        if self._pending is not None:
            self._pending += data
            if len(self._pending) < self._need:
                return []
            data = bytes(self._pending)
            self._pending = None
        if self.done:
            return []
        self.only_messages = True
        items: list[Item] = []
        pos = 0
        end = len(data)
        limit = self._max
        try:
            while pos < end:
                # hot: whole binary messages of up to 64 KiB, without a call besides the unmasking; anything else takes
                # the general way. bench/micro.py has the difference.
                if end - pos > 7 and data[pos] == _FIN_BINARY and not self._kind:
                    size = data[pos + 1]
                    if size == 0xFE:
                        start = pos + 8
                        stop = start + (data[pos + 2] << 8 | data[pos + 3])
                    else:
                        start = pos + 6
                        stop = start + size - 0x80
                    if 0x80 <= size < 0xFF and stop <= end and stop - start <= limit:
                        items.append(apply_mask(data[start:stop], data[start - 4 : start]))
                        step = stop - pos
                        if step <= end - stop and data.startswith(data[pos : start - 4], stop):
                            stop = _take_alike(data, data[pos : start - 4], stop, step, items)
                        pos = stop
                        continue
                pos = self._next(data, pos, end, items)
                if pos < 0:
                    break
        except _Violation as violation:
            self.done = True
            self.only_messages = False
            self._parts = self._utf8 = None
            items.append(violation.failure)
        return items

    def _next(self, data: bytes, pos: int, end: int, items: list[Item]) -> int:
        """Take the frame at ``pos``, whatever it is; return where the next one begins, -1 when there is none yet.

        RFC 6455 5.2 wants the shortest form of a length; MT5 clients do not keep to it, so all forms are read.
        """
        need = 2
        if end - pos >= need:
            head, size = data[pos], data[pos + 1]
            extended = {126: 2, 127: 8}.get(size & 0x7F, 0)
            need = 2 + extended
            if end - pos >= need:
                length = int.from_bytes(data[pos + 2 : pos + need], "big") if extended else size & 0x7F
                self._check(head, size & 0x80, length, extended)
                start = pos + need + 4
                stop = start + length
                need = stop - pos
                if stop <= end:
                    self._frame(head, apply_mask(data[start:stop], data[start - 4 : start]), items)
                    return -1 if self.done else stop
        self._need = need
        self._pending = bytearray(data[pos:])
        return -1

    def _check(self, head: int, masked: int, length: int, extended: int) -> None:
        """Judge a frame by its head alone, before any of its payload is kept (RFC 6455 5.2, 5.4, 5.5)."""
        opcode = head & 0x0F
        if head & 0x70:
            raise _protocol_error("reserved bits set without an extension")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise _protocol_error(f"unknown opcode {opcode}")
        if not masked:
            raise _protocol_error("unmasked frame from a client")  # RFC 6455 5.1
        if length >> 63:
            raise _protocol_error("length with the top bit set")
        if opcode & 0x08:
            if not head & 0x80:
                raise _protocol_error("fragmented control frame")
            if length > _MAX_CONTROL_BYTES or extended:
                raise _protocol_error("control frame over 125 bytes")
            return
        if opcode == CONTINUATION:
            if not self._kind:
                raise _protocol_error("continuation without a message")
        elif self._kind:
            raise _protocol_error("new message inside a fragmented one")
        elif opcode == TEXT and not self._text:
            raise _Violation(catalogue.CLOSE_TEXT, "text frame")
        limit = self._max_text if opcode == TEXT or self._kind == TEXT else self._max
        if self._size + length > limit:
            raise _Violation(catalogue.CLOSE_TOO_BIG, f"message over {limit} bytes")
        if self._parts is not None and len(self._parts) >= self._max_fragments:
            raise _Violation(catalogue.CLOSE_TOO_BIG, f"more than {self._max_fragments} fragments")

    def _frame(self, head: int, payload: bytes, items: list[Item]) -> None:
        """Take one checked frame."""
        opcode = head & 0x0F
        if opcode & 0x08:
            self.only_messages = False
        if opcode == PING:
            items.append(Ping(payload))
        elif opcode == PONG:
            items.append(Pong(payload))
        elif opcode == CLOSE:
            items.append(_parse_close(payload))
            self.done = True
        else:
            self._data(opcode, head & 0x80, payload, items)

    def _data(self, opcode: int, fin: int, payload: bytes, items: list[Item]) -> None:
        if opcode != CONTINUATION:
            self._kind = opcode
            self._parts = []
            if opcode == TEXT:
                self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        assert self._parts is not None  # noqa: S101  # _check let a continuation through only inside a message
        if self._utf8 is not None:
            try:
                self._utf8.decode(payload, final=bool(fin))
            except UnicodeDecodeError:
                raise _Violation(catalogue.CLOSE_BAD_UTF8, "text message is not UTF-8") from None
        self._parts.append(payload)
        self._size += len(payload)
        if fin:
            message = b"".join(self._parts)
            items.append(message if self._kind == BINARY else message.decode())
            self._kind = self._size = 0
            self._parts = self._utf8 = None


def _parse_close(payload: bytes) -> PeerClose:
    """Read a close frame's body (RFC 6455 5.5.1, 7.4.1)."""
    if not payload:
        return PeerClose(1005, "")
    if len(payload) == 1:
        raise _protocol_error("close frame with one byte")
    code = int.from_bytes(payload[:2], "big")
    if code not in _LONE_CLOSE_CODES and not 3000 <= code <= 4999:
        raise _protocol_error(f"close code {code} may not be sent")
    try:
        reason = payload[2:].decode()
    except UnicodeDecodeError:
        raise _Violation(catalogue.CLOSE_BAD_UTF8, "close reason is not UTF-8") from None
    return PeerClose(code, reason)


def encode(opcode: int, payload: bytes) -> bytes:
    """Build one unfragmented, unmasked server frame (RFC 6455 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((0x80 | opcode, length)) + payload
    if length < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, length) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, length) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """Build a close frame; 1005 gives one without a body. The reason is cut to 123 bytes."""
    if code == 1005:
        return encode(CLOSE, b"")
    # 125 bytes a control frame less two for the code; cut on a character, not inside one
    return encode(CLOSE, code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode())
