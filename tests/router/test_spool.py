"""The spool's files: what was appended is read back, whatever happened to the end of a file."""

from __future__ import annotations

import resource
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tally import Tally
from gateway.errors import SpoolError
from gateway.router.messages import Message
from gateway.router.spool import records
from gateway.router.spool import segments as spool_module
from gateway.router.spool.records import Record
from gateway.router.spool.segments import MAGIC, Segment, Spool, list_segments
from gateway.router.spool.writer import SpoolWriter
from gateway.telemetry.logging import RateLimited
from tests.router.stand_ins import Recorder, Sender

RECORD = Record(
    topic="tick-data",
    key=b"alice",
    value=b"\x00raw+stamp",
    original_bytes=4,
    headers=None,
    user_id="alice",
    company_id="acme",
    message_type="tick_data",
    path="/ws/mt5",
    connection_id="c-9",
    received_at_ms=1_700_000_000_000,
    reason="drain_timeout",
    uncertain=True,
)


def numbered(count: int, first: int = 0) -> list[Record]:
    return [replace(RECORD, value=b"%d" % number) for number in range(first, first + count)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def written(directory: Path, *batches: list[Record]) -> list[Segment]:
    spool = Spool(directory, 1 << 30)
    for batch in batches:
        spool.append(batch)
    spool.close()
    return list_segments(directory)


def test_records_come_back_in_the_order_they_were_appended(directory: Path) -> None:
    dead = replace(RECORD, headers=[("reason", b"kafka_refused"), ("user_id", "ü".encode())], uncertain=False)
    (segment,) = written(directory, numbered(3), [dead])
    assert list(segment.read()) == [*numbered(3), dead]
    assert segment.fault_at() is None


def test_a_later_spool_writes_to_a_later_segment_and_knows_the_old_ones(directory: Path) -> None:
    written(directory, numbered(1))
    spool = Spool(directory, 1 << 30)
    assert [segment.path.name for segment in spool.old] == ["0000000001.spool"]
    spool.append(numbered(1, 1))
    spool.close()
    assert [segment.path.name for segment in list_segments(directory)] == ["0000000001.spool", "0000000002.spool"]


def test_full_segments_are_followed_by_others_in_order(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 300)
    segments = written(directory, *([record] for record in numbered(10)))
    assert len(segments) > 2
    assert [record for segment in segments for record in segment.read()] == numbered(10)


def test_two_processes_cannot_hold_one_spool(directory: Path) -> None:
    spool = Spool(directory, 1 << 30)
    with pytest.raises(SpoolError, match="in use by another process"):
        Spool(directory, 1 << 30)
    spool.close()
    Spool(directory, 1 << 30).close()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match=str(tmp_path / "file")):
        Spool(tmp_path / "file" / "spool", 1 << 30)


@given(cut=st.integers(min_value=0))
def test_a_cut_off_end_costs_nothing_before_it(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    (segment,) = written(tmp_path_factory.mktemp("cut"), numbered(5))
    whole = segment.path.read_bytes()
    segment.path.write_bytes(whole[: cut % (len(whole) + 1)])
    found = list(segment.read())
    assert found == numbered(5)[: len(found)]
    fault_at = segment.fault_at()
    assert (fault_at is None) == (segment.size_bytes in (0, *boundaries(5)))


def boundaries(count: int) -> list[int]:
    sizes = [len(records.encode(record)) for record in numbered(count)]
    return [len(MAGIC) + sum(sizes[:number]) for number in range(count + 1)]


@given(at=st.integers(min_value=0), change=st.integers(min_value=1, max_value=255))
def test_a_changed_byte_is_found_and_nothing_before_it_is_lost(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: int
) -> None:
    (segment,) = written(tmp_path_factory.mktemp("flip"), numbered(5))
    content = bytearray(segment.path.read_bytes())
    at %= len(content)
    content[at] ^= change
    segment.path.write_bytes(content)
    found = list(segment.read())
    intact = max((number for number, end in enumerate(boundaries(5)) if end <= at), default=0)
    assert found == numbered(5)[:intact]
    assert segment.fault_at() == (boundaries(5)[intact] if at >= len(MAGIC) else 0)


def test_garbage_behind_the_records_is_named_and_kept_aside_when_they_are_sent(directory: Path) -> None:
    (segment,) = written(directory, numbered(3))
    sound = segment.size_bytes
    with segment.path.open("ab") as file:
        file.write(b"\xff" * 100)
    assert (list(segment.read()), segment.fault_at()) == (numbered(3), sound)
    segment.finish(damaged=True)
    assert list_segments(directory) == []
    assert (directory / "0000000001.damaged").stat().st_size == sound + 100


def test_what_was_kept_aside_is_never_replaced(directory: Path) -> None:
    for _ in range(2):
        (segment,) = written(directory, numbered(1))
        segment.finish(damaged=True)
    assert len(list(directory.glob("*.damaged"))) == 2


def test_record_of_another_kind_is_a_fault_and_no_crash(directory: Path) -> None:
    (segment,) = written(directory, numbered(1))
    sound = segment.size_bytes
    with segment.path.open("ab") as file:
        body = msgpack.packb([None] * 13)
        file.write(records.HEADER.pack(len(body), zlib.crc32(body)) + body)
    assert (list(segment.read()), segment.fault_at()) == (numbered(1), sound)


def test_sound_segment_is_deleted_when_it_is_sent(directory: Path) -> None:
    (segment,) = written(directory, numbered(3))
    segment.finish(damaged=False)
    assert [path.name for path in directory.iterdir()] == ["lock"]


def test_records_beyond_max_bytes_are_refused_whole(directory: Path) -> None:
    spool = Spool(directory, 65_536)
    big = replace(RECORD, value=bytes(30_000))
    spool.append([big, big])
    with pytest.raises(SpoolError, match=r"exceed spool\.max_bytes"):
        spool.append([RECORD, big])
    spool.append([RECORD])
    spool.close()
    assert list(list_segments(directory)[0].read()) == [big, big, RECORD]


def test_disk_that_takes_half_a_record_keeps_none_of_it_and_the_spool_goes_on(directory: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: write(2) then takes what fits and fails."""
    spool = Spool(directory, 1 << 30)
    spool.append(numbered(2))
    size = list_segments(directory)[0].size_bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(SpoolError, match="File too large"):
                spool.append([replace(RECORD, value=bytes(5000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    spool.append(numbered(2, 2))
    spool.close()
    segments = list_segments(directory)
    assert [record for segment in segments for record in segment.read()] == numbered(4)
    assert [segment.fault_at() for segment in segments] == [None] * len(segments)


class Log:
    """What `SpoolWriter` says."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.faults.append(str(fields["error"]))


class World:
    """A writer, and what it did with the messages numbered by their index."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.spool = Spool(directory, max_bytes)
        self.log = Log()
        self.settled: list[int] = []
        self.offer: Callable[[int], bool] = lambda number: False
        self.holds = Recorder()
        self.writer = SpoolWriter(
            self.spool,
            written=lambda message: self.settled.append(message.index or 0),
            offer_again=lambda message: self.offer(message.index or 0),
            holds=self.holds,
            log_fault=RateLimited(self.log, lambda: 0.0),
        )

    def add(self, record: Record, number: int = 0) -> None:
        """Let a record wait for the disk."""
        self.writer.add(record, Message(Sender(), Tally(), record.topic, record.value, number))


async def test_nearly_full_spool_takes_what_still_fits_and_says_what_does_not(directory: Path) -> None:
    it = World(directory, 65_536)
    spool, writer, log, settled = it.spool, it.writer, it.log, it.settled
    for number, record in enumerate(numbered(1000)):
        it.add(replace(record, value=bytes(900)), number)
    left = await writer.flush(trio.current_time() + 10)
    spool.close()
    assert settled == list(range(len(settled))), "in order"
    assert (len(settled) + left, len(writer)) == (1000, left)
    assert 50 < len(settled) < 75
    assert "exceed spool.max_bytes" in writer.fault
    assert len(log.faults) == 1
    assert len(list(list_segments(directory)[0].read())) == len(settled)


async def test_many_small_records_that_wait_for_the_disk_block_too(directory: Path) -> None:
    it = World(directory, 65_536)
    blocked: list[bool] = []
    it.holds.on_hold = lambda: blocked.append(True)
    for _ in range(40_000):
        it.add(replace(RECORD, value=b""))
    it.spool.close()
    assert it.writer.blocked
    assert blocked == [True]


async def test_what_the_disk_does_not_take_is_offered_to_kafka_again(
    directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    it = World(directory, 65_536)
    spool, writer = it.spool, it.writer
    taken: list[int] = []

    def again(number: int) -> bool:
        if len(taken) == 1 and not full:
            full.append(True)
            return False
        taken.append(number)
        return True

    full: list[bool] = []
    it.offer = again
    for _ in range(5):
        it.add(replace(RECORD, value=bytes(70_000)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        while len(writer):
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    spool.close()
    assert len(taken) == 5
    assert it.settled == [], "the disk has no room for it"
    assert writer.fault == ""


async def test_records_that_neither_disk_nor_kafka_takes_for_a_while_keep_their_order(
    directory: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = World(directory, 1 << 30)
    spool, writer, log = it.spool, it.writer, it.log
    append = spool.append
    attempts: list[int] = []

    def fails_at_first(records: list[Record]) -> None:
        attempts.append(len(records))
        if len(attempts) < 8:
            raise SpoolError("no disk")
        append(records)

    monkeypatch.setattr(spool, "append", fails_at_first)
    offered: list[int] = []

    def again(number: int) -> bool:
        if number > 1 or len(offered) > 1:
            return False
        offered.append(number)
        return True

    it.offer = again
    for number, record in enumerate(numbered(10)):
        it.add(record, number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        while len(writer):
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    spool.close()
    assert log.faults
    assert offered == [0, 1], "Kafka took the first two"
    assert [record for segment in list_segments(directory) for record in segment.read()] == numbered(8, 2)
