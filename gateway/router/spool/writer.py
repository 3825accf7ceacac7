"""Writes to the spool while the daemon runs.

`SpoolWriter` gathers messages and has a thread append them; a message is settled when the disk has it. While the disk
takes nothing, messages wait in memory, unsettled, and are tried again, on the disk and with Kafka; beyond
`MAX_WAITING_BYTES` the writer is ``blocked``, which is a hold: nothing more should be read from clients.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from gateway.core.catalogue import REASON_OTHER
from gateway.core.holds import SPOOL_BLOCKED
from gateway.errors import NoThread, SpoolError
from gateway.router.spool.records import Record
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.holds import Holds
    from gateway.router.messages import Message
    from gateway.router.spool.segments import Spool
    from gateway.telemetry.logging import RateLimited

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


class Waiting(NamedTuple):
    """A message that waits for the disk, as the record that is to be written."""

    record: Record
    message: Message

    @property
    def weight(self) -> int:
        """Bytes it takes, about, here and on the disk."""
        return len(self.record.value) + RECORD_OVERHEAD_BYTES


class SpoolWriter:
    """Appends to the spool from the Trio thread. `run` is its task; ``fault`` says why the disk takes nothing."""

    def __init__(
        self,
        spool: Spool,
        *,
        written: Callable[[Message], None],
        offer_again: Callable[[Message], bool],
        holds: Holds,
        log_fault: RateLimited,
    ) -> None:
        """``written`` is told of every message that the disk has. ``offer_again`` may be asked while the disk takes
        nothing: whether the message has found another place, Kafka; it may be added here again by then.
        """
        self._spool = spool
        self._written = written
        self._offer_again = offer_again
        self._holds = holds
        self._log_fault = log_fault
        self._waiting: deque[Waiting] = deque()
        self._waiting_bytes = 0
        self._work = trio.Event()
        self._writing = trio.Lock()
        self._batch_records = BATCH_RECORDS
        self._was_blocked = False
        self.fault = ""

    def __len__(self) -> int:
        """Records that are not on the disk yet."""
        return len(self._waiting)

    @property
    def blocked(self) -> bool:
        """Too much waits for the disk."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def add(self, record: Record, message: Message) -> None:
        """Write ``record`` soon: it is what is kept of ``message``."""
        self._waiting.append(Waiting(record, message))
        self._waiting_bytes += self._waiting[-1].weight
        self._work.set()
        if self.blocked and not self._was_blocked:
            self._was_blocked = True
            self._holds.hold(SPOOL_BLOCKED)

    async def run(self) -> None:
        """Write until cancelled; a write that is under way then is abandoned."""
        while True:
            await self._work.wait()
            if not await self._write_batch() and self.fault:
                await trio.sleep(RETRY_S)
                async with self._writing:
                    self._offer_some_again()

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
            batch: list[Waiting] = []
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
                self._written(waiting.message)
            self._check()
            return True

    async def _append(self, records: list[Record], at_once: bool) -> None:
        try:
            await in_thread(self._spool.append, records, abandon_on_cancel=True)
        except NoThread:
            if not at_once:
                raise
            self._spool.append(records)

    def _offer_some_again(self) -> None:
        """Kafka may take what the disk does not: offer it the first records."""
        for _ in range(min(len(self._waiting), AGAIN_RECORDS) if self.fault else 0):
            waiting = self._waiting.popleft()
            self._waiting_bytes -= waiting.weight
            if not self._offer_again(waiting.message):
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
            self._holds.release(SPOOL_BLOCKED)


def record_of(message: Message) -> Record:
    """What the spool keeps of a message."""
    principal = message.sender.principal
    return Record(
        topic=message.topic,
        key=message.key,
        value=message.value,
        original_bytes=message.size,
        headers=message.headers,
        user_id=principal.user_id,
        company_id=principal.company_id,
        message_type=message.tally.message_type,
        path=message.sender.path,
        connection_id=message.sender.connection_id,
        received_at_ms=message.arrived_at_ms,
        reason=message.given_up or REASON_OTHER,
        uncertain=message.uncertain,
    )
