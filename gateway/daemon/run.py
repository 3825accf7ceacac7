"""The composition root: the only place that builds concrete objects and opens nurseries.

Start order: sidecar, producer and delivery, heartbeat, the sessions' nursery, listener; ``READY=1`` once it listens,
Kafka has answered and the spool's records are on their way. A drain goes the other way round, all of it under one
deadline: not ready, a grace for balancers to find out, stop accepting, closing notices and close 1012 slice by slice,
flush, spool the rest.
"""

from __future__ import annotations

import math
import platform
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from trio_util import move_on_when

from gateway import config
from gateway.config import keys
from gateway.core import catalogue
from gateway.core.admission import AddressRate, Admission
from gateway.core.books import Books
from gateway.core.origins import OriginRules
from gateway.core.progress import Progress
from gateway.daemon import systemd
from gateway.daemon.lifecycle import Lifecycle, handle_signals
from gateway.errors import ConfigError, GatewayError
from gateway.kafka.producer import POLL_BUSY_S, KafkaProducer
from gateway.ops import serve
from gateway.ops.status import Status, shown_books
from gateway.router.delivery import Delivery
from gateway.router.session import SessionContext
from gateway.router.sessions import Sessions, see_off
from gateway.router.spool.segments import Spool
from gateway.router.spool.writer import Replay, SpoolWriter
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Counters, probe_loop_lag
from gateway.ws.connection import ConnectionLimits
from gateway.ws.heartbeat import Heartbeat
from gateway.ws.listener import Listener
from gateway.ws.readiness import SAMPLE_MASK, Readiness
from gateway.ws.sockets import in_url, open_listening_sockets
from gateway.ws.upgrade import Handshake

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Settings
    from gateway.core.credentials import TokenRules
    from gateway.router.session import Session
    from gateway.telemetry.logging import Log

TOPIC_CHECK_PAUSE_S: Final = 1.0
"""Between asking a Kafka that has not answered, or lacks a topic."""
DEGRADED_S: Final = 1.0
"""A pause of reading that lasts this long is told to clients; a full queue in passing is not."""
SLICE_S: Final = 0.1
"""Between the slices of sessions that a drain closes."""
LAST_ANSWERS_S: Final = 1.0
"""How long handshakes that were queued when the listener closed may take to be answered."""
LAST_ATTEMPT_S: Final = 0.1
"""Between attempts to write what the spool had no room for, while the drain has time."""
STOP_MARGIN_S: Final = 10.0
"""What systemd is asked for beyond `drain.timeout_s`: the sidecar and the log end after it."""
RECOUNT_S: Final = 1.0
"""Between two accounts of the books: how old the figures of many companies may be."""
RELOADED: Final = (
    "routes.*",
    "auth.*",
    "tls.*",
    "log.level",
)
"""The settings that a reload takes; what else has changed is named as wanting a restart."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running daemon is found."""

    listen: str
    sidecar: str
    kafka: str


class Gateway:
    """One daemon. `run` is its whole life; the rest is what `run` and the signals use."""

    def __init__(
        self,
        settings: Settings,
        counters: Counters,
        log: Log,
        *,
        bootstrap_servers: str | None = None,
        reload_settings: Callable[[], Settings] | None = None,
        embedded: bool = False,
        worker: bool = False,
    ) -> None:
        """Build everything that needs no port and no broker. Raises ConfigError and StartupError.

        ``embedded`` says that the Kafka is the mock of `gateway.kafka.embedded`, ``worker`` that a parent has warned
        of the settings already.
        """
        self._settings = settings
        self._reload_settings = reload_settings
        self._embedded = embedded
        self._warnings = [] if worker else config.warnings(settings)
        self.on_reloaded: Callable[[], None] = lambda: None
        self._counters = counters
        self._log = log
        self._version = version("gateway")
        self._lifecycle = Lifecycle()
        self._books = Books()
        self._bootstrap_servers = bootstrap_servers or settings.kafka.bootstrap_servers
        self._routes_changed = trio.Event()
        self._degraded = False
        self._hurry = trio.Event()
        self._reload_wanted = trio.Event()
        self._deadline = math.inf
        """When the drain must be over, in Trio's seconds."""
        self._progress = Progress()
        self.lost = 0
        """Messages given up by the drain and not in the spool, or by a hard stop: makes the exit status 1."""
        config.check_descriptors(settings.listen.max_connections)
        self._tls = keys.tls_context(settings.tls)
        self._build_egress()
        self._build_ingress()

    def _limited(self, write: Callable[..., None]) -> RateLimited:
        return RateLimited(write, trio.current_time)

    def _build_egress(self) -> None:
        settings = self._settings
        properties = config.kafka_properties(settings.kafka)
        if self._embedded:  # the mock has no other way to make one
            properties["allow.auto.create.topics"] = True
        self._producer = KafkaProducer(self._bootstrap_servers, properties, self._counters, self._log)
        self._open_spool()
        self._delivery = Delivery(
            self._producer,
            settings.table,
            self._books,
            self._counters,
            gateway=f"{platform.node()}/{self._version}",
            log_refused=self._limited(self._log.error),
            spool=self._spool_writer,
        )
        self._replay = None if self._spool is None else Replay(self._spool, self._delivery, self._counters, self._log)
        for message_type in settings.routes.topics:
            self._books.tally("", message_type)

    def _open_spool(self) -> None:
        settings = self._settings.spool
        self._spool: Spool | None = None
        self._spool_writer: SpoolWriter | None = None
        if settings.directory is not None:
            self._spool = Spool(Path(settings.directory), settings.max_bytes)
            self._spool_writer = SpoolWriter(self._spool, self._limited(self._log.error))

    def _build_ingress(self) -> None:
        settings = self._settings
        listen, session = settings.listen, settings.session
        self._admission = Admission(
            listen.max_connections,
            AddressRate(listen.handshakes_per_address_per_s, listen.handshakes_per_address_burst),
        )
        self._handshake = Handshake(
            path=listen.path,
            origins=OriginRules(frozenset(listen.allowed_origins), listen.public_origin),
            allow_query_token=settings.auth.allow_query_token,
            rules=self._token_rules(settings),
            admission=self._admission,
        )
        self._readiness = Readiness(listen.max_held_bytes)
        self._readiness.timing = lambda duration_s: self._counters.routing_s.observe(duration_s, SAMPLE_MASK + 1)
        self._producer.on_room = self._resume
        self._delivery.on_parked = lambda: self._sessions.forget_routes()
        self._producer.on_broken = self._readiness.pause
        if self._spool_writer is not None:
            self._spool_writer.on_blocked = self._readiness.pause
            self._spool_writer.on_unblocked = self._resume
        self._sessions = Sessions(
            SessionContext(
                readiness=self._readiness,
                limits=ConnectionLimits(
                    max_message_bytes=listen.max_message_bytes,
                    max_controls_per_s=session.max_controls_per_s,
                    max_unsent_bytes=session.max_unsent_bytes,
                    unsent_timeout_s=session.unsent_timeout_s,
                    ping_interval_s=session.ping_interval_s,
                    idle_timeout_s=session.idle_timeout_s,
                    close_timeout_s=session.close_timeout_s,
                ),
                egress=self._delivery,
                ack_interval_ms=session.ack_interval_ms,
                reconnect_window_ms=settings.drain.reconnect_window_ms,
                leeway_s=lambda: self._handshake.rules.leeway_s,
                notify=lambda session: self._heartbeat.notify(session),
                log_refused=self._limited(self._log.info),
                log_crash=self._limited(self._log.error),
            ),
            self._admission,
            self._books,
            self._counters,
        )
        self._heartbeat = Heartbeat(
            self._sessions, notices_s=session.ack_interval_ms / 1000, after_sweep=self._after_sweep
        )

    def _token_rules(self, settings: Settings) -> TokenRules:
        skipped: list[str] = []
        rules = keys.token_rules(settings.auth, skipped)
        for reason in skipped:
            self._log.warning("key left out", reason=reason)
        return rules

    # Backpressure

    def _after_sweep(self) -> None:
        waiting = self._readiness.paused and trio.current_time() - self._readiness.paused_at >= DEGRADED_S
        if waiting or self._progress.stands_still:
            self._degraded = True
            self._sessions.tell_degraded(unconfirmed_only=not waiting)
        elif self._degraded and not self._readiness.paused:
            self._degraded = False
            self._sessions.tell_recovered()

    def _resume(self) -> None:
        if self._producer.full or (self._spool_writer is not None and self._spool_writer.blocked):
            return
        self._readiness.resume()
        if not self._readiness.paused and not self._progress.stands_still:
            self._degraded = False
            self._sessions.tell_recovered()

    async def _keep_accounts(self) -> None:
        """Sum up the books once a second, a slice at a time, and see whether Kafka confirms what it is given."""
        while True:
            for _ in self._books.recount():
                await trio.lowlevel.checkpoint()
            by_type, parked = self._books.summary().by_type, self._delivery.parked_types
            for reason in self._progress.look(by_type, parked, trio.current_time()):
                self._log.error("Kafka takes nothing", reason=reason)
            await trio.sleep(RECOUNT_S)

    # The life of the daemon

    async def run(self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until a drain is asked for by signal or `stop`; starts with the addresses.

        Raises StartupError when a port cannot be had. Cancellation stops at once, without a drain.
        """
        listening, sidecar = self._open_sockets()
        self._listener = listener = self._make_listener(listening)
        for warning in self._warnings:
            self._log.warning("settings", warning=warning)
        log_restart = self._limited(self._log.error)
        async with trio.open_nursery() as services:
            await services.start(self._handle_signals, services)
            status = self._status()
            self._exposition = status.exposition()
            sidecar_port: int = await services.start(serve.run, status.sidecar(self._exposition), sidecar, log_restart)
            services.start_soon(self._producer.run)
            services.start_soon(self._heartbeat.run)
            services.start_soon(self._readiness.run)
            services.start_soon(self._keep_accounts)
            services.start_soon(self._reload_when_asked)
            services.start_soon(probe_loop_lag, self._counters)
            services.start_soon(systemd.feed_watchdog)
            if self._spool_writer is not None:
                services.start_soon(self._spool_writer.run)
            async with trio.open_nursery() as connections:
                services.start_soon(listener.run, connections)
                services.start_soon(self._watch_topics, services)
                services.start_soon(systemd.extend_start, self._lifecycle.state)
                task_status.started(self._addresses(listener.port, sidecar_port))
                await self._lifecycle.wait_drain()
                drain = self._settings.drain
                self._deadline = trio.current_time() + drain.timeout_s
                self._say_draining()
                closing_ends = self._deadline - drain.spool_reserve_s
                with trio.CancelScope(deadline=closing_ends) as closing:
                    async with move_on_when(self._hurry.wait):
                        await self._close_connections(listener, connections)
                if closing.cancelled_caught:
                    self._log.warning("connections cut off: drain.timeout_s", connections=len(self._sessions))
                listener.close(connections)
                connections.cancel_scope.cancel()
            async with move_on_when(self._hurry.wait):
                await self._flush(min(closing_ends, trio.current_time() + drain.flush_timeout_s))
            await self._give_up()
            services.cancel_scope.cancel()
        self._say_stopped()
        self._lifecycle.state.value = "stopped"
        if self._spool is not None:
            self._spool.close()

    def metrics(self) -> bytes:
        """The page of /metrics as of this moment."""
        return self._exposition.page(math.inf)

    async def wait_ready(self) -> None:
        """Wait until connections are admitted."""
        await self._lifecycle.state.wait_value("ready")

    def _open_sockets(self) -> tuple[list[socket.socket], list[socket.socket]]:
        listen, sidecar = self._settings.listen, self._settings.sidecar

        def prepare(sock: socket.socket) -> None:
            # Accepted sockets inherit it; pongs and notices are small and must not wait for an ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        listening = open_listening_sockets(
            "listen", listen.host, listen.port, backlog=listen.backlog, reuse_port=listen.reuse_port, prepare=prepare
        )
        try:
            return listening, serve.open_sockets(sidecar.host, sidecar.port)
        except BaseException:
            for sock in listening:
                sock.close()
            raise

    def _make_listener(self, sockets: list[socket.socket]) -> Listener[Session]:
        listen = self._settings.listen
        return Listener(
            sockets,
            handshake=self._handshake,
            entry=self._sessions,
            tls=self._tls,
            handshake_timeout_s=listen.handshake_timeout_s,
            max_connections=listen.max_connections,
            max_pending_per_address=listen.max_pending_per_address,
            counters=self._counters,
            log_refused=self._limited(self._log.info),
            log_crash=self._limited(self._log.error),
        )

    def _addresses(self, port: int, sidecar_port: int) -> Addresses:
        listen, sidecar = self._settings.listen, self._settings.sidecar
        scheme = "ws" if self._tls is None else "wss"
        return Addresses(
            listen=f"{scheme}://{in_url(listen.host)}:{port}{listen.path}",
            sidecar=f"http://{in_url(sidecar.host)}:{sidecar_port}",
            kafka=self._bootstrap_servers,
        )

    async def _watch_topics(self, services: trio.Nursery) -> None:
        """Keep asking for the topics until all are there, then let connections in; again whenever routes change.

        What the spool holds goes out before anybody may connect.
        """
        while True:
            self._routes_changed = trio.Event()
            topics = self._settings.table.all_topics()
            while not await self._producer.check_topics(topics):
                systemd.notify("STATUS=waiting for Kafka")
                await trio.sleep(TOPIC_CHECK_PAUSE_S)
                topics = self._settings.table.all_topics()
            await self._producer.fit_batches()
            if self._replay is not None and self._replay.waiting:
                systemd.notify("STATUS=sending what the spool holds")
                await services.start(self._replay.run)
            if self._lifecycle.ready():
                self._admission.closed = None
                self._log.info("ready", topics=topics)
                systemd.notify("READY=1", "STATUS=ready")
            await self._routes_changed.wait()

    async def _handle_signals(
        self, services: trio.Nursery, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        def stop_now() -> None:
            if not self._hurry.is_set():
                self._log.warning("cutting the drain short", unconfirmed=len(self._delivery))
                self._hurry.set()
                return
            self._log.error("stopping at once")
            services.cancel_scope.cancel()

        await handle_signals(
            self._lifecycle, reload=lambda: self._reload_wanted.set(), stop_now=stop_now, task_status=task_status
        )

    def _say_draining(self) -> None:
        if self._replay is not None:
            self._replay.stop()
        timeout_s = self._settings.drain.timeout_s
        systemd.notify("STOPPING=1", "STATUS=draining", systemd.extension(timeout_s + STOP_MARGIN_S))
        self._log.info(
            "draining", connections=len(self._sessions), in_flight=self._books.totals().in_flight, timeout_s=timeout_s
        )

    async def _close_connections(self, listener: Listener[Session], connections: trio.Nursery) -> None:
        """After the grace, in which newcomers are served, close all sessions slice by slice over the window."""
        drain = self._settings.drain
        if self._lifecycle.was_ready:
            await trio.sleep(drain.grace_s)
        self._admission.closed = catalogue.DRAINING
        listener.close(connections)
        slices = self._sessions.slices(max(1, int(drain.close_window_s / SLICE_S)))
        with trio.move_on_after(drain.close_window_s + drain.close_timeout_s):
            async with trio.open_nursery() as nursery:
                for number, sessions in enumerate(slices):
                    await trio.sleep(SLICE_S if number else 0)
                    nursery.start_soon(see_off, sessions)
            await self._sessions.close_all()
        with trio.move_on_after(LAST_ANSWERS_S):
            await listener.wait_answered()

    async def _flush(self, until: float) -> None:
        """Wait for Kafka's answers, and for room for what was read and not handed over."""
        with trio.CancelScope(deadline=until):
            while len(self._delivery) or self._readiness.stalled or self._delivery.waiting_alone:
                self._producer.poll()
                await trio.sleep(POLL_BUSY_S)

    async def _give_up(self) -> None:
        """Spool what Kafka has not confirmed and what was read and not handed over, while the drain has time."""
        self._producer.poll()  # what is not a record counts until then
        left, waiting = len(self._delivery), self._readiness.backlog + self._delivery.waiting_alone
        if left or waiting or self._readiness.stalled:
            self._log.warning("drain ran out of time", unconfirmed=left, not_handed_over=waiting)
            await self._delivery.give_up(self._deadline)
        writer = self._spool_writer
        while True:
            self._readiness.resume()
            unwritten = await writer.flush(self._deadline) if writer is not None else 0
            if not (unwritten or self._readiness.stalled) or trio.current_time() >= self._deadline:
                break
            if writer is None or writer.fault:
                break
            await trio.sleep(LAST_ATTEMPT_S if self._readiness.paused else 0)  # the spool had no room for all at once
        if self._replay is not None:
            with trio.CancelScope(deadline=self._deadline):
                await self._replay.tidy()

    def _say_stopped(self) -> None:
        """The last account: what is neither in Kafka nor in the spool is lost to the gateway."""
        replayed = self._replay.unsettled if self._replay is not None else 0
        self.lost = self._delivery.lost + self._books.totals().in_flight - replayed
        self.lost += self._readiness.backlog + self._delivery.waiting_alone
        if self.lost:
            self._log.error(
                "messages given up",
                given_up=self.lost,
                remedy="Kafka did not confirm them in time, and no spool has them; clients must send them again",
            )
        self._log.info("stopped", **shown_books(self._books.totals()))

    # Reload

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            ready = self._lifecycle.state.value == "ready"
            if ready:
                systemd.reloading()
            await self.reload()
            if ready:
                systemd.notify("READY=1")

    async def reload(self) -> None:
        """Read the settings again: routes, log level, TLS certificate and keys take effect, all or none.

        A fault is logged and leaves everything as it was. Topics that routes name anew must be there: Kafka is asked.
        """
        try:
            settings = self._settings if self._reload_settings is None else self._reload_settings()
            rules = self._token_rules(settings)
            if (self._tls is None) != (settings.tls.cert_file is None):
                raise ConfigError(["tls: cannot be switched on or off while running"])
            tls = keys.tls_context(settings.tls)
            await self._check_new_topics(settings)
        except GatewayError as error:
            self._counters.reloads["failed"] += 1
            self._log.error("reload failed, the old settings stay", faults=str(error).splitlines())
        except Exception as error:  # no file may end a daemon that runs
            self._counters.reloads["failed"] += 1
            self._log.error("reload failed, the old settings stay", exc_info=error)
        else:
            self._apply(settings)
            self._handshake.rules = rules
            self._listener.tls = self._tls = tls
            self._counters.reloads["ok"] += 1
            self.on_reloaded()

    async def _check_new_topics(self, settings: Settings) -> None:
        """Raise ConfigError unless every topic that is new is there and may be written to."""
        new = sorted({*settings.table.all_topics()} - {*self._settings.table.all_topics()})
        if not new or self._lifecycle.state.value == "starting":  # then they are waited for anyway
            return
        missing, forbidden = await self._producer.unusable_topics(new)
        if missing is None:
            raise ConfigError([f"routes: Kafka does not answer, so {', '.join(new)} cannot be looked for"])
        faults = [f"routes: topic {topic} does not exist in Kafka: create it first" for topic in missing]
        faults += [f"routes: not authorised for topic {topic}" for topic in forbidden]
        if faults:
            raise ConfigError(faults)

    def _apply(self, settings: Settings) -> None:
        old = self._settings
        restart = config.changed(old, settings, but=RELOADED)
        copied = config.copied_by_systemd(settings)
        self._settings = old.model_copy(
            update={
                "routes": settings.routes,
                "auth": settings.auth,
                "tls": settings.tls,
                "log": old.log.model_copy(update={"level": settings.log.level}),
            }
        )
        if settings.routes != old.routes:
            self._delivery.routes = settings.table
            self._sessions.forget_routes()
            self._routes_changed.set()
            for message_type in settings.routes.topics:
                self._books.tally("", message_type)
        self._handshake.allow_query_token = settings.auth.allow_query_token
        self._log.set_level(settings.log.level)
        notes: dict[str, object] = {}
        if restart:
            notes["needs_restart"] = restart
        if copied:
            notes["not_renewed"] = copied
            notes["remedy"] = "systemd copies credentials when the unit starts: restart it to renew them"
        self._log.info("reloaded", **notes)

    def _status(self) -> Status:
        return Status(
            lifecycle=self._lifecycle,
            producer=self._producer,
            books=self._books,
            sessions=self._sessions,
            paused=lambda: self._readiness.paused,
            counters=self._counters,
            spool=self._spool_writer,
            replay=self._replay,
            spool_directory=self._settings.spool.directory,
            bootstrap_servers=self._bootstrap_servers,
            version=self._version,
            progress=self._progress,
        )
