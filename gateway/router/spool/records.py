"""The records of a spool, and how they stand in a file.

A record is ``length (4 bytes, big-endian) | CRC-32 of the body (4 bytes) | body``; the body is a MessagePack array of
`Record`'s fields.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from types import NoneType
from typing import BinaryIO, Final

import msgpack

MAX_RECORD_BYTES: Final = 32 * 1024 * 1024
"""A larger length is a fault: four times `listen.max_message_bytes`' upper bound."""
HEADER: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record with what is needed to account for it: enough to send it as if it had just come."""

    topic: str
    key: bytes
    value: bytes
    original_bytes: int
    """The first ``original_bytes`` of the value are the message as received; the rest was stamped on."""
    headers: list[tuple[str, bytes]] | None
    """A dead letter's headers; None for a message on its way to its own topic."""
    user_id: str
    company_id: str
    message_type: str
    path: str
    connection_id: str
    received_at_ms: int
    reason: str
    """Why it is here: a `gateway.core.catalogue.Reason` that gives up."""
    uncertain: bool
    """It was on its way when it was given up: Kafka may hold it already."""


def read_body(file: BinaryIO) -> bytes | None:
    """The next record's body, None at the end and at a fault: what stands there is cut off, or garbled."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length, checksum = HEADER.unpack(header)
    if length > MAX_RECORD_BYTES:
        return None
    body = file.read(length)
    return body if len(body) == length and zlib.crc32(body) == checksum else None


_FIELDS: Final = Record.__slots__
_KINDS: Final[tuple[type | tuple[type, ...], ...]] = (
    str,
    bytes,
    bytes,
    int,
    (tuple, NoneType),
    str,
    str,
    str,
    str,
    str,
    int,
    str,
    bool,
)


def encode(record: Record) -> bytes:
    """A record as it stands in a file."""
    body: bytes = msgpack.packb([getattr(record, name) for name in _FIELDS])
    return HEADER.pack(len(body), zlib.crc32(body)) + body


def decode(body: bytes) -> Record:
    """The record of a sound body. Raises ValueError, TypeError or msgpack's errors for what is no record of ours."""
    fields = list(msgpack.unpackb(body, use_list=False))
    for field, kind in zip(fields, _KINDS, strict=True):
        if not isinstance(field, kind):
            raise TypeError(f"{field!r} is no {kind}")
    if fields[4] is not None:
        fields[4] = [(str(name), bytes(value)) for name, value in fields[4]]
    return Record(*fields)
