"""``gateway demo``: the whole system on one machine, watched live, every message accounted for.

A daemon process with an embedded Kafka and a throw-away certificate; clients on trio-websocket over WSS in this
process; a Kafka consumer in a thread that checks what arrives. Each message carries its client, number and time in its
correlation_id, so that what was lost, doubled or late is known message by message.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any, Final

import trio
from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gateway import client
from gateway.client.ticks import read, walk
from gateway.config import AuthSettings
from gateway.errors import ClientError, StartupError
from gateway.testing import devkeys
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.ticks_pb2 import BatchTickData

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.v1.ticks_pb2 import Tick

TOPIC: Final = "tick-data"
COMPANY: Final = "demo"
START_TIMEOUT_S: Final = 30.0
ARRIVAL_TIMEOUT_S: Final = 10.0
"""How long to wait for what is still on its way when the clients have stopped."""
REFRESH_S: Final = 0.25


@dataclass(slots=True)
class Arrivals:
    """What the consumer thread has seen. One writer, one reader; plain ints and a bounded deque need no lock."""

    distinct: int = 0
    doubled: int = 0
    out_of_order: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=20_000))
    last_number: dict[int, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    error: str = ""

    def take(self, correlation_id: str, now_ns: int) -> None:
        """Account for one message."""
        client_number, number, sent_ns = map(int, correlation_id.split(":"))
        last = self.last_number.get(client_number, -1)
        if number <= last:
            self.doubled += 1
            return
        if number != last + 1:
            self.out_of_order += 1
        self.last_number[client_number] = number
        self.distinct += 1
        self.latencies_ms.append((now_ns - sent_ns) / 1e6)

    def percentile(self, share: float) -> float:
        """A percentile of the last latencies, in milliseconds."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


@dataclass(slots=True)
class Progress:
    """What the view shows."""

    arrivals: Arrivals
    connected: int = 0
    sent: int = 0
    failures: int = 0
    first_failure: str = ""
    rate: float = 0.0
    health: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, in the order they are shown."""
        arrived = self.arrivals.distinct  # before what was sent: it grows meanwhile
        messages = self.health.get("messages", {})
        balance = messages.get("imbalance")
        return [
            ("connections", f"{self.connected:,}"),
            ("messages/s", f"{self.rate:,.0f}"),
            ("sent", f"{self.sent:,}"),
            ("in Kafka", f"{arrived:,}"),
            ("p50 to Kafka", f"{self.arrivals.percentile(0.50):.1f} ms"),
            ("p99 to Kafka", f"{self.arrivals.percentile(0.99):.1f} ms"),
            ("dead letters", f"{messages.get('dead_lettered', 0):,}"),
            ("books", "-" if balance is None else "balanced" if balance == 0 else f"off by {balance}"),
        ]


def consume(bootstrap_servers: str, arrivals: Arrivals, ready: threading.Event) -> None:
    """The consumer thread: read the topic from its beginning until told to stop."""
    try:
        consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "demo",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 10,
            }
        )
        topic = consumer.list_topics(TOPIC, timeout=10).topics[TOPIC]
        consumer.assign([TopicPartition(TOPIC, number, 0) for number in topic.partitions])
        ready.set()
        while not arrivals.stop.is_set():
            messages = consumer.consume(1000, timeout=0.01)
            now_ns = time.monotonic_ns()
            for message in messages:
                if message.error() is None:
                    arrivals.take(MessageEnvelope.FromString(message.value() or b"").correlation_id, now_ns)
        consumer.close()
    except (KafkaException, ValueError) as error:
        arrivals.error = str(error)
        ready.set()


async def run_demo(*, ticks: Path | None, clients: int, rate: float, seconds: float) -> int:
    """Run the demo; 0 when everything sent came back from Kafka once, else 1. Raises StartupError, BadTicks."""
    recorded = list(read(ticks)) if ticks is not None else None
    if recorded == []:
        raise StartupError(f"{ticks}: holds no ticks")
    with _temporary_directory() as directory:
        home = Path(directory)
        secret = _write_config(home, clients)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(_daemon, home)
            try:
                url, sidecar, kafka = await _addresses(process, home)
                arrivals = Arrivals()
                consumer = threading.Thread(target=consume, args=(kafka, arrivals, ready := threading.Event()))
                consumer.start()
                try:
                    await trio.to_thread.run_sync(ready.wait)
                    progress = Progress(arrivals)
                    await _show_while(
                        progress,
                        sidecar,
                        partial(
                            _run_clients,
                            progress,
                            url,
                            home,
                            secret,
                            recorded,
                            clients=clients,
                            rate=rate,
                            seconds=seconds,
                        ),
                    )
                finally:
                    arrivals.stop.set()
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(consumer.join)
            finally:
                process.terminate()
                with trio.move_on_after(10, shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()
    return _verdict(progress)


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="gateway-demo-")
    except OSError as error:
        raise StartupError(f"a temporary directory: {error.strerror}; TMPDIR may name another place") from error


def _verdict(progress: Progress) -> int:
    arrivals = progress.arrivals
    lost = progress.sent - arrivals.distinct
    if arrivals.error:
        print(f"gateway: the consumer failed: {arrivals.error}", file=sys.stderr)
    if progress.failures:
        print(f"gateway: {progress.failures} clients failed: {progress.first_failure}", file=sys.stderr)
    print(
        f"sent {progress.sent:,}, received back from Kafka {arrivals.distinct:,}, lost {lost:,},"
        f" doubled {arrivals.doubled:,}, out of order {arrivals.out_of_order:,}"
    )
    failed = lost or arrivals.doubled or arrivals.out_of_order or progress.failures or not progress.sent
    return 1 if failed else 0


def _write_config(home: Path, clients: int) -> bytes:
    """The daemon's settings, certificate and secret; returns the secret."""
    devkeys.write_certificate(home, "localhost", "127.0.0.1")
    secret = secrets.token_urlsafe(48).encode()
    (home / "secret").touch(mode=0o600)
    (home / "secret").write_bytes(secret)
    (home / "gateway.toml").write_text(
        "[listen]\nport = 0\nhandshakes_per_address_per_s = 0\n"
        f"max_connections = {clients + 16}\n"
        '[tls]\ncert_file = "server.pem"\nkey_file = "server.key"\n'
        '[auth]\nsecret_file = "secret"\n[sidecar]\nport = 0\n[log]\nlevel = "warning"\n'
    )
    return secret


async def _daemon(home: Path, task_status: trio.TaskStatus[trio.Process]) -> None:
    command = [
        sys.executable,
        "-m",
        "gateway",
        "serve",
        "--config",
        str(home / "gateway.toml"),
        "--embedded-kafka",
    ]
    # The operator's settings for a real daemon must not change the demo's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    with (home / "log").open("wb") as log:
        await trio.run_process(command, stdout=PIPE, stderr=log, env=environment, check=False, task_status=task_status)


async def _addresses(process: trio.Process, home: Path) -> tuple[str, str, str]:
    """Listener, sidecar and Kafka of the daemon, once it is ready. Raises StartupError with its log."""
    assert process.stdout is not None  # noqa: S101  # PIPE
    text = b""
    with trio.move_on_after(START_TIMEOUT_S):
        while b"gateway: ready\n" not in text:
            data = await process.stdout.receive_some()
            if not data:
                break
            text += data
    found = dict(
        line.removeprefix("gateway: ").rsplit(" ", 1)
        for line in text.decode().replace(" (embedded)", "").splitlines()
        if " " in line.removeprefix("gateway: ")
    )
    if not text.endswith(b"gateway: ready\n"):
        raise StartupError(f"the daemon did not get ready:\n{(home / 'log').read_text()[-2000:]}")
    return found["listening on"].replace("127.0.0.1", "localhost"), found["sidecar on"], found["kafka at"]


async def _run_clients(
    progress: Progress,
    url: str,
    home: Path,
    secret: bytes,
    recorded: list[Tick] | None,
    *,
    clients: int,
    rate: float,
    seconds: float,
) -> None:
    """Connect all clients, let them send for ``seconds``, close them, wait for the last message to arrive."""
    tls = ssl.create_default_context(cafile=home / "ca.pem")
    auth = AuthSettings(secret_file=str(home / "secret"))
    all_connected = trio.Event()
    async with trio.open_nursery() as nursery:
        for number in range(clients):
            token = devkeys.mint_with_secret(
                auth, secret, user_id=f"trader-{number:04d}", company_id=COMPANY, tier="pro", ttl_s=3600
            )
            source = (
                walk(number)
                if recorded is None
                else cycle(recorded[number % len(recorded) :] + recorded[: number % len(recorded)])
            )
            await nursery.start(
                partial(
                    _one_client,
                    progress,
                    number,
                    url,
                    token,
                    tls,
                    source,
                    all_connected,
                    rate=rate,
                    seconds=seconds,
                    clients=clients,
                )
            )
        all_connected.set()
    with trio.move_on_after(ARRIVAL_TIMEOUT_S):
        while progress.arrivals.distinct < progress.sent and not progress.arrivals.error:  # noqa: ASYNC110  # a thread's
            await trio.sleep(0.02)


async def _one_client(
    progress: Progress,
    number: int,
    url: str,
    token: str,
    tls: ssl.SSLContext,
    source: Iterator[Tick],
    go: trio.Event,
    *,
    rate: float,
    seconds: float,
    clients: int,
    task_status: trio.TaskStatus[None],
) -> None:
    account = str(5_000_000 + number)
    started = finished = False
    try:
        async with client.connect(url, token, account=account, tls=tls) as connection:
            progress.connected += 1
            task_status.started()
            started = True
            await go.wait()
            began = trio.current_time() + number / clients / rate
            for count in range(round(rate * seconds)):
                await trio.sleep_until(began + count / rate)
                batch = BatchTickData(ticks=[next(source)], account=account)
                message = connection.envelope(
                    "tick_data",
                    batch.SerializeToString(),
                    time.time_ns() // 1_000_000,
                    f"{number}:{count}:{time.monotonic_ns()}",
                )
                progress.sent += 1  # before it is: it may be in Kafka before `send` returns
                await connection.send(message)
            finished = True
    except* (ClientError, OSError, trio.TooSlowError) as group:
        if not finished:  # how a connection ends does not matter: the consumer counts what arrived
            progress.failures += 1
            progress.first_failure = progress.first_failure or repr(group.exceptions[0])
        if not started:
            task_status.started()
    progress.connected -= started


async def _show_while(progress: Progress, sidecar: str, work: Any) -> None:
    """Run ``work`` beside the view: live on a terminal, a line a second without one."""
    console = Console()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch, progress, sidecar)
        if console.is_terminal:
            nursery.start_soon(_live, progress, console)
        else:
            nursery.start_soon(_lines, progress)
        await work()
        nursery.cancel_scope.cancel()


async def _watch(
    progress: Progress, sidecar: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Once a second: the rate, and what the daemon's own books say; started once they have said something."""
    await _ask(progress, sidecar)
    task_status.started()
    before, at = progress.arrivals.distinct, trio.current_time()
    while True:
        await trio.sleep(1.0)
        now = trio.current_time()
        progress.rate = (progress.arrivals.distinct - before) / (now - at)
        before, at = progress.arrivals.distinct, now
        await _ask(progress, sidecar)


async def _ask(progress: Progress, sidecar: str) -> None:
    """Take the daemon's health; what it said last stays when it does not answer."""
    host, _, port = sidecar.removeprefix("http://").rpartition(":")
    try:
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join([data async for data in stream])
        progress.health = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, ValueError, trio.BrokenResourceError):
        return


async def _live(progress: Progress, console: Console) -> None:
    with Live(console=console, auto_refresh=False, transient=False) as live:
        try:
            while True:
                live.update(_table(progress), refresh=True)
                await trio.sleep(REFRESH_S)
        finally:
            live.update(_table(progress), refresh=True)


def _table(progress: Progress) -> Table:
    table = Table(title="gateway demo", show_header=False, min_width=40)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for label, value in progress.rows():
        table.add_row(label, value)
    return table


async def _lines(progress: Progress) -> None:
    while True:
        await trio.sleep(1.0)
        print("  ".join(f"{label}: {value}" for label, value in progress.rows()), flush=True)
