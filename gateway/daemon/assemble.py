"""Builds a daemon: the only place that makes concrete objects of the parts and joins them.

What blocks, and can be interrupted, comes before (`gateway.daemon.materials`). `kafka_side` and `websocket_side` build
the two sides as contexts, so that what was taken is given back on every way out, and `assemble` joins them. ``gateway
spool replay`` has a Kafka side alone.
"""

from __future__ import annotations

import platform
import secrets
import socket
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from gateway.config.settings import COPIES
from gateway.core import notices
from gateway.core.admission import AddressRate, Admission
from gateway.core.books import Books
from gateway.core.controls import MAX_CONTROL_BYTES
from gateway.core.origins import OriginRules
from gateway.core.progress import Progress
from gateway.core.protection import Protection
from gateway.daemon.announce import Addresses
from gateway.daemon.flow import Flow
from gateway.daemon.lifecycle import Lifecycle
from gateway.daemon.memory import MemoryGuard
from gateway.errors import StartupError
from gateway.kafka.aside import AsideProducer
from gateway.kafka.producer import KafkaProducer
from gateway.ops import serve
from gateway.ops.status import Status
from gateway.registry import parent, shared
from gateway.registry.memory import MemoryRegistry
from gateway.registry.shared import SharedRegistry
from gateway.router.activity import MAX_WAITING, Activity
from gateway.router.bans import BanOffice
from gateway.router.delivery import Delivery
from gateway.router.endpoint import Gatekeeper
from gateway.router.inspection import Inspection
from gateway.router.session import SessionContext
from gateway.router.sessions import Sessions
from gateway.router.spool.replay import Replay
from gateway.router.spool.replay import declare as declare_replayed
from gateway.router.spool.segments import Spool
from gateway.telemetry.logging import RateLimited
from gateway.ws.endpoints import Endpoint, Endpoints, PathTemplate
from gateway.ws.handler import ConnectionLimits
from gateway.ws.heartbeat import Heartbeat
from gateway.ws.listener import Listener
from gateway.ws.readiness import SAMPLE_MASK, Readiness
from gateway.ws.sockets import in_url, open_listening_sockets
from gateway.ws.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from gateway.config import Settings
    from gateway.config.promises import Property
    from gateway.core.holds import Holds
    from gateway.core.tenants import Tenants
    from gateway.daemon.materials import Materials
    from gateway.registry.port import Backend
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

# long: the one list of what there is and who knows whom

VERSION: Final = version("gateway")
ROUTING_BUCKETS_S: Final = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3)


def limited(write: Callable[..., None]) -> RateLimited:
    """A log method for lines that clients can cause."""
    return RateLimited(write, trio.current_time)


@dataclass(frozen=True, slots=True)
class KafkaSide:
    """From a message that was judged to Kafka or to the disk."""

    producer: KafkaProducer
    delivery: Delivery
    activity: Activity
    books: Books
    replay: Replay | None

    async def run(self) -> None:
        """Poll, renew and spool until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.producer.run)
            nursery.start_soon(self.activity.run, lambda: self.books.summary().totals.in_flight_bytes)
            if self.delivery.spool is not None:
                nursery.start_soon(self.delivery.spool.run)


@contextmanager
def kafka_side(
    settings: Settings,
    properties: dict[str, Property],
    metrics: Metrics,
    log: Log,
    *,
    directory: Path | None,
    holds: Holds | None = None,
) -> Iterator[KafkaSide]:
    """The Kafka side, with the spool in ``directory`` if there is one; the spool is given back at the end.

    Raises StartupError and SpoolError.
    """
    gateway = f"{platform.node()}/{VERSION}"
    producer = KafkaProducer(settings.kafka.bootstrap_servers, properties, metrics, log, holds)
    books = Books()
    spool = None if directory is None else Spool(directory, settings.spool.max_bytes)
    try:
        delivery = Delivery(
            producer,
            settings.table,
            books,
            metrics,
            gateway=gateway,
            log_failed=limited(log.error),
            log_spool=limited(log.error),
            spool=spool,
            holds=holds,
        )
        declare_replayed(metrics)
        replay = None if spool is None else Replay(spool, delivery.replay, metrics, log)
        activity = Activity(
            settings.activity.topic,
            producer,
            AsideProducer(settings.kafka.bootstrap_servers, properties, MAX_WAITING),
            metrics,
            log,
            gateway=gateway,
            max_messages=settings.kafka.max_queued_messages,
            max_bytes=settings.kafka.max_queued_bytes // COPIES,
        )
        yield KafkaSide(producer, delivery, activity, books, replay)
    finally:
        if spool is not None:
            spool.close()


@dataclass(frozen=True, slots=True)
class WebSocketSide:
    """From a socket to a message that was judged."""

    admission: Admission
    gatekeeper: Gatekeeper
    readiness: Readiness
    sessions: Sessions
    heartbeat: Heartbeat
    listener: Listener
    memory: MemoryGuard
    registry: SharedRegistry | None

    async def run(self) -> None:
        """Look after connections and limits until cancelled."""
        async with trio.open_nursery() as nursery:
            for service in (self.heartbeat.run, self.readiness.run, self.memory.run):
                nursery.start_soon(service)
            if self.registry is not None:
                nursery.start_soon(self.registry.run)


@contextmanager
def websocket_side(
    settings: Settings,
    materials: Materials,
    kafka: KafkaSide,
    readiness: Readiness,
    flow: Flow,
    metrics: Metrics,
    log: Log,
    *,
    places: str = "",
) -> Iterator[WebSocketSide]:
    """The WebSocket side, listening; its sockets are given back at the end. Raises StartupError."""
    listen = settings.listen
    routing_s = metrics.histogram(
        "gateway_routing_seconds",
        "One read, from its recv to the produce of the last message it brought.",
        ROUTING_BUCKETS_S,
    )
    readiness.time_turns(lambda duration_s: routing_s.observe(duration_s, SAMPLE_MASK + 1))
    admission = _admission(settings)
    gatekeeper = Gatekeeper(materials.rules, allow_query_token=settings.auth.allow_query_token)
    registry = _registry(settings, kafka.books.tenants, metrics, log, places)
    sessions, heartbeat = _sessions(settings, kafka, readiness, gatekeeper, admission, registry, flow, metrics, log)
    sockets = open_listening_sockets(
        "listen",
        listen.host,
        listen.port,
        backlog=listen.backlog,
        reuse_port=listen.reuse_port,
        prepare=_without_delay,
    )
    try:
        listener = Listener(
            sockets,
            upgrade=Upgrade(Endpoints([mt5_endpoint(settings, gatekeeper, sessions)]), admission),
            readiness=readiness,
            tls_context=materials.tls,
            handshake_timeout_s=listen.handshake_timeout_s,
            max_connections=listen.max_connections,
            max_pending_per_address=listen.max_pending_per_address,
            metrics=metrics,
            log_refused=limited(log.info),
            log_crash=limited(log.error),
        )
        memory = MemoryGuard(settings.memory.budget_bytes, admission, sessions, log, metrics=metrics)
        yield WebSocketSide(admission, gatekeeper, readiness, sessions, heartbeat, listener, memory, registry)
    finally:
        for sock in sockets:
            sock.close()


def _admission(settings: Settings) -> Admission:
    listen, breaker = settings.listen, settings.breaker
    return Admission(
        listen.max_connections,
        AddressRate(listen.handshakes_per_address_per_s, listen.handshakes_per_address_burst),
        Protection(breaker.rules, breaker.exempt),
        max_per_address=listen.max_connections_per_address,
    )


def _registry(settings: Settings, tenants: Tenants, metrics: Metrics, log: Log, places: str) -> SharedRegistry | None:
    """The registry of several processes, None where this one is alone. Raises StartupError without Redis' library."""
    shared.declare(metrics)
    registry = settings.registry
    connect: Callable[[], AbstractAsyncContextManager[Backend]]
    if registry.redis_url is not None:
        try:
            from gateway.registry import redis
        except ImportError as error:
            raise StartupError("registry.redis_url needs the redis extra: pip install 'gateway[redis]'") from error
        url, name = registry.redis_url.get_secret_value(), f"{platform.node()}/{secrets.token_hex(8)}"
        kind = "redis"
        connect = partial(
            redis.connected,
            url,
            name,
            lease_s=registry.lease_s,
            timeout_s=registry.timeout_s,
            cluster=registry.redis_cluster,
        )
    elif places:
        kind, connect = "parent", partial(parent.connected, places, timeout_s=registry.timeout_s)
    else:
        return None
    return SharedRegistry(
        kind,
        tenants,
        MemoryRegistry(tenants, trio.current_time),
        connect,
        metrics,
        log,
        refuse=registry.on_failure == "refuse",
        lease_s=registry.lease_s,
    )


def _sessions(
    settings: Settings,
    kafka: KafkaSide,
    readiness: Readiness,
    gatekeeper: Gatekeeper,
    admission: Admission,
    registry: SharedRegistry | None,
    flow: Flow,
    metrics: Metrics,
    log: Log,
) -> tuple[Sessions, Heartbeat]:
    """The sessions, with who looks after them and who shuts their users out."""
    context = SessionContext(
        readiness=readiness,
        delivery=kafka.delivery,
        throttled=kafka.activity.throttled,
        inspection=Inspection(metrics, wanted=settings.monitoring.inspect_ticks),
        ack_interval_ms=settings.session.ack_interval_ms,
        reconnect_window_ms=settings.drain.reconnect_window_ms,
        tokens=gatekeeper,
        trip=lambda user: bans.ban_user(user),
        protection=admission.protection,
        notify=lambda one: heartbeat.notify(one),
        log_rejected=limited(log.info),
        log_crash=limited(log.error),
    )
    tenants = kafka.books.tenants
    tenants.use_tiers(settings.tiers.limits)
    sessions = Sessions(context, admission, tenants, metrics, kafka.activity, registry)
    bans = BanOffice(admission.protection, sessions, kafka.activity, metrics, log)
    if registry is not None:
        registry.attach(bans.learn)
        bans.share(registry.ban)
    flow.attach(sessions)
    heartbeat = Heartbeat(sessions, notices_s=settings.session.ack_interval_ms / 1000, after_sweep=flow.look)
    return sessions, heartbeat


def mt5_endpoint(settings: Settings, gatekeeper: Gatekeeper, sessions: Sessions) -> Endpoint:
    """The way up, as the WebSocket server knows it."""
    listen = settings.listen
    return Endpoint(
        name="mt5",
        path=PathTemplate(listen.path),
        limits=connection_limits(settings),
        origins=OriginRules(frozenset(listen.allowed_origins), listen.public_origin),
        authorise=gatekeeper.authorise,
        open=sessions.open,
        subprotocols=notices.CONTROL_SUBPROTOCOLS,
    )


def _without_delay(sock: socket.socket) -> None:
    # Accepted sockets inherit it; pongs and notices are small and must not wait for an ACK.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connection_limits(settings: Settings) -> ConnectionLimits:
    """The bounds of one connection."""
    session = settings.session
    return ConnectionLimits(
        max_message_bytes=settings.listen.max_message_bytes,
        max_controls_per_s=session.max_controls_per_s,
        max_unsent_bytes=session.max_unsent_bytes,
        unsent_timeout_s=session.unsent_timeout_s,
        ping_interval_s=session.ping_interval_s,
        idle_timeout_s=session.idle_timeout_s,
        close_timeout_s=session.close_timeout_s,
        max_text_bytes=min(MAX_CONTROL_BYTES, settings.listen.max_message_bytes),
    )


@dataclass(frozen=True, slots=True)
class Daemon:
    """All parts of one daemon, joined."""

    settings: Settings
    metrics: Metrics
    log: Log
    lifecycle: Lifecycle
    progress: Progress
    flow: Flow
    kafka: KafkaSide
    ws: WebSocketSide
    status: Status
    sidecar_sockets: list[socket.socket]
    secured: bool
    """Whether clients connect over TLS."""

    def addresses(self, sidecar_port: int) -> Addresses:
        """Where it is found, now that it listens."""
        listen, sidecar = self.settings.listen, self.settings.sidecar
        scheme = "wss" if self.secured else "ws"
        return Addresses(
            listen=f"{scheme}://{in_url(listen.host)}:{self.ws.listener.port}{listen.path}",
            sidecar=f"http://{in_url(sidecar.host)}:{sidecar_port}",
            kafka=self.settings.kafka.bootstrap_servers,
        )


@contextmanager
def assemble(
    settings: Settings,
    materials: Materials,
    metrics: Metrics,
    log: Log,
    *,
    embedded: bool = False,
    places: str = "",
) -> Iterator[Daemon]:
    """All parts of a daemon, listening and doing nothing yet (`gateway.daemon.run`). Raises StartupError, SpoolError.

    ``embedded`` says that the Kafka is the mock of `gateway.kafka.embedded`, ``places`` is the socket of a parent that
    holds the places of all its workers.
    """
    properties = dict(materials.properties)
    if embedded:  # the mock has no other way to make one
        properties["allow.auto.create.topics"] = True
    lifecycle, progress = Lifecycle(), Progress()
    readiness = Readiness(settings.listen.max_held_bytes)
    flow = Flow(readiness, progress)
    directory = None if settings.spool.directory is None else Path(settings.spool.directory)
    with (
        closing(readiness),
        kafka_side(settings, properties, metrics, log, directory=directory, holds=flow) as kafka,
        websocket_side(settings, materials, kafka, readiness, flow, metrics, log, places=places) as ws,
    ):
        for message_type in settings.routes.topics:
            kafka.books.tally("", message_type)
        status = _status(settings, kafka, ws, flow, lifecycle, progress)
        status.declare(metrics)
        sidecar = settings.sidecar
        sidecar_sockets = open_listening_sockets(
            "sidecar", sidecar.host, sidecar.port, backlog=serve.BACKLOG, prepare=serve.prepare
        )
        try:
            yield Daemon(
                settings,
                metrics,
                log,
                lifecycle,
                progress,
                flow,
                kafka,
                ws,
                status,
                sidecar_sockets,
                secured=materials.tls is not None,
            )
        finally:
            for sock in sidecar_sockets:
                sock.close()


def _status(
    settings: Settings, kafka: KafkaSide, ws: WebSocketSide, flow: Flow, lifecycle: Lifecycle, progress: Progress
) -> Status:
    return Status(
        state=lambda: lifecycle.state.value,
        producer=kafka.producer,
        books=kafka.books,
        sessions=ws.sessions,
        holds=lambda: flow.names,
        short_of_memory=lambda: ws.memory.short,
        registry=ws.registry,
        spool=kafka.delivery.spool,
        replay=kafka.replay,
        spool_directory=settings.spool.directory,
        bootstrap_servers=settings.kafka.bootstrap_servers,
        version=VERSION,
        progress=progress,
    )
