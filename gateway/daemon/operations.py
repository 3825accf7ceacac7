"""The verbs: what can be asked of a running daemon, by a signal or otherwise.

The first SIGTERM or SIGINT drains, a second one cuts the drain short, a third one stops at once, SIGHUP reloads.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import trio

from gateway.daemon.signals import SIGNALS, waiting_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.daemon.lifecycle import Lifecycle
    from gateway.telemetry.logging import Log


class Operations:
    """What may be asked of one daemon, at any time, from the Trio thread."""

    def __init__(
        self, lifecycle: Lifecycle, log: Log, *, unconfirmed: Callable[[], int], stop: Callable[[], None]
    ) -> None:
        """``unconfirmed`` counts the messages that Kafka has not answered for; ``stop`` ends the daemon's tasks."""
        self._lifecycle = lifecycle
        self._log = log
        self._unconfirmed = unconfirmed
        self._stop = stop
        self.hurry = trio.Event()
        """Set when the drain has been cut short."""
        self._reload_wanted = trio.Event()

    def drain(self) -> bool:
        """Begin to drain; false when that had begun before."""
        return self._lifecycle.drain()

    def cut_short(self) -> None:
        """Wait for nobody any longer, but spool what there is."""
        self._log.warning("cutting the drain short", unconfirmed=self._unconfirmed())
        self.hurry.set()

    def stop(self) -> None:
        """End at once."""
        self._log.error("stopping at once")
        self._stop()

    def reload(self) -> None:
        """Read the settings again soon; asked again meanwhile, once more after that."""
        self._reload_wanted.set()

    def set_level(self, level: str) -> None:
        """Log from ``level`` up, until a reload says otherwise."""
        self._log.set_level(level)

    async def wait_reload(self) -> None:
        """Wait until a reload is asked for, and take that on."""
        await self._reload_wanted.wait()
        self._reload_wanted = trio.Event()

    async def follow_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Turn signals into what they mean, until cancelled; those first that came before."""
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            for number in waiting_signals():
                self._act(number)
            async for number in signals:
                self._act(number)

    def _act(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reload()
        elif self.drain():
            return
        elif self.hurry.is_set():
            self.stop()
        else:
            self.cut_short()
