"""The memory budget: near it newcomers are refused, then the connections that hold most are not read for a while.

Looked at once a second, by the process' resident set. What a connection holds is what it sent and what is not handed
over, and what its peer has not taken.
"""

from __future__ import annotations

import heapq
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from gateway.core import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.core.admission import Admission
    from gateway.router.session import Session
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

LOOK_S: Final = 1.0
SHED_SHARE: Final = 0.9
"""From this share of the budget on, newcomers are refused, until it is `CALM_SHARE` again."""
PAUSE_SHARE: Final = 0.95
"""From this share on, the largest are not read."""
CALM_SHARE: Final = 0.85
PAUSED_AT_ONCE: Final = 16
"""So many more each time it is looked."""
SLICE: Final = 1000
"""Sessions looked at between two chances for other tasks."""

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """The resident set of this process (proc(5), statm); 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


class MemoryGuard:
    """Keeps a process near its budget in bytes; 0 is none."""

    def __init__(
        self,
        budget_bytes: int,
        admission: Admission,
        sessions: Iterable[Session],
        log: Log,
        *,
        metrics: Metrics,
        measure: Callable[[], int] = resident_bytes,
    ) -> None:
        metrics.gauge(
            "gateway_connections_not_read", "Connections that are not read for memory.", lambda: len(self._paused)
        )
        self._budget = budget_bytes
        self._admission = admission
        self._sessions = sessions
        self._log = log
        self._measure = measure
        self._paused: set[Session] = set()
        self.short = False
        """Newcomers are refused."""

    def use_budget(self, budget_bytes: int) -> None:
        """Keep near another budget."""
        self._budget = budget_bytes

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Measure, and do what follows."""
        used = self._measure() if self._budget else 0
        if used >= self._budget * SHED_SHARE and self._budget:
            self._set_short(True, used)
        elif used <= self._budget * CALM_SHARE:
            self._set_short(False, used)
            self._let_go_on()
        if self._budget and used >= self._budget * PAUSE_SHARE:
            await self._pause_largest()

    def _set_short(self, short: bool, used: int) -> None:
        if short != self.short:
            self.short = short
            self._admission.shed(catalogue.OVERLOADED if short else None)
            say = self._log.error if short else self._log.info
            say("short of memory" if short else "memory is enough again", resident_bytes=used, budget=self._budget)

    async def _pause_largest(self) -> None:
        """Stop reading those that hold most, of those that are read; a session that ends meanwhile is harmless."""
        self._paused = {session for session in self._paused if session.is_open and not session.is_read}
        largest: list[tuple[int, int, Session]] = []
        for number, session in enumerate(self._sessions):
            held = session.held_bytes
            if held and session not in self._paused:
                largest.append((held, number, session))
            if number % SLICE == SLICE - 1:
                largest = heapq.nlargest(PAUSED_AT_ONCE, largest)
                await trio.lowlevel.checkpoint()
        for held, _, session in heapq.nlargest(PAUSED_AT_ONCE, largest):
            self._log.warning("not read: it holds most", connection=session.connection_id, held_bytes=held)
            session.pause_reading()
            self._paused.add(session)

    def _let_go_on(self) -> None:
        paused, self._paused = self._paused, set()
        for session in paused:
            session.resume_reading()
