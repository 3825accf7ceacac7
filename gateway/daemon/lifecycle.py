"""The daemon's states.

::

    starting ──► ready ──► draining ──► stopped
        └───────────────────┘

``starting`` ends when the listener listens and Kafka has answered for every topic. What begins a drain is in
`gateway.daemon.operations`.
"""

from __future__ import annotations

from typing import Literal

from trio_util import AsyncValue

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

    def stop(self) -> None:
        """The drain is over."""
        self.state.value = "stopped"

    async def wait_drain(self) -> None:
        """Wait until a drain has been asked for."""
        await self.state.wait_value(lambda state: state in ("draining", "stopped"))
