"""The header of a MessageEnvelope: read by protobuf's own parser, stamped by appending.

A field that is appended to a serialised message overrides an earlier one (protobuf encoding: for a
singular field, the last value wins), so the received bytes, payload included, stay as they are.

A connection's messages differ in payload and timestamp only. What they all begin with (`head`) has been parsed once;
that another one `repeats` it, and holds nothing that could override it, is seen in half the time of parsing it, and in
a quarter when it is also of the same length as the one before (`Pattern`), as ticks of one symbol are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from google.protobuf.message import DecodeError

from gateway.errors import NotAnEnvelope
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from gateway.core.principal import Principal

_USER_ID = 2
_COMPANY_ID = 3
_CORRELATION_ID = 6

_HEADER_TAGS: Final = (0x0A, 0x12, 0x1A)  # fields 1 to 3, wire type 2
_PAYLOAD_TAG: Final = b"\x22"
is_timestamp: Final = re.compile(rb"\x28[\x80-\xff]{0,8}[\x00-\x7f]").fullmatch
"""Called with a message and an offset: whether the rest is field 5, a varint of 63 bits, and nothing else."""


class Pattern(NamedTuple):
    """A message that repeats a head, seen from its bytes.

    Another one of ``length`` bytes that starts with ``start``, the head and the payload's length, and is a timestamp
    from ``tail`` on repeats the same head. ``length`` is -1, and nothing fits, where there is no timestamp.
    """

    length: int
    start: bytes
    tail: int


NO_PATTERN: Final = Pattern(-1, b"", 0)


def parse(raw: bytes) -> MessageEnvelope:
    """Read an envelope; raises NotAnEnvelope for what protobuf refuses and for an empty message.

    An empty message is a valid protobuf, yet carries no message_type; it is refused here so that its
    dead letter says what it is.
    """
    if not raw:
        raise NotAnEnvelope("empty message")
    try:
        return MessageEnvelope.FromString(raw)
    except DecodeError as error:
        raise NotAnEnvelope("does not parse as gateway.v1.MessageEnvelope") from error


def head(raw: bytes) -> bytes:
    """What an envelope that has been parsed begins with, up to its payload's tag; empty when that is not all it says.

    The header fields must come first, 127 bytes each at most, as every protobuf library writes them, and nothing but a
    payload and a timestamp after them.
    """
    at = 0
    while at + 1 < len(raw) and raw[at] in _HEADER_TAGS and raw[at + 1] < 0x80:
        at += 2 + raw[at + 1]
    found = raw[: at + 1]
    return found if found.endswith(_PAYLOAD_TAG) and repeats(raw, found) is not None else b""


def repeats(raw: bytes, head: bytes) -> Pattern | None:
    """The pattern of ``raw`` when it is ``head``, one payload under 16 KiB, at most a timestamp, and nothing else.

    Then it parses, and its message_type, user_id, company_id, correlation_id and enable_tracing are those of the
    message that ``head`` is of. ``head`` must not be empty.
    """
    at = len(head)
    if len(raw) < at + 2 or not raw.startswith(head):
        return None
    size = raw[at]
    at += 1
    if size > 0x7F:
        if raw[at] > 0x7F:
            return None
        size = size & 0x7F | raw[at] << 7
        at += 1
    tail = at + size
    if tail == len(raw):
        return NO_PATTERN
    return Pattern(len(raw), raw[:at], tail) if is_timestamp(raw, tail) else None


def _field(number: int, value: str) -> bytes:
    """Encode one string field: tag (wire type 2), length, UTF-8. Field numbers up to 15."""
    data = value.encode()
    length = len(data)
    size = bytearray()
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    return bytes((number << 3 | 2,)) + bytes(size) + data


def identity_stamp(envelope: MessageEnvelope, principal: Principal) -> bytes:
    """The bytes to append so that empty identity fields carry the principal's."""
    stamp = b""
    if not envelope.user_id:
        stamp += _field(_USER_ID, principal.user_id)
    if not envelope.company_id and principal.company_id:
        stamp += _field(_COMPANY_ID, principal.company_id)
    return stamp


def tracing_stamp(correlation_id: str) -> bytes:
    """The bytes to append so that the message carries ``correlation_id``."""
    return _field(_CORRELATION_ID, correlation_id)
