"""The spool at work: what writes to it while the daemon runs, and what sends it again at the next start.

`SpoolWriter` gathers records and has a thread append them; a record is settled when the disk has it. While the disk
takes nothing, records wait in memory, unsettled, and are tried again, on the disk and with Kafka; beyond
`MAX_WAITING_BYTES` the writer is ``blocked``, and nothing more should be read from clients.

`Replay` offers the old segments' records to Kafka in the order they were spooled, before anybody may connect, so
that they precede all new traffic of their keys; a segment is deleted when Kafka has confirmed every record of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from gateway.core.ports import QueueFull
from gateway.core.principal import Principal
from gateway.errors import NoThread, SpoolError
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.router.delivery import Delivery
    from gateway.router.spool.segments import Record, Segment, Spool
    from gateway.telemetry.logging import Log, RateLimited
    from gateway.telemetry.metrics import Counters

MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Records that may wait in memory for a disk that takes nothing before reading stops."""
RECORD_OVERHEAD_BYTES: Final = 512
"""What a record takes beside its value: an empty message is not free."""
BATCH_BYTES: Final = 4 * 1024 * 1024
BATCH_RECORDS: Final = 4096
"""Records written at once: enough to share an fsync, some 20 ms of encoding."""
AGAIN_RECORDS: Final = 1000
"""Records offered to Kafka again at each failed attempt to write."""
RETRY_S: Final = 1.0
"""Between attempts to write to a disk that takes nothing."""
READ_RECORDS: Final = 500
READ_BYTES: Final = 4 * 1024 * 1024
"""Records read from a segment in one visit to a thread, and bytes, one record at least."""
T = TypeVar("T")
ROOM_S: Final = 0.02
"""Between attempts to queue a record when the producer has no room."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    record: Record
    done: Callable[[], None]
    again: Callable[[], None]

    @property
    def weight(self) -> int:
        """Bytes it takes, about, here and on the disk."""
        return len(self.record.value) + RECORD_OVERHEAD_BYTES


class SpoolWriter:
    """Appends to the spool from the Trio thread. `run` is its task; ``fault`` says why the disk takes nothing."""

    def __init__(self, spool: Spool, log_fault: RateLimited) -> None:
        self._spool = spool
        self._log_fault = log_fault
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._work = trio.Event()
        self._writing = trio.Lock()
        self._batch_records = BATCH_RECORDS
        self._was_blocked = False
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

    def add(self, record: Record, done: Callable[[], None], again: Callable[[], None]) -> None:
        """Write ``record`` soon; ``done`` is called when the disk has it.

        While the disk takes nothing, ``again`` may be called instead: it offers the record to Kafka once more, raises
        QueueFull when it cannot, and adds the record here again if Kafka still refuses it.
        """
        self._waiting.append(_Waiting(record, done, again))
        self._waiting_bytes += self._waiting[-1].weight
        self._work.set()
        if self.blocked and not self._was_blocked:
            self._was_blocked = True
            self.on_blocked()

    async def run(self) -> None:
        """Write until cancelled; a write that is under way then is abandoned."""
        while True:
            await self._work.wait()
            if not await self._write_batch() and self.fault:
                await trio.sleep(RETRY_S)
                async with self._writing:
                    self._offer_again()

    async def flush(self, deadline: float) -> int:
        """Write everything that waits until ``deadline`` (Trio's seconds), unless the disk takes nothing.

        Returns what is left. A write that is under way at the deadline is abandoned: its records may be on the disk all
        the same, and are counted as left.
        """
        with trio.CancelScope(deadline=deadline):
            while self._waiting:
                if not await self._write_batch(at_once=True) and self.fault:
                    break
        return len(self._waiting)

    async def _write_batch(self, *, at_once: bool = False) -> bool:
        """Write the first records; false when the disk did not take them: then the next batch is half as long.

        Where no thread can be had nothing is written, or with ``at_once`` this one writes, and all else waits for it.
        """
        async with self._writing:
            batch: list[_Waiting] = []
            size = 0
            for waiting in islice(self._waiting, self._batch_records):
                if batch and size + waiting.weight > BATCH_BYTES:
                    break
                size += waiting.weight
                batch.append(waiting)
            records = [waiting.record for waiting in batch]
            try:
                if batch:
                    await self._append(records, at_once)
            except (SpoolError, NoThread) as error:
                self._batch_records = max(1, len(batch) // 2)
                if len(batch) == 1 or isinstance(error, NoThread):
                    self.fault = str(error)
                    self._log_fault("the spool takes nothing", error=self.fault, waiting=len(self._waiting))
                return False
            self.fault = ""
            self._batch_records = BATCH_RECORDS
            for waiting in batch:
                self._waiting.popleft()
                self._waiting_bytes -= waiting.weight
                waiting.done()
            self._check()
            return True

    async def _append(self, records: list[Record], at_once: bool) -> None:
        try:
            await in_thread(self._spool.append, records, abandon_on_cancel=True)
        except NoThread:
            if not at_once:
                raise
            self._spool.append(records)

    def _offer_again(self) -> None:
        """Kafka may take what the disk does not: offer it the first records."""
        for _ in range(min(len(self._waiting), AGAIN_RECORDS) if self.fault else 0):
            waiting = self._waiting.popleft()
            self._waiting_bytes -= waiting.weight
            try:
                waiting.again()
            except QueueFull:
                self._waiting.appendleft(waiting)
                self._waiting_bytes += waiting.weight
                break
        self._check()

    def _check(self) -> None:
        if not self._waiting:
            self._work = trio.Event()
            self.fault = ""
        if self._was_blocked and not self.blocked:
            self._was_blocked = False
            self.on_unblocked()


class SegmentReplay:
    """How far one segment has come."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.unsettled = 0
        """Records on their way."""
        self.damaged = False
        self._all_offered = False
        self._kept = False
        self.settled = trio.Event()
        """Every record is confirmed by Kafka, or in a newer segment."""

    def settle(self) -> None:
        """One record is settled."""
        self.unsettled -= 1
        self._check()

    def keep(self) -> None:
        """One record is waited for no longer: it stays in the segment, and so the segment stays."""
        self.unsettled -= 1
        self._kept = True

    def all_offered(self) -> None:
        """No more records will be offered."""
        self._all_offered = True
        self._check()

    def _check(self) -> None:
        if self._all_offered and not self.unsettled and not self._kept:
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

    @property
    def backlog(self) -> int:
        """What waits is the record itself."""
        return 0

    def settle(self, index: int) -> None:
        """The record is settled."""
        self.segment.settle()

    def note_rejected(self, reason: str, index: int) -> None:
        """There is nobody to tell."""

    def wait_alone(self) -> None:
        """There is nobody to wait: the record itself does."""

    def go_on(self) -> None:
        """See `wait_alone`."""

    def keep(self) -> None:
        """The record is given up here: the spool still has it."""
        self.segment.keep()


def _chunk(records: Iterator[Record]) -> list[Record]:
    """The next records, none at the end."""
    chunk: list[Record] = []
    size = 0
    for record in islice(records, READ_RECORDS):
        chunk.append(record)
        size += len(record.value)
        if size >= READ_BYTES:
            break
    return chunk


class Replay:
    """Sends the old segments of a spool. `run` once, before new traffic."""

    def __init__(self, spool: Spool, delivery: Delivery, counters: Counters, log: Log) -> None:
        self._spool = spool
        self._delivery = delivery
        self._counters = counters
        self._log = log
        self._offering = trio.CancelScope()
        self._under_way: list[SegmentReplay] = []
        self.waiting = bool(spool.old)
        """True until every record has been handed to the producer."""

    @property
    def unsettled(self) -> int:
        """Records handed to the producer that Kafka has not confirmed: they are still in the spool."""
        return sum(replay.unsettled for replay in self._under_way)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Offer everything, report started, then wait for Kafka and delete each segment it has confirmed.

        Cancelled or stopped, it leaves segments that are not wholly confirmed, to be sent again.
        """
        async with trio.open_nursery() as nursery:
            if not self._offering.cancel_called:
                with self._offering:
                    for segment in self._spool.old:
                        await self._offer(segment, nursery)
                    self.waiting = False
            task_status.started()

    def stop(self) -> None:
        """Offer nothing more."""
        self._offering.cancel()

    async def tidy(self) -> None:
        """Wait until every segment that is confirmed is deleted."""
        while any(replay.settled.is_set() for replay in self._under_way):  # noqa: ASYNC110  # `_finish` is no event
            await trio.sleep(ROOM_S)

    async def _offer(self, segment: Segment, nursery: trio.Nursery) -> None:
        replay = SegmentReplay(segment)
        self._under_way.append(replay)
        records = segment.read()
        count = 0
        try:
            while chunk := await self._in_thread(_chunk, records):
                for record in chunk:
                    await self._offer_record(record, replay)
                    count += 1
            fault_at = await self._in_thread(segment.fault_at)
        except OSError as error:
            self._log.error("spool segment unreadable, left where it is", segment=str(segment.path), error=str(error))
            return
        if fault_at is not None:
            replay.damaged = True
            self._log.error("spool segment damaged", segment=str(segment.path), records=count, fault_at=fault_at)
        self._log.info("spool segment offered to Kafka", segment=str(segment.path), records=count)
        replay.all_offered()
        nursery.start_soon(self._finish, replay)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Run it in a thread, as soon as there is one."""
        while True:
            try:
                return await in_thread(call, *arguments)
            except NoThread as error:
                self._log.error("the spool waits", error=str(error))
                await trio.sleep(RETRY_S)

    async def _offer_record(self, record: Record, replay: SegmentReplay) -> None:
        principal = Principal(record.user_id, record.company_id, "", 0.0)
        origin = SpooledOrigin(record.connection_id, principal, record.path, replay)
        while True:
            replay.unsettled += 1
            try:
                self._delivery.replay(record, origin)
            except QueueFull:
                replay.unsettled -= 1
                await trio.sleep(ROOM_S)
            else:
                self._counters.replayed += 1
                return

    async def _finish(self, replay: SegmentReplay) -> None:
        """Delete a segment when all of it is settled."""
        await replay.settled.wait()
        segment = replay.segment
        try:
            await self._in_thread(partial(segment.finish, damaged=replay.damaged))
        except OSError as error:
            self._log.error("spool segment sent and not deleted", segment=str(segment.path), error=str(error))
        else:
            self._log.info("spool segment sent", segment=str(segment.path))
        self._under_way.remove(replay)
