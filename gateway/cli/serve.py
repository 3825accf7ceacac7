"""``gateway serve``: the daemon, one process or several."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from gateway.cli.common import ConfigFile, Set, flags_of
from gateway.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Settings
    from gateway.daemon.announce import Announcer
    from gateway.daemon.assemble import Daemon
    from gateway.daemon.orders import Orders


def serve(
    *,
    config_file: ConfigFile = None,
    embedded_kafka: bool = False,
    host: str | None = None,
    port: int | None = None,
    sidecar_port: int | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
    workers: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=1024))] = 1,
    instance: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=0))] = 0,
    sets: Set = (),
    announce_fd: Annotated[int | None, Parameter(validator=cyclopts.validators.Number(gte=3))] = None,
    worker: Annotated[bool, Parameter(show=False, negative=())] = False,
) -> int:
    """Run the daemon until SIGTERM or SIGINT.

    Parameters
    ----------
    config_file
        The TOML file. Without it the defaults hold, and auth must come from the environment.
    embedded_kafka
        Run a Kafka inside the process, for trials; its address is printed. Without any key
        configured, the development secret is used, as by `gateway token`.
    host
        Address to listen on (listen.host).
    port
        Port to listen on, 0 for a free one (listen.port).
    sidecar_port
        Port of health and metrics, 0 for a free one (sidecar.port).
    log_level
        Log lines from this level up (log.level).
    workers
        Processes that share the port, for hosts with several cores; their sidecars are added up in one.
        Limits (listen.max_connections, kafka.max_queued_messages, ...) hold for each of them.
    instance
        The number of this one among several units on one host: added to sidecar.port.
    sets
        Any other setting, as SECTION.KEY=VALUE; may be repeated.
    announce_fd
        A descriptor to announce on what happens, for programs: a JSON object a line (listening, ready, reloaded, ...).
    worker
        Be a worker: what else there is to know comes on standard input.
    """
    from gateway.daemon.announce import Announcer
    from gateway.daemon.orders import Orders

    if worker:
        return _serve_as_worker(Orders.read(sys.stdin.buffer), Announcer(announce_fd, people=False))
    announcer = Announcer(announce_fd)
    flags = flags_of(sets, listen__host=host, listen__port=port, sidecar__port=sidecar_port, log__level=log_level)
    load = partial(_load, config_file, flags, development=embedded_kafka, instance=instance)
    try:
        settings = load()
        if workers == 1:
            return _serve(settings, load, announcer, embedded_kafka=embedded_kafka)
        orders = Orders(config_file=str(config_file) if config_file else None, flags=flags, development=embedded_kafka)
        return _serve_with_workers(settings, workers, orders, load, announcer, embedded_kafka=embedded_kafka)
    except GatewayError as error:
        _announce_faults(announcer, error)
        raise


def _announce_faults(announcer: Announcer, error: GatewayError) -> None:
    for line in str(error).splitlines():
        announcer.tell("fault", fault=line)


def _load(path: Path | None, flags: dict[str, Any], *, development: bool, instance: int = 0) -> Settings:
    """The settings; with ``development`` and no key anywhere, those with the development secret."""
    from gateway import config
    from gateway.testing import devkeys

    try:
        settings = config.load(path, flags)
    except ConfigError as error:
        if not development or not any(fault.startswith(("auth: is missing", "auth: no key")) for fault in error.faults):
            raise
        settings = config.load(path, {**flags, "auth.secret_file": str(devkeys.ensure_secret().absolute())})
    return config.for_instance(settings, instance)


def _load_with_kafka(load: Callable[[], Settings], bootstrap_servers: str) -> Settings:
    """The settings, with the Kafka inside this process."""
    return load().with_kafka(bootstrap_servers)


def _serve_as_worker(orders: Orders, announcer: Announcer) -> int:
    """Serve with the settings that the parent has checked; faults are the parent's to tell."""
    from gateway import config

    path = Path(orders.config_file) if orders.config_file else None
    load = partial(_load, path, orders.flags, development=orders.development)
    try:
        return _serve(config.restore(orders.settings), load, announcer, embedded_kafka=False, orders=orders)
    except GatewayError as error:
        _announce_faults(announcer, error)
        return 1


def _serve(
    settings: Settings,
    load: Callable[[], Settings],
    announcer: Announcer,
    *,
    embedded_kafka: bool,
    orders: Orders | None = None,
) -> int:
    """Read what the settings name, which may be slow files and can be interrupted, then run a daemon."""
    from contextlib import ExitStack

    from gateway.daemon.materials import read
    from gateway.daemon.signals import hold_signals
    from gateway.kafka.embedded import EmbeddedKafka
    from gateway.running import run
    from gateway.telemetry.logging import Log, stderr_descriptor
    from gateway.telemetry.metrics import Metrics

    metrics = Metrics()
    log = Log(metrics, level=settings.log.level, style=settings.log.format, descriptor=stderr_descriptor())
    with ExitStack() as stack:
        stack.callback(log.close)
        materials = read(settings, log)
        if embedded_kafka:
            kafka = stack.enter_context(EmbeddedKafka(settings.table.all_topics()))
            settings = settings.with_kafka(kafka.bootstrap_servers)
            load = partial(_load_with_kafka, load, kafka.bootstrap_servers)
        hold_signals()
        lost = run(
            partial(
                _live,
                settings,
                materials,
                metrics,
                log,
                load=load,
                announcer=announcer,
                embedded=embedded_kafka,
                orders=orders,
            )
        )
        if orders is not None:
            announcer.tell("counted", metrics=metrics.last_page().decode())
        return 1 if lost else 0


async def _live(
    settings: Settings,
    materials: Any,
    metrics: Any,
    log: Any,
    *,
    load: Callable[[], Settings],
    announcer: Announcer,
    embedded: bool,
    orders: Orders | None,
) -> int:
    """Assemble a daemon and let it live; how many messages it lost."""
    import gc

    import trio

    from gateway.daemon.assemble import assemble
    from gateway.daemon.run import run
    from gateway.daemon.worker import end_with_parent

    mock = embedded or (orders is not None and orders.development)
    places = "" if orders is None else orders.places
    with assemble(settings, materials, metrics, log, embedded=mock, places=places) as daemon:
        # What has been imported and built stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # A full collection looks at every connection, some 4 µs each: with the usual threshold there is one whenever a
        # quarter more have come, and a storm of them holds up everybody (bench/neighbours.py). What ends leaves no
        # cycle behind, and what does by accident is young.
        gc.set_threshold(700, 10, 1000)
        lost = 0
        async with trio.open_nursery() as nursery:

            async def serve_daemon(task_status: trio.TaskStatus[Any]) -> None:
                nonlocal lost
                lost = await run(
                    daemon,
                    load,
                    on_reloaded=lambda: announcer.tell("reloaded"),
                    warn=orders is None,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel()

            addresses = await nursery.start(serve_daemon)
            across = {name: how.value for name, how in metrics.across.items()}
            announcer.listening(addresses, across, embedded=embedded)
            nursery.start_soon(_announce_ready, daemon, announcer)
            if orders is not None:
                nursery.start_soon(end_with_parent, orders.parent)
        return lost


async def _announce_ready(daemon: Daemon, announcer: Announcer) -> None:
    await daemon.lifecycle.state.wait_value("ready")
    announcer.ready()


def _serve_with_workers(
    settings: Settings,
    workers: int,
    orders: Orders,
    load: Callable[[], Settings],
    announcer: Announcer,
    *,
    embedded_kafka: bool,
) -> int:
    """Check everything once, for all workers, then run their parent."""
    from contextlib import ExitStack

    from gateway.daemon.assemble import VERSION
    from gateway.daemon.materials import check
    from gateway.daemon.signals import hold_signals
    from gateway.daemon.workers import Supervisor
    from gateway.kafka.embedded import EmbeddedKafka
    from gateway.running import run
    from gateway.telemetry.logging import Log, stderr_descriptor
    from gateway.telemetry.metrics import Metrics

    check(settings, [])
    log = Log(Metrics(), level=settings.log.level, style=settings.log.format, descriptor=stderr_descriptor())
    if settings.auth.secret_file is not None and orders.config_file is None:
        orders = replace(orders, flags={**orders.flags, "auth.secret_file": settings.auth.secret_file})
    hold_signals()
    with ExitStack() as stack:
        stack.callback(log.close)
        if embedded_kafka:
            kafka = stack.enter_context(EmbeddedKafka(settings.table.all_topics()))
            settings = settings.with_kafka(kafka.bootstrap_servers)
        supervisor = Supervisor(
            settings,
            workers,
            [sys.executable, "-m", "gateway", "serve", "--worker"],
            log,
            version=VERSION,
            announcer=announcer,
            orders=orders,
            load=load,
        )
        run(supervisor.run)
        return 1 if supervisor.failed else 0
