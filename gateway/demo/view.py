"""The demo's view: live on a terminal, a line a second without one."""

from __future__ import annotations

import http.client
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gateway.ops.probe import fetch
from gateway.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.demo.arrivals import Arrivals

REFRESH_S: Final = 0.25
ASK_TIMEOUT_S: Final = 2.0


@dataclass(slots=True)
class Progress:
    """What the view shows."""

    arrivals: Arrivals
    connected: int = 0
    sent: int = 0
    failures: int = 0
    first_failure: str = ""
    rate: float = 0.0
    health: dict[str, Any] = field(default_factory=dict)

    def note_connected(self, change: int) -> None:
        """``change`` clients more, or less."""
        self.connected += change

    def note_sent(self) -> None:
        """One message is about to be sent."""
        self.sent += 1

    def note_failure(self, failure: str) -> None:
        """A client failed."""
        self.failures += 1
        self.first_failure = self.first_failure or failure

    def note_rate(self, rate: float) -> None:
        """Messages a second that arrive in Kafka."""
        self.rate = rate

    def note_health(self, health: dict[str, Any]) -> None:
        """What the daemon says of itself."""
        self.health = health

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, in the order they are shown."""
        arrived = self.arrivals.distinct  # before what was sent: it grows meanwhile
        messages = self.health.get("messages", {})
        balance = messages.get("imbalance")
        return [
            ("connections", f"{self.connected:,}"),
            ("messages/s", f"{self.rate:,.0f}"),
            ("sent", f"{self.sent:,}"),
            ("in Kafka", f"{arrived:,}"),
            ("p50 to Kafka", f"{self.arrivals.percentile_ms(0.50):.1f} ms"),
            ("p99 to Kafka", f"{self.arrivals.percentile_ms(0.99):.1f} ms"),
            ("dead letters", f"{messages.get('dead_lettered', 0):,}"),
            ("books", "-" if balance is None else "balanced" if balance == 0 else f"off by {balance}"),
        ]


@asynccontextmanager
async def shown(progress: Progress, sidecar: str) -> AsyncIterator[None]:
    """Show the progress while the context lasts."""
    console = Console()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch, progress, sidecar)
        if console.is_terminal:
            nursery.start_soon(_live, progress, console)
        else:
            nursery.start_soon(_lines, progress)
        yield
        nursery.cancel_scope.cancel()


async def _watch(
    progress: Progress, sidecar: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Once a second: the rate, and what the daemon's own books say; started once they have said something."""
    await _ask(progress, sidecar)
    task_status.started()
    before, at = progress.arrivals.distinct, trio.current_time()
    while True:
        await trio.sleep(1.0)
        now = trio.current_time()
        progress.note_rate((progress.arrivals.distinct - before) / (now - at))
        before, at = progress.arrivals.distinct, now
        await _ask(progress, sidecar)


async def _ask(progress: Progress, sidecar: str) -> None:
    """Take the daemon's health; what it said last stays when it does not answer."""
    try:
        _, health = await in_thread(fetch, f"{sidecar}/health", ASK_TIMEOUT_S, abandon_on_cancel=True)
        progress.note_health(json.loads(health))
    except (OSError, ValueError, http.client.HTTPException):
        return


async def _live(progress: Progress, console: Console) -> None:
    with Live(console=console, auto_refresh=False, transient=False) as live:
        try:
            while True:
                live.update(_table(progress), refresh=True)
                await trio.sleep(REFRESH_S)
        finally:
            live.update(_table(progress), refresh=True)


def _table(progress: Progress) -> Table:
    table = Table(title="gateway demo", show_header=False, min_width=40)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for label, value in progress.rows():
        table.add_row(label, value)
    return table


async def _lines(progress: Progress) -> None:
    while True:
        await trio.sleep(1.0)
        print("  ".join(f"{label}: {value}" for label, value in progress.rows()), flush=True)
