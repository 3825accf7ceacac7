"""One task that looks after all connections, instead of timers in each of them.

Every ``notices_s`` it lets those speak who have something to say that could wait; once a second it visits the
connections whose ``due`` has come: pings, silence, bytes nobody takes, expired tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.ws.roster import Member

SWEEP_S: Final = 1.0
"""Between sweeps: the precision of every timeout of an open connection. A sweep over 20,000 connections that are not
due takes a millisecond or two."""


class Speaker(Protocol):
    """Somebody who has something to say that could wait."""

    def send_notices(self) -> None:
        """Say it."""

    def crash(self, error: Exception) -> None:
        """End the connection because `send_notices` raised."""


class Heartbeat:
    """The shared task of all connections (`run`). ``notices_s`` is how long a notice may wait."""

    def __init__(self, members: Iterable[Member], *, notices_s: float, after_sweep: Callable[[], None]) -> None:
        self._members = members
        self._notices_s = notices_s
        self._after_sweep = after_sweep
        self._waiting: set[Speaker] = set()

    def notify(self, speaker: Speaker) -> None:
        """``speaker`` has something to say at the next turn."""
        self._waiting.add(speaker)

    async def run(self) -> None:
        """Look after the connections until cancelled."""
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
        """Let everybody speak who is waiting to; one that raises ends alone."""
        waiting, self._waiting = self._waiting, set()
        for speaker in waiting:
            try:
                speaker.send_notices()
            except Exception as error:  # the barrier around each connection
                speaker.crash(error)

    def sweep(self, now: float) -> None:
        """Visit the connections that are due; one that raises ends alone."""
        for member in self._members:
            connection = member.connection
            if connection is not None and connection.due <= now:
                try:
                    connection.tick(now)
                except Exception as error:  # the barrier around each connection
                    connection.crash(error)
        self._after_sweep()
