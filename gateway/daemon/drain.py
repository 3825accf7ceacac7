"""The drain, all of it under one deadline (`drain.timeout_s`).

Not ready, a grace for balancers to find out, stop accepting, closing notices and close 1012 slice by slice; then
Kafka's answers are waited for, and what is left is spooled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio
from trio_util import move_on_when

from gateway.core import catalogue
from gateway.daemon import systemd
from gateway.kafka.producer import POLL_BUSY_S
from gateway.ops.status import shown_books
from gateway.router.activity import FINISH_S
from gateway.router.sessions import close_gracefully

if TYPE_CHECKING:
    from gateway.daemon.assemble import Daemon

SLICE_S: Final = 0.1
"""Between the slices of sessions that a drain closes."""
LAST_ANSWERS_S: Final = 1.0
"""How long handshakes that were queued when the listener closed may take to be answered."""
LAST_ATTEMPT_S: Final = 0.1
"""Between attempts to write what the spool had no room for, while the drain has time."""
STOP_MARGIN_S: Final = 10.0
"""What systemd is asked for beyond `drain.timeout_s`: the sidecar and the log end after it."""


class Drain:
    """One drain, from its beginning: `close_connections`, `flush`, `give_up`, then `account`."""

    def __init__(self, daemon: Daemon, hurry: trio.Event) -> None:
        """``hurry`` cuts it short."""
        self._daemon = daemon
        self._settings = daemon.settings.drain
        self._log = daemon.log
        self._hurry = hurry
        self._deadline = trio.current_time() + self._settings.timeout_s
        self._closing_ends = self._deadline - self._settings.spool_reserve_s
        self._say_draining()

    def _say_draining(self) -> None:
        kafka, timeout_s = self._daemon.kafka, self._settings.timeout_s
        if kafka.replay is not None:
            kafka.replay.stop()
        systemd.notify("STOPPING=1", "STATUS=draining", systemd.extension(timeout_s + STOP_MARGIN_S))
        in_flight = kafka.books.totals().in_flight
        self._log.info("draining", connections=len(self._daemon.ws.sessions), in_flight=in_flight, timeout_s=timeout_s)

    async def close_connections(self, connections: trio.Nursery) -> None:
        """Close all connections, in order while there is time; those that are left then are cut off."""
        with trio.CancelScope(deadline=self._closing_ends) as closing:
            async with move_on_when(self._hurry.wait):
                await self._close_in_order(connections)
        if closing.cancelled_caught:
            self._log.warning("connections cut off: drain.timeout_s", connections=len(self._daemon.ws.sessions))
        self._daemon.ws.listener.close(connections)
        connections.cancel_scope.cancel()

    async def _close_in_order(self, connections: trio.Nursery) -> None:
        """After the grace, in which newcomers are served, close all sessions slice by slice over the window."""
        drain, ws = self._settings, self._daemon.ws
        if self._daemon.lifecycle.was_ready:
            await trio.sleep(drain.grace_s)
        ws.admission.close(catalogue.DRAINING)
        ws.listener.close(connections)
        slices = ws.sessions.slices(max(1, int(drain.close_window_s / SLICE_S)))
        with trio.move_on_after(drain.close_window_s + drain.close_timeout_s):
            async with trio.open_nursery() as nursery:
                for number, sessions in enumerate(slices):
                    await trio.sleep(SLICE_S if number else 0)
                    nursery.start_soon(close_gracefully, sessions)
            await ws.sessions.close_all()
        with trio.move_on_after(LAST_ANSWERS_S):
            await ws.listener.wait_answered()

    async def flush(self) -> None:
        """Wait for Kafka's answers, and for room for what was read and not handed over."""
        kafka, readiness = self._daemon.kafka, self._daemon.ws.readiness
        until = min(self._closing_ends, trio.current_time() + self._settings.flush_timeout_s)
        with trio.CancelScope(deadline=until):
            async with move_on_when(self._hurry.wait):
                while len(kafka.delivery) or readiness.stalled or kafka.delivery.waiting_alone:
                    kafka.producer.poll()
                    await trio.sleep(POLL_BUSY_S)

    async def give_up(self) -> None:
        """Spool what Kafka has not confirmed and what was read and not handed over, while there is time."""
        kafka, readiness = self._daemon.kafka, self._daemon.ws.readiness
        delivery, writer = kafka.delivery, kafka.delivery.spool
        kafka.producer.poll()  # what is not a record counts until then
        left, waiting = len(delivery), readiness.backlog + delivery.waiting_alone
        if left or waiting or readiness.stalled:
            self._log.warning("drain ran out of time", unconfirmed=left, not_handed_over=waiting)
            await delivery.abandon(self._deadline)
        while True:
            unwritten = await writer.flush(self._deadline) if writer is not None else 0
            if not (unwritten or readiness.stalled) or trio.current_time() >= self._deadline:
                break
            if writer.fault if writer is not None else readiness.paused:
                break
            await trio.sleep(LAST_ATTEMPT_S if readiness.paused else 0)  # the spool had no room for all at once
        with trio.move_on_after(FINISH_S):
            await kafka.activity.finish()
        if kafka.replay is not None:
            with trio.CancelScope(deadline=self._deadline):
                await kafka.replay.tidy()

    def account(self) -> int:
        """The last account: how many messages are neither in Kafka nor in the spool, and so lost to the gateway."""
        kafka = self._daemon.kafka
        totals = kafka.books.totals()
        replayed = kafka.replay.unsettled if kafka.replay is not None else 0
        lost = kafka.delivery.lost + totals.in_flight - replayed
        lost += self._daemon.ws.readiness.backlog + kafka.delivery.waiting_alone
        if lost:
            self._log.error(
                "messages given up",
                given_up=lost,
                remedy="Kafka did not confirm them in time, and no spool has them; clients must send them again",
            )
        self._log.info("stopped", **shown_books(totals))
        return lost
