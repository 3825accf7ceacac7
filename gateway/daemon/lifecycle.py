"""The daemon's states and the signals that change them.

::

    starting ──► ready ──► draining ──► stopped
        └───────────────────┘

``starting`` ends when the listener listens and Kafka has answered for every topic. The first SIGTERM or SIGINT drains,
a second one cuts the drain short, a third one stops at once, SIGHUP reloads.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Literal

import trio
from trio_util import AsyncValue

from gateway.daemon.signals import SIGNALS, waiting_signals

if TYPE_CHECKING:
    from collections.abc import Callable

State = Literal["starting", "ready", "draining", "stopped"]


class Lifecycle:
    """The current state; whoever waits for one awaits ``state.wait_value(...)``."""

    def __init__(self) -> None:
        self.state: AsyncValue[State] = AsyncValue("starting")
        self.was_ready = False
        """Somebody may have been sent here."""

    def ready(self) -> bool:
        """Leave ``starting``; false when the daemon is already past it."""
        if self.state.value != "starting":
            return False
        self.was_ready = True
        self.state.value = "ready"
        return True

    def drain(self) -> bool:
        """Begin to drain; false when that had begun before."""
        if self.state.value in ("draining", "stopped"):
            return False
        self.state.value = "draining"
        return True

    async def wait_drain(self) -> None:
        """Wait until a drain has been asked for."""
        await self.state.wait_value(lambda state: state in ("draining", "stopped"))


async def handle_signals(
    lifecycle: Lifecycle,
    *,
    reload: Callable[[], None],
    stop_now: Callable[[], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Turn signals into what they mean, until cancelled."""

    def act(number: int) -> None:
        if number == signal.SIGHUP:
            reload()
        elif not lifecycle.drain():
            stop_now()

    with trio.open_signal_receiver(*SIGNALS) as signals:
        task_status.started()
        for number in waiting_signals():
            act(number)
        async for number in signals:
            act(number)
