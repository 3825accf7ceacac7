"""The life of one daemon, in order.

Start: signals, sidecar, Kafka side, the shared tasks, the listener; ``READY=1`` once it listens, Kafka has answered and
the spool's records are on their way. A drain goes the other way round (`gateway.daemon.drain`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import trio

from gateway import config
from gateway.daemon import systemd
from gateway.daemon.assemble import limited
from gateway.daemon.drain import Drain
from gateway.daemon.operations import Operations
from gateway.daemon.reload import Reload
from gateway.ops import serve
from gateway.telemetry.metrics import probe_loop_lag

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Settings
    from gateway.daemon.announce import Addresses
    from gateway.daemon.assemble import Daemon

TOPIC_CHECK_PAUSE_S: Final = 1.0
"""Between asking a Kafka that has not answered, or lacks a topic."""
RECOUNT_S: Final = 1.0
"""Between two accounts of the books: how old the figures of many companies may be."""


async def run(
    daemon: Daemon,
    load: Callable[[], Settings],
    *,
    on_reloaded: Callable[[], None] = lambda: None,
    warn: bool = True,
    task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until a drain is asked for; starts with the addresses. Returns how many messages were lost.

    ``load`` reads the settings again on a reload, and ``on_reloaded`` is told that they were taken; without ``warn``
    somebody else has warned of the settings. Cancellation stops at once, without a drain.
    """
    lifecycle, ws = daemon.lifecycle, daemon.ws
    for warning in config.warnings(daemon.settings) if warn else ():
        daemon.log.warning("settings", warning=warning)
    drain: Drain | None = None
    async with trio.open_nursery() as services:
        operations = Operations(
            lifecycle,
            daemon.log,
            unconfirmed=lambda: len(daemon.kafka.delivery),
            stop=services.cancel_scope.cancel,
        )
        topics = Topics(daemon)
        reload = Reload(daemon, load, on_reloaded=on_reloaded, routes_changed=topics.look_again)
        await services.start(operations.follow_signals)
        sidecar = daemon.status.sidecar(daemon.metrics)
        port: int = await services.start(serve.run, sidecar, daemon.sidecar_sockets, limited(daemon.log.error))
        for service in (daemon.kafka.run, ws.run, systemd.feed_watchdog):
            services.start_soon(service)
        services.start_soon(_keep_accounts, daemon)
        services.start_soon(reload.run, operations)
        services.start_soon(probe_loop_lag, daemon.metrics)
        async with trio.open_nursery() as connections:
            services.start_soon(ws.listener.run, connections)
            services.start_soon(topics.watch, services, reload)
            services.start_soon(systemd.extend_start, lifecycle.state)
            task_status.started(daemon.addresses(port))
            await lifecycle.wait_drain()
            drain = Drain(daemon, operations.hurry)
            await drain.close_connections(connections)
        await drain.flush()
        await drain.give_up()
        services.cancel_scope.cancel()
    lost = drain.account() if drain is not None else daemon.kafka.books.totals().in_flight
    lifecycle.stop()
    return lost


class Topics:
    """Waits for the topics of the routes, and lets connections in when all are there."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._changed = trio.Event()

    def look_again(self) -> None:
        """The routes have changed."""
        self._changed.set()

    async def watch(self, services: trio.Nursery, reload: Reload) -> None:
        """Keep asking for the topics until all are there, then let connections in; again whenever routes change.

        What the spool holds goes out before anybody may connect.
        """
        daemon, producer, replay = self._daemon, self._daemon.kafka.producer, self._daemon.kafka.replay
        while True:
            self._changed = trio.Event()
            while not await producer.cluster.check(reload.settings.table.all_topics()):
                systemd.notify("STATUS=waiting for Kafka")
                await trio.sleep(TOPIC_CHECK_PAUSE_S)
            await producer.fit_batches()
            if replay is not None and replay.waiting:
                systemd.notify("STATUS=sending what the spool holds")
                await services.start(replay.run)
            if daemon.lifecycle.ready():
                daemon.ws.admission.open()
                daemon.log.info("ready", topics=producer.cluster.topics)
                systemd.notify("READY=1", "STATUS=ready")
            await self._changed.wait()


async def _keep_accounts(daemon: Daemon) -> None:
    """Sum up the books once a second, a slice at a time, and see whether Kafka confirms what it is given."""
    books, delivery = daemon.kafka.books, daemon.kafka.delivery
    while True:
        now = trio.current_time()
        books.tenants.sweep(now)
        daemon.ws.admission.protection.sweep(now)
        for _ in books.recount(datetime.now(UTC)):
            await trio.lowlevel.checkpoint()
        by_type, parked = books.summary().by_type, delivery.parked_types
        for reason in daemon.progress.look(by_type, parked, trio.current_time()):
            daemon.log.error("Kafka takes nothing", reason=reason)
        await trio.sleep(RECOUNT_S)
