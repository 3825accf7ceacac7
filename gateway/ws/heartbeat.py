"""One task that looks after all sessions, instead of timers in each of them.

Every ``notices_s`` it sends the notices that have gathered; once a second it visits the sessions whose ``due`` has
come: pings, silence, bytes nobody takes, expired tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.router.session import Session

SWEEP_S: Final = 1.0
"""Between sweeps: the precision of every timeout of an open connection. A sweep over 20,000 sessions that are not
due takes about a millisecond."""


class Heartbeat:
    """The shared task of all sessions (`run`). ``notices_s`` is how long a notice may wait."""

    def __init__(self, sessions: Iterable[Session], *, notices_s: float, after_sweep: Callable[[], None]) -> None:
        self._sessions = sessions
        self._notices_s = notices_s
        self._after_sweep = after_sweep
        self._waiting: set[Session] = set()

    def notify(self, session: Session) -> None:
        """``session`` has notices to send at the next turn."""
        self._waiting.add(session)

    async def run(self) -> None:
        """Look after the sessions until cancelled."""
        next_sweep = trio.current_time() + SWEEP_S
        next_notices = trio.current_time() + self._notices_s
        while True:
            await trio.sleep_until(min(next_notices, next_sweep))
            now = trio.current_time()
            if now >= next_notices:
                next_notices = now + self._notices_s
                self.send_notices()
            if now >= next_sweep:
                next_sweep = now + SWEEP_S
                self.sweep(now)

    def send_notices(self) -> None:
        """Send what has gathered; a session that raises ends alone."""
        waiting, self._waiting = self._waiting, set()
        for session in waiting:
            try:
                session.send_notices()
            except Exception as error:  # the barrier around each connection
                session.crash(error)

    def sweep(self, now: float) -> None:
        """Visit the sessions that are due; one that raises ends alone."""
        for session in self._sessions:
            if session.due <= now:
                try:
                    session.tick(now)
                except Exception as error:  # the barrier around each connection
                    session.crash(error)
        self._after_sweep()
