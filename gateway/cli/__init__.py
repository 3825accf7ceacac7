"""The ``gateway`` command: what an operator types. Faults end in readable lines and exit status 1."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import tomllib
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import cyclopts
import trio
from cyclopts import Parameter
from pydantic import SecretStr

from gateway import config
from gateway.cli import spool as cli_spool
from gateway.config import keys
from gateway.daemon.orders import Orders
from gateway.daemon.signals import hold_signals
from gateway.errors import ConfigError, GatewayError
from gateway.running import run
from gateway.testing import devkeys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable

    from gateway.config import Settings
    from gateway.daemon.run import Addresses, Gateway

app = cyclopts.App(
    name="gateway",
    help="A WebSocket router daemon: authenticated MT5 tick clients in, Kafka records out.",
    version=version("gateway"),
)

app.command(cli_spool.app)

ConfigFile = Annotated[Path | None, Parameter(name="--config")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a fault that was printed, 2 usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale that lacks a character is no reason to end
    try:
        result = app(print_error=True, exit_on_error=True, result_action="return_value")
    except GatewayError as error:
        _complain(error)
        sys.exit(1)
    except UnicodeEncodeError as error:  # in the name of a file
        missing = error.object[error.start : error.end]
        _complain(GatewayError(f"{missing!r}: the locale's {error.encoding} has no such character: set LC_ALL=C.UTF-8"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # whoever read standard output is gone; there is nobody to tell
    except OSError as error:  # what is not translated at its own boundary: standard output, on a full disk say
        _give_up_stdout()
        _complain(GatewayError(f"{error.filename or 'standard output'}: {error.strerror or error}"))
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


def _complain(error: GatewayError) -> None:
    for line in str(error).splitlines():
        print(f"gateway: {line}", file=sys.stderr)


def _warn(warnings: Iterable[str]) -> None:
    for line in warnings:
        print(f"gateway: warning: {line}", file=sys.stderr)


def _flags(**values: object) -> dict[str, Any]:
    """Flags that were given, as dotted settings; ``sets`` holds KEY=VALUE strings. Raises ConfigError."""
    flags: dict[str, Any] = {}
    sets = values.pop("sets", ())
    assert isinstance(sets, tuple)  # noqa: S101  # from the annotation
    for assignment in sets:
        name, equals, text = assignment.partition("=")
        if not equals or "." not in name:
            raise ConfigError([f"--set {name}: wanted SECTION.KEY=VALUE"])
        try:
            flags[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            flags[name] = text
    flags.update({name.replace("__", "."): value for name, value in values.items() if value is not None})
    return flags


@app.command
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
    worker: Annotated[bool, Parameter(show=False, negative=())] = False,
) -> int:
    """Run the daemon until SIGTERM or SIGINT.

    Parameters
    ----------
    config_file
        The TOML file. Without it the defaults hold, and `auth` must come from the environment.
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
    worker
        Be a worker: what else there is to know comes on standard input.
    """
    if worker:
        return _serve_as_worker(Orders.read(sys.stdin.buffer))
    flags = _flags(listen__host=host, listen__port=port, sidecar__port=sidecar_port, log__level=log_level, sets=sets)
    load = partial(_load, config_file, flags, development=embedded_kafka, instance=instance)
    settings = load()
    if workers > 1:
        _check_everything(settings, [])
        orders = Orders(config_file=str(config_file) if config_file else None, flags=flags, development=embedded_kafka)
        hold_signals()
        return run(_supervise, settings, workers, orders, load, embedded_kafka)
    return _serve(settings, load, embedded_kafka=embedded_kafka)


def _serve_as_worker(orders: Orders) -> int:
    """Serve with the settings that the parent has checked; faults are the parent's to tell."""
    load = partial(
        _load, Path(orders.config_file) if orders.config_file else None, orders.flags, development=orders.development
    )
    try:
        return _serve(config.restore(orders.settings), load, embedded_kafka=False, orders=orders)
    except GatewayError as error:
        _say(*(f"fault: {line}" for line in str(error).splitlines()))
        return 1


def _check_everything(settings: Settings, skipped: list[str], unseen: Collection[str] = ()) -> None:
    """Raise ConfigError with every fault that a start would meet one by one; files of ``unseen`` settings are left out.

    Keys that are of no use are added to ``skipped``.
    """
    from gateway.kafka.producer import check_properties

    checks: list[Callable[[], object]] = [
        lambda: keys.token_rules(settings.auth, skipped, unseen),
        lambda: keys.check_tls(settings.tls, unseen),
        lambda: config.check_descriptors(settings.listen.max_connections),
        lambda: check_properties(config.kafka_properties(settings.kafka, unseen)),
    ]
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except GatewayError as error:
            faults += str(error).splitlines()
    if faults:
        raise ConfigError(faults)


async def _supervise(
    settings: Settings, workers: int, orders: Orders, load: Callable[[], Settings], embedded_kafka: bool
) -> int:
    from gateway.daemon.workers import Supervisor
    from gateway.kafka.embedded import EmbeddedKafka
    from gateway.telemetry.logging import Log, stderr_descriptor
    from gateway.telemetry.metrics import Counters

    log = Log(Counters(), level=settings.log.level, style=settings.log.format, descriptor=stderr_descriptor())
    if settings.auth.secret_file is not None and orders.config_file is None:
        orders = replace(orders, flags={**orders.flags, "auth.secret_file": settings.auth.secret_file})
    with ExitStack() as stack:
        stack.callback(log.close)
        if embedded_kafka:
            kafka = stack.enter_context(EmbeddedKafka(settings.table.all_topics()))
            settings = settings.model_copy(
                update={"kafka": settings.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers})}
            )
        supervisor = Supervisor(
            settings,
            workers,
            [sys.executable, "-m", "gateway", "serve", "--worker"],
            log,
            version=version("gateway"),
            say=_say,
            orders=orders,
            load=load,
        )
        await supervisor.run()
        return 1 if supervisor.failed else 0


def _load(path: Path | None, flags: dict[str, Any], *, development: bool, instance: int = 0) -> Settings:
    """The settings; with ``development`` and no key anywhere, those with the development secret."""
    try:
        settings = config.load(path, flags)
    except ConfigError as error:
        if not development or not any(fault.startswith(("auth: is missing", "auth: no key")) for fault in error.faults):
            raise
        settings = config.load(path, {**flags, "auth.secret_file": str(devkeys.ensure_secret().absolute())})
    return config.for_instance(settings, instance)


def _serve(
    settings: Settings, reload: Callable[[], Settings], *, embedded_kafka: bool, orders: Orders | None = None
) -> int:
    """Build a gateway, which may read slow files and can be interrupted, and run it."""
    from gateway.daemon.run import Gateway  # imported late: --help need not load Kafka
    from gateway.kafka.embedded import EmbeddedKafka
    from gateway.telemetry.logging import Log, stderr_descriptor
    from gateway.telemetry.metrics import Counters

    counters = Counters()
    log = Log(counters, level=settings.log.level, style=settings.log.format, descriptor=stderr_descriptor())
    with ExitStack() as stack:
        stack.callback(log.close)
        bootstrap_servers = None
        if embedded_kafka:
            bootstrap_servers = stack.enter_context(EmbeddedKafka(settings.table.all_topics())).bootstrap_servers
        gateway = Gateway(
            settings,
            counters,
            log,
            bootstrap_servers=bootstrap_servers,
            reload_settings=reload,
            embedded=embedded_kafka or (orders is not None and orders.development),
            worker=orders is not None,
        )
        if orders is not None:
            gateway.on_reloaded = lambda: _say("reloaded")
        # What has been imported and built stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        hold_signals()
        run(_live, gateway, embedded_kafka, orders)
        if orders is not None:
            _say(f"counted: {json.dumps(gateway.metrics().decode())}")
        return 1 if gateway.lost else 0


async def _live(gateway: Gateway, embedded_kafka: bool, orders: Orders | None) -> None:
    from gateway.daemon.workers import end_with_parent

    async def announce(addresses: Addresses) -> None:
        kafka = f"{addresses.kafka}{' (embedded)' if embedded_kafka else ''}"
        _say(f"listening on {addresses.listen}", f"sidecar on {addresses.sidecar}", f"kafka at {kafka}")
        await gateway.wait_ready()
        _say("ready")

    async with trio.open_nursery() as nursery:
        addresses: Addresses = await nursery.start(_until_done, gateway.run, nursery.cancel_scope)
        nursery.start_soon(announce, addresses)
        if orders is not None:
            nursery.start_soon(end_with_parent, orders.parent)


async def _until_done(
    run: Callable[..., Awaitable[None]],
    scope: trio.CancelScope,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    await run(task_status=task_status)
    scope.cancel()


def _say(*lines: str) -> None:
    """Print lines; where nobody takes them they are lost, which is no reason to end."""
    try:
        for line in lines:
            print(f"gateway: {line}", flush=True)
    except OSError:  # a reader that has gone, a full disk; ValueError below: it was closed
        _give_up_stdout()
    except ValueError:
        return


def _give_up_stdout() -> None:
    """Nothing more can be written: what is buffered would be tried again at exit, and change the exit status."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    with suppress(OSError, ValueError):
        sys.stdout.flush()


@app.command
def check_config(file: Path, /, *, sets: Set = ()) -> int:
    """Check a TOML file with everything it names: keys, certificate, Kafka properties. Connects to nothing.

    Where the file names systemd credentials and this is not the unit, they are named, and the rest is checked.

    Parameters
    ----------
    file
        The TOML file; environment variables count as they would for `serve`.
    sets
        Settings over it, as SECTION.KEY=VALUE.
    """
    unseen: dict[str, str] = {}
    settings = config.load(file, _flags(sets=sets), unseen=unseen)
    _warn(f"{setting}: {name} could not be looked at: this is not its unit" for setting, name in unseen.items())
    skipped: list[str] = []
    try:
        _check_everything(settings, skipped, unseen)
    except ConfigError as error:
        raise ConfigError([f"{file}: {fault}" for fault in error.faults]) from None
    _warn(config.warnings(settings))
    _warn(f"{reason}: left out" for reason in skipped)
    print(json.dumps(config.shown(settings), indent=2))
    print(f"{file}: ok")
    return 0


@app.command
def token(
    *,
    user: str,
    company: str = "",
    tier: Literal["free", "pro", "enterprise"] = "free",
    ttl: Annotated[int, Parameter(validator=cyclopts.validators.Number(gt=0))] = 3600,
    config_file: ConfigFile = None,
    private_key: Path | None = None,
    algorithm: Literal["RS256", "ES256", "EdDSA"] | None = None,
    kid: str | None = None,
    issuer: str | None = None,
    audience: str | None = None,
) -> int:
    """Print a development token.

    Parameters
    ----------
    user
        The user_id: `sub`, and the key of every record.
    company
        The company_id.
    tier
        The subscription tier.
    ttl
        Seconds until it expires.
    config_file
        Sign with this file's HS256 secret, issuer and audience. Without it, with the development secret.
    private_key
        Sign with this PEM private key instead; needs --algorithm.
    algorithm
        What the private key is for.
    kid
        Name the key in the token's header.
    issuer
        `iss`, when it is not the configured one.
    audience
        `aud`, when it is not the configured one.
    """
    import time

    from gateway.config import AuthSettings
    from gateway.core.credentials import mint

    if (private_key is None) != (algorithm is None):
        raise ConfigError(["--private-key and --algorithm belong together"])
    if config_file is not None:
        auth = config.load(config_file).auth
    else:
        path = devkeys.ensure_secret() if private_key is None else None
        auth = AuthSettings(
            secret_file=str(path.absolute()) if path else None, secret=None if path else SecretStr("unused")
        )
    if private_key is not None:
        try:
            key: bytes | None = private_key.read_bytes()
        except OSError as error:
            raise ConfigError([f"--private-key {private_key}: {error.strerror}"]) from error
    else:
        key = keys.read_secret(auth)
        if key is None:
            raise ConfigError(["the configuration has no HS256 secret: give --private-key and --algorithm"])
    now = int(time.time())
    try:
        print(
            mint(
                algorithm=algorithm or "HS256",
                key=key,
                user_id=user,
                company_id=company,
                tier=tier,
                issuer=issuer or auth.issuer,
                audience=audience or auth.audience,
                kid=kid or (auth.secret_kid if private_key is None else None),
                issued_at=now,
                expires_at=now + ttl,
            )
        )
    except (ValueError, TypeError) as error:
        raise ConfigError([f"--private-key {private_key}: not a PEM private key for {algorithm}"]) from error
    return 0


def _token_text(token: str | None, token_file: Path | None) -> str:
    """The token from where it was given. Raises ConfigError; never quotes it."""
    if token_file is not None:
        try:
            return token_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                [f"--token-file {token_file}: {getattr(error, 'strerror', None) or 'not text'}"]
            ) from error
    text = token or os.environ.get("GATEWAY_TOKEN")
    if not text:
        raise ConfigError(["a token is needed: --token, --token-file or GATEWAY_TOKEN in the environment"])
    return text


@app.command
def stream(
    ticks: Path,
    /,
    *,
    url: str,
    token: str | None = None,
    token_file: Path | None = None,
    ca: Path | None = None,
    account: str | None = None,
    rate: Annotated[float | None, Parameter(validator=cyclopts.validators.Number(gte=0))] = None,
    speed: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 1.0,
    batch: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=500))] = 100,
) -> int:
    """Replay a tick file to a gateway, as an MT5 client would.

    Parameters
    ----------
    ticks
        A CSV file (plain or gzip) with the columns time_msc,symbol,bid,ask,volume.
    url
        The gateway, e.g. wss://host:8001/ws/mt5.
    token
        The JWT. --token-file and GATEWAY_TOKEN keep it out of the process list.
    token_file
        A file that holds the JWT.
    ca
        PEM file of a private CA.
    account
        The MT5 account.
    rate
        Ticks a second, 0 for as fast as possible. Without it the file's own pace.
    speed
        How many times the file's own pace.
    batch
        Ticks in one message at most.
    """
    from gateway.client import tls_context
    from gateway.client.stream import Pace, Summary
    from gateway.client.stream import stream as replay

    secret = _token_text(token, token_file)
    pace = Pace(rate=rate, speed=speed, batch=batch)

    async def replay_it() -> int:
        done: Summary = await replay(
            ticks,
            url,
            secret,
            pace=pace,
            account=account,
            tls=tls_context(url, ca),
            say=lambda line: print(f"gateway: {line}", file=sys.stderr),
        )
        print(
            f"{done.ticks:,} ticks in {done.messages:,} messages, {done.seconds:.1f} s,"
            f" {done.rejected:,} rejected, {done.reconnects} reconnects, {done.resent:,} sent again"
        )
        return 1 if done.rejected else 0

    return run(replay_it)


@app.command
def demo(
    *,
    ticks: Path | None = None,
    clients: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=1000))] = 100,
    rate: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 50.0,
    seconds: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 10.0,
) -> int:
    """Show the whole system on this machine: an embedded Kafka, the daemon, clients over WSS, a checking consumer.

    Parameters
    ----------
    ticks
        Replay the prices of this CSV file instead of a random walk.
    clients
        Connected clients.
    rate
        Ticks a second of each client.
    seconds
        How long they send.
    """
    from gateway.demo import run_demo

    return run(partial(run_demo, ticks=ticks, clients=clients, rate=rate, seconds=seconds))
