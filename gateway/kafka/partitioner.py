"""Where a record's key belongs."""

from __future__ import annotations

from typing import Final

TopicPartition = tuple[str, int]
"""A topic and the number of one of its partitions."""

_MASK: Final = 0xFFFFFFFF


def _murmur2(data: bytes) -> int:
    """Kafka's murmur2 (org.apache.kafka.common.utils.Utils), 32 bits, seed 0x9747b28c."""
    multiplier, length = 0x5BD1E995, len(data)
    found = 0x9747B28C ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * multiplier & _MASK
        word = (word ^ word >> 24) * multiplier & _MASK
        found = found * multiplier & _MASK ^ word
    if length > whole:
        found = (found ^ int.from_bytes(data[whole:], "little")) * multiplier & _MASK
    found = (found ^ found >> 13) * multiplier & _MASK
    return found ^ found >> 15


def partition_of(key: bytes, count: int) -> int:
    """Where Java's default partitioner, and librdkafka's murmur2_random, put a key among ``count`` partitions."""
    return (_murmur2(key) & 0x7FFFFFFF) % count
