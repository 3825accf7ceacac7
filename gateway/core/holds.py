"""Why nothing is handed over at the moment: backpressure by name.

Whoever cannot take more holds, under its name, and releases when it can again; `gateway.daemon.flow` lets reading run
while nobody holds.
"""

from __future__ import annotations

from typing import Final, Protocol

PRODUCER_FULL: Final = "producer_full"
"""The producer's queue has no room, or the producer is being replaced."""
SPOOL_BLOCKED: Final = "spool_blocked"
"""Too much waits for a disk that takes nothing."""


class Holds(Protocol):
    """Where holds are put. Both are harmless when repeated, and may act at once: messages may come before `release`
    returns."""

    def hold(self, name: str) -> None:
        """From now on nothing more can be taken, because of ``name``."""

    def release(self, name: str) -> None:
        """``name`` is a reason no longer."""


class NoHolds:
    """`Holds` where nobody reads from clients."""

    def hold(self, name: str) -> None:
        """Nothing is read anyway."""

    def release(self, name: str) -> None:
        """See `hold`."""
