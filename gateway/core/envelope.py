"""The header of a MessageEnvelope: read by protobuf's own parser, stamped by appending.

A field that is appended to a serialised message overrides an earlier one (protobuf encoding: for a
singular field, the last value wins), so the received bytes, payload included, stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from gateway import refusals
from gateway.errors import NotAnEnvelope
from gateway.v1.envelope_pb2 import MessageEnvelope

if TYPE_CHECKING:
    from gateway.core.principal import Principal

_USER_ID = 2
_COMPANY_ID = 3
_CORRELATION_ID = 6


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


def foreign(envelope: MessageEnvelope, principal: Principal) -> str | None:
    """The reason to refuse an envelope that names somebody else, None when it may pass; empty fields may."""
    if envelope.user_id not in ("", principal.user_id):
        return refusals.REASON_FOREIGN_USER
    if envelope.company_id not in ("", principal.company_id):
        return refusals.REASON_FOREIGN_COMPANY
    return None


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
