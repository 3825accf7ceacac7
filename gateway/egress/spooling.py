"""The spool at work: what writes to it while the daemon runs, and what sends it again at the next start.

`SpoolWriter` gathers records and has a thread append them; a record is settled when the disk has it. While the disk
takes nothing, records wait in memory, unsettled, and are tried again; beyond `MAX_WAITING_BYTES` the writer is
``blocked``, and nothing more should be read from clients.

`Replay` offers the old segments' records to Kafka in the order they were spooled, before anybody may connect, so
that they precede all new traffic of their keys; a segment is deleted when Kafka has confirmed every record of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from gateway.core.ports import QueueFull
from gateway.core.principal import Principal
from gateway.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.egress.delivery import Delivery
    from gateway.egress.spool import Record, Segment, Spool
    from gateway.telemetry.logging import Log, RateLimited
    from gateway.telemetry.metrics import Counters

MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Records that may wait in memory for a disk that takes nothing before reading stops."""
BATCH_BYTES: Final = 4 * 1024 * 1024
"""Records written at once: enough to share an fsync, little enough that a nearly full disk still takes some."""
RETRY_S: Final = 1.0
"""Between attempts to write to a disk that takes nothing."""
READ_RECORDS: Final = 500
"""Records read from a segment in one visit to a thread."""
ROOM_S: Final = 0.02
"""Between attempts to queue a record when the producer has no room."""


class SpoolWriter:
    """Appends to the spool from the Trio thread. `run` is its task; ``fault`` says why the disk takes nothing."""

    def __init__(self, spool: Spool, log_fault: RateLimited) -> None:
        self._spool = spool
        self._log_fault = log_fault
        self._waiting: deque[tuple[Record, Callable[[], None]]] = deque()
        self._waiting_bytes = 0
        self._work = trio.Event()
        self._writing = trio.Lock()
        self.fault = ""
        self.on_blocked: Callable[[], None] = lambda: None
        self.on_unblocked: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Records that are not on the disk yet."""
        return len(self._waiting)

    @property
    def blocked(self) -> bool:
        """Too much waits for the disk."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def add(self, record: Record, done: Callable[[], None]) -> None:
        """Write ``record`` soon; ``done`` is called when the disk has it."""
        self._waiting.append((record, done))
        self._waiting_bytes += len(record.value)
        self._work.set()
        if self.blocked:
            self.on_blocked()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._work.wait()
            if not await self._write_batch():
                await trio.sleep(RETRY_S)

    async def flush(self, timeout_s: float) -> int:
        """Write everything that waits, unless the disk takes nothing or it takes too long; return what is left."""
        with trio.move_on_after(timeout_s):
            while self._waiting and await self._write_batch():
                pass
        return len(self._waiting)

    async def _write_batch(self) -> bool:
        """Write the first records; false when the disk did not take them. Cancelled, it ends after the write."""
        async with self._writing:
            batch: list[tuple[Record, Callable[[], None]]] = []
            size = 0
            for record, done in self._waiting:
                if batch and size + len(record.value) > BATCH_BYTES:
                    break
                size += len(record.value)
                batch.append((record, done))
            try:
                if batch:
                    await trio.to_thread.run_sync(self._spool.append, [record for record, _ in batch])
            except SpoolError as error:
                self.fault = str(error)
                self._log_fault("the spool takes nothing", error=self.fault, waiting=len(self._waiting))
                return False
            was_blocked = self.blocked
            self.fault = ""
            self._waiting_bytes -= size
            for _, done in batch:
                self._waiting.popleft()
                done()
            if not self._waiting:
                self._work = trio.Event()
            if was_blocked and not self.blocked:
                self.on_unblocked()
            return True


class SegmentReplay:
    """How far one segment has come."""

    def __init__(self) -> None:
        self._unsettled = 0
        self._all_offered = False
        self.settled = trio.Event()
        """Every record is confirmed by Kafka, or in a newer segment."""

    def offered(self) -> None:
        """One more record is on its way."""
        self._unsettled += 1

    def taken_back(self) -> None:
        """The producer had no room for it."""
        self._unsettled -= 1

    def settle(self) -> None:
        """One record is settled."""
        self._unsettled -= 1
        self._check()

    def all_offered(self) -> None:
        """No more records will be offered."""
        self._all_offered = True
        self._check()

    def _check(self) -> None:
        if self._all_offered and not self._unsettled:
            self.settled.set()


@dataclass(frozen=True, slots=True)
class SpooledOrigin:
    """The `Origin` of a record that comes from the spool: nobody is told, its segment is.

    When Kafka's confirmation is not waited for any longer, the record is not spooled again: it still is.
    """

    connection_id: str
    principal: Principal
    path: str
    segment: SegmentReplay

    def settle(self, index: int) -> None:
        """The record is settled."""
        self.segment.settle()

    def note_rejected(self, reason: str, index: int) -> None:
        """There is nobody to tell."""


class Replay:
    """Sends the old segments of a spool. `run` once, before new traffic."""

    def __init__(self, spool: Spool, delivery: Delivery, counters: Counters, log: Log) -> None:
        self._spool = spool
        self._delivery = delivery
        self._counters = counters
        self._log = log
        self._offering = trio.CancelScope()
        self.waiting = bool(spool.old)
        """True until every record has been handed to the producer."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Offer everything, report started, then wait for Kafka and delete segment by segment.

        Cancelled or stopped, it leaves segments that are not wholly confirmed, to be sent again.
        """
        under_way: list[tuple[Segment, SegmentReplay]] = []
        with self._offering:
            for segment in self._spool.old:
                under_way.append((segment, await self._offer(segment)))  # noqa: PERF401  # what is done counts if stopped
            self.waiting = False
        task_status.started()
        for segment, replay in under_way:
            await replay.settled.wait()
            await self._finish(segment)

    def stop(self) -> None:
        """Offer nothing more."""
        self._offering.cancel()

    async def _offer(self, segment: Segment) -> SegmentReplay:
        replay = SegmentReplay()
        records = segment.read()
        count = 0
        try:
            while chunk := await trio.to_thread.run_sync(lambda: list(islice(records, READ_RECORDS))):
                for record in chunk:
                    await self._offer_record(record, replay)
                    count += 1
            fault_at = await trio.to_thread.run_sync(segment.fault_at)
        except OSError as error:
            self._log.error("spool segment unreadable, left where it is", segment=str(segment.path), error=str(error))
            replay.offered()  # never settled
        else:
            if fault_at is not None:
                self._log.error("spool segment damaged", segment=str(segment.path), records=count, fault_at=fault_at)
            self._log.info("spool segment offered to Kafka", segment=str(segment.path), records=count)
        replay.all_offered()
        return replay

    async def _offer_record(self, record: Record, replay: SegmentReplay) -> None:
        principal = Principal(record.user_id, record.company_id, "", 0.0)
        origin = SpooledOrigin(record.connection_id, principal, record.path, replay)
        while True:
            replay.offered()
            try:
                self._delivery.replay(record, origin)
            except QueueFull:
                replay.taken_back()
                await trio.sleep(ROOM_S)
            else:
                self._counters.replayed += 1
                return

    async def _finish(self, segment: Segment) -> None:
        try:
            await trio.to_thread.run_sync(segment.finish)
        except OSError as error:
            self._log.error("spool segment sent and not deleted", segment=str(segment.path), error=str(error))
        else:
            self._log.info("spool segment sent", segment=str(segment.path))
