"""An echo server on the gateway's own WebSocket side, for conformance suites: ``python -m tests.echo PORT``, 0 for a
free one.

Everything but the meaning of messages is the daemon's: listener, handshake, readiness, connection, frames, outbox.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import trio

from gateway.core.admission import AddressRate, Admission
from gateway.core.catalogue import Close
from gateway.core.origins import OriginRules
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.ws import frames
from gateway.ws.endpoints import Asked, Endpoint, Endpoints, Granted, PathTemplate
from gateway.ws.frames import Payload
from gateway.ws.handler import ConnectionLimits, Link
from gateway.ws.listener import Listener
from gateway.ws.readiness import Readiness
from gateway.ws.sockets import open_listening_sockets
from gateway.ws.upgrade import Upgrade

LIMITS = ConnectionLimits(
    max_message_bytes=20 * 1024 * 1024,
    max_controls_per_s=1000,
    max_unsent_bytes=64 * 1024 * 1024,
    unsent_timeout_s=10.0,
    ping_interval_s=3600.0,
    idle_timeout_s=7200.0,
    close_timeout_s=1.0,
    max_fragments=1_000_000,
)


class Echo:
    """Sends every message back as it came."""

    def __init__(self) -> None:
        self.connection: Link | None = None

    def opened(self, connection: Link) -> None:
        self.connection = connection

    def received(self, messages: Sequence[Payload]) -> None:
        assert self.connection is not None
        for message in messages:
            if isinstance(message, bytes):
                self.connection.send(frames.encode(frames.BINARY, message))
            else:
                self.connection.send(frames.encode(frames.TEXT, message.encode()))

    def tick(self, now: float) -> float:
        return math.inf

    def closing(self, close: Close | None, detail: str) -> None:
        pass

    def crashed(self, error: Exception) -> None:
        print(repr(error), file=sys.stderr)

    def ended(self, outcome: str) -> None:
        self.connection = None


async def open_echo(granted: Granted) -> Echo:
    """The handler of a connection."""
    return Echo()


def anybody(asked: Asked) -> Granted:
    """Grant every upgrade."""
    return Granted(None, text=True)


async def serve(port: int, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve on loopback until cancelled; starts with the port."""
    readiness = Readiness()
    quiet = RateLimited(lambda *_, **__: None, trio.current_time)
    admission = Admission(1000, AddressRate(0, 1))
    admission.open()
    endpoint = Endpoint("echo", PathTemplate("/"), LIMITS, OriginRules(), anybody, open_echo)
    listener = Listener(
        open_listening_sockets("listen", "127.0.0.1", port, backlog=128),
        upgrade=Upgrade(Endpoints([endpoint]), admission),
        readiness=readiness,
        tls_context=None,
        handshake_timeout_s=10.0,
        max_connections=1000,
        max_pending_per_address=0,
        metrics=Metrics(),
        log_refused=quiet,
        log_crash=quiet,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.run)
        task_status.started(listener.port)
        await listener.run(nursery)


async def main(port: int) -> None:
    """Serve and say where."""
    async with trio.open_nursery() as nursery:
        print(await nursery.start(serve, port), flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
