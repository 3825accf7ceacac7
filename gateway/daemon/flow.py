"""The home of backpressure: reading runs while nothing holds it.

`Flow` is the `gateway.core.holds.Holds` of everything that can be full. With the first hold nothing is handed over any
more (`gateway.ws.readiness` goes on reading a little, so that pings are answered); with the last one's end it goes on,
what stalled first. Readiness, ``degraded`` and the metrics read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from gateway.core.progress import Progress
    from gateway.router.sessions import Sessions
    from gateway.ws.readiness import Readiness

DEGRADED_S: Final = 1.0
"""A hold that lasts this long is told to clients; a full queue in passing is not."""


class Flow:
    """Who holds, and since when."""

    def __init__(self, readiness: Readiness, progress: Progress) -> None:
        self._readiness = readiness
        self._progress = progress
        self._sessions: Sessions | None = None
        self._since: dict[str, float] = {}
        self._degraded = False

    def attach(self, sessions: Sessions) -> None:
        """Tell ``sessions`` when reading has stopped for long, and when it goes on."""
        self._sessions = sessions

    @property
    def names(self) -> tuple[str, ...]:
        """Who holds at the moment, in the order in which they began."""
        return tuple(self._since)

    @property
    def held(self) -> bool:
        """Nothing is handed over at the moment."""
        return bool(self._since)

    def hold(self, name: str) -> None:
        """Hand over nothing more, because of ``name``."""
        self._since.setdefault(name, trio.current_time())
        self._readiness.pause()

    def release(self, name: str) -> None:
        """``name`` is a reason no longer; without any other, hand over again."""
        if self._since.pop(name, None) is None or self._since:
            return
        self._readiness.resume()
        if not self._since and not self._progress.stands_still:
            self._tell_recovered()

    def look(self) -> None:
        """Once a second: tell the sessions what has lasted long enough to be told."""
        if self._sessions is None:
            return
        waiting = self.held and trio.current_time() - min(self._since.values()) >= DEGRADED_S
        if waiting or self._progress.stands_still:
            self._degraded = True
            self._sessions.tell_degraded(unconfirmed_only=not waiting)
        elif self._degraded and not self.held:
            self._tell_recovered()

    def _tell_recovered(self) -> None:
        self._degraded = False
        if self._sessions is not None:
            self._sessions.tell_recovered()
