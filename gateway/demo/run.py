"""``gateway demo``: the whole system on one machine, watched live, every message accounted for.

A daemon process with an embedded Kafka and a throw-away certificate; clients on trio-websocket over WSS in this
process; a Kafka consumer in a thread that checks what arrives. Each message carries its client, number and time in its
correlation_id, so that what was lost, doubled or late is known message by message.
"""

from __future__ import annotations

import errno
import os
import ssl
import sys
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Final

import trio

from gateway import client
from gateway.client.ticks import read, walk
from gateway.demo.arrivals import Arrivals, consume
from gateway.demo.view import Progress, shown
from gateway.errors import ClientError, StartupError
from gateway.testing import devkeys
from gateway.testing.daemon import Daemon, DaemonFailed
from gateway.v1.ticks_pb2 import BatchTickData

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gateway.v1.ticks_pb2 import Tick

COMPANY: Final = "demo"
ARRIVAL_TIMEOUT_S: Final = 10.0
"""How long to wait for what is still on its way when the clients have stopped."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients send: ``rate`` ticks a second each, for ``seconds``; recorded ones, or a random walk."""

    clients: int
    rate: float
    seconds: float
    recorded: list[Tick] | None

    def source(self, number: int) -> Iterator[Tick]:
        """The ticks of one client."""
        if self.recorded is None:
            return walk(number)
        at = number % len(self.recorded)
        return cycle(self.recorded[at:] + self.recorded[:at])


async def run_demo(*, ticks: Path | None, clients: int, rate: float, seconds: float) -> int:
    """Run the demo; 0 when everything sent came back from Kafka once, else 1. Raises StartupError, BadTicks."""
    recorded = list(read(ticks)) if ticks is not None else None
    if recorded == []:
        raise StartupError(f"{ticks}: holds no ticks")
    load = Load(clients, rate, seconds, recorded)
    async with _daemon(clients) as daemon:
        arrivals = Arrivals()
        progress = Progress(arrivals)
        async with _consumer(daemon.kafka, arrivals), shown(progress, daemon.sidecar):
            await _run_clients(progress, daemon, load)
    return _verdict(progress)


@asynccontextmanager
async def _daemon(clients: int) -> AsyncIterator[Daemon]:
    """A daemon of the demo's own: an operator's settings for a real one must not change it."""
    daemon = Daemon(
        settings={
            "listen.max_connections": clients + 16,
            "tls.cert_file": "server.pem",
            "tls.key_file": "server.key",
            "log.level": "warning",
        },
        environment={name: None for name in os.environ if name.startswith("GATEWAY_")},
        prepare=lambda home: devkeys.write_certificate(home, "localhost", "127.0.0.1"),
    )
    try:
        await trio.to_thread.run_sync(daemon.__enter__)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            raise StartupError(f"the daemon cannot be started: {error.strerror}") from error
        raise StartupError(f"a temporary directory: {error.strerror}; TMPDIR may name another place") from error
    except DaemonFailed as error:
        raise StartupError(f"the daemon did not get ready:\n{str(error)[-2000:]}") from error
    try:
        yield daemon
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(daemon.__exit__, None, None, None)


@asynccontextmanager
async def _consumer(bootstrap_servers: str, arrivals: Arrivals) -> AsyncIterator[None]:
    """The consumer's thread, reading before anything is sent."""
    ready = threading.Event()
    thread = threading.Thread(target=consume, args=(bootstrap_servers, arrivals, ready))
    thread.start()
    try:
        await trio.to_thread.run_sync(ready.wait)
        yield
    finally:
        arrivals.stop.set()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)


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


async def _run_clients(progress: Progress, daemon: Daemon, load: Load) -> None:
    """Connect all clients, let them send, close them, wait for the last message to arrive."""
    tls = ssl.create_default_context(cafile=daemon.home / "ca.pem")
    all_connected = trio.Event()
    async with trio.open_nursery() as nursery:
        for number in range(load.clients):
            await nursery.start(partial(_one_client, progress, daemon, load, number, tls, all_connected))
        all_connected.set()
    with trio.move_on_after(ARRIVAL_TIMEOUT_S):
        while progress.arrivals.distinct < progress.sent and not progress.arrivals.error:  # noqa: ASYNC110  # a thread's
            await trio.sleep(0.02)


async def _one_client(
    progress: Progress,
    daemon: Daemon,
    load: Load,
    number: int,
    tls: ssl.SSLContext,
    go: trio.Event,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    account = str(5_000_000 + number)
    url, token = daemon.url.replace("127.0.0.1", "localhost"), daemon.token(f"trader-{number:04d}", COMPANY)
    started = finished = False
    try:
        async with client.connect(url, token, account=account, tls=tls) as connection:
            progress.note_connected(1)
            task_status.started()
            started = True
            await go.wait()
            await _send_ticks(progress, connection, load, number, account)
            finished = True
    except* (ClientError, OSError, trio.TooSlowError) as group:
        if not finished:  # how a connection ends does not matter: the consumer counts what arrived
            progress.note_failure(repr(group.exceptions[0]))
        if not started:
            task_status.started()
    progress.note_connected(-started)


async def _send_ticks(progress: Progress, connection: client.Connection, load: Load, number: int, account: str) -> None:
    began = trio.current_time() + number / load.clients / load.rate
    source = load.source(number)
    for count in range(round(load.rate * load.seconds)):
        await trio.sleep_until(began + count / load.rate)
        batch = BatchTickData(ticks=[next(source)], account=account)
        message = connection.envelope(
            "tick_data",
            batch.SerializeToString(),
            time.time_ns() // 1_000_000,
            f"{number}:{count}:{time.monotonic_ns()}",
        )
        progress.note_sent()  # before it is: it may be in Kafka before `send` returns
        await connection.send(message)
