"""Lets few handshakes at a time go on, so that a storm of them takes its time and not that of open connections.

A handshake that waits for its client waits here. However many sockets become readable at once, `ADMITTED_PER_TURN` of
their tasks are woken in one turn of Trio's loop, and open connections are fed between two turns; one epoll of our own
hands them out, in about the order in which they became readable. Nobody holds a place: a client that sends nothing
keeps nobody else waiting.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

ADMITTED_PER_TURN: Final = 4
"""Handshakes that go on in one turn, at 0.1 to 0.2 ms each, about 1 ms with TLS."""


class Turnstile:
    """Where handshakes wait for their clients. `run` is its task."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waiting: dict[int, trio.lowlevel.Task] = {}

    async def wait_readable(self, sock: socket.socket) -> None:
        """Wait until ``sock`` is readable and it is its turn. Raises OSError when no more can be watched."""
        fd = sock.fileno()
        self._epoll.register(fd, select.EPOLLIN)

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            del self._waiting[fd]
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            self._waiting[fd] = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            if not self._epoll.closed:
                self._epoll.unregister(fd)

    async def run(self) -> None:
        """Wake who is next until cancelled."""
        while True:
            events = self._epoll.poll(0, ADMITTED_PER_TURN)
            for fd, _ in events:
                task = self._waiting.pop(fd, None)
                if task is not None:
                    trio.lowlevel.reschedule(task)
            if events:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._epoll.fileno())

    def close(self) -> None:
        """Give the epoll back; nobody may wait any more."""
        self._epoll.close()
