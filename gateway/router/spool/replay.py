"""Sends again what the spool holds: once at the start, before new traffic, and by ``gateway spool replay``.

`Replay` offers the old segments' records to Kafka in the order they were spooled, before anybody may connect, so
that they precede all new traffic of their keys; a segment is deleted when Kafka has confirmed every record of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from gateway.core.principal import Principal
from gateway.errors import NoThread
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.core.catalogue import Reason
    from gateway.router.messages import Sender
    from gateway.router.spool.records import Record
    from gateway.router.spool.segments import Segment, Spool
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Counter, Metrics

RETRY_S: Final = 1.0
"""Between attempts to get a thread."""
READ_RECORDS: Final = 500
READ_BYTES: Final = 4 * 1024 * 1024
"""Records read from a segment in one visit to a thread, and bytes, one record at least."""
ROOM_S: Final = 0.02
"""Between attempts to queue a record when the producer has no room."""

T = TypeVar("T")


def declare(metrics: Metrics) -> Counter:
    """Declare the metric that is there without a spool too."""
    return metrics.counter("gateway_spool_replayed", "Records offered again.")


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

    def offer(self) -> None:
        """One record is about to be on its way."""
        self.unsettled += 1

    def offer_failed(self) -> None:
        """It is not: there was no room."""
        self.unsettled -= 1

    def settle(self) -> None:
        """One record is settled."""
        self.unsettled -= 1
        self._check()

    def keep(self) -> None:
        """One record is waited for no longer: it stays in the segment, and so the segment stays."""
        self.unsettled -= 1
        self._kept = True

    def note_damage(self) -> None:
        """The segment holds more than can be read."""
        self.damaged = True

    def all_offered(self) -> None:
        """No more records will be offered."""
        self._all_offered = True
        self._check()

    def _check(self) -> None:
        if self._all_offered and not self.unsettled and not self._kept:
            self.settled.set()


@dataclass(frozen=True, slots=True)
class SpooledSender:
    """The `Sender` of a record that comes from the spool: nobody is told, its segment is.

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

    def settle(self, index: int | None) -> None:
        """The record is settled."""
        self.segment.settle()

    def note_rejected(self, reason: Reason, index: int | None) -> None:
        """There is nobody to tell."""

    def wait_alone(self) -> None:
        """There is nobody to wait: the record itself does."""

    def go_on(self) -> None:
        """See `wait_alone`."""

    def keep(self) -> bool:
        """The record is given up here: the spool still has it."""
        self.segment.keep()
        return True


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

    def __init__(self, spool: Spool, offer: Callable[[Record, Sender], bool], metrics: Metrics, log: Log) -> None:
        """``offer`` hands a record over as if it had just come from that sender; false when there is no room."""
        self._spool = spool
        self._offer_to_kafka = offer
        self._replayed = declare(metrics)
        self._log = log
        self._offering = trio.CancelScope()
        self._under_way: list[SegmentReplay] = []
        self.waiting = bool(spool.old)
        """True until every record has been handed to the producer."""

    @property
    def offered(self) -> int:
        """Records handed to the producer so far."""
        return self._replayed.value

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
            replay.note_damage()
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
        sender = SpooledSender(record.connection_id, principal, record.path, replay)
        while True:
            replay.offer()
            if self._offer_to_kafka(record, sender):
                self._replayed.add()
                return
            replay.offer_failed()
            await trio.sleep(ROOM_S)

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
