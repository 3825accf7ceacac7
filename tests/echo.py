"""An echo server on the gateway's ingress code for conformance suites: ``python -m tests.echo PORT``, 0 for a free one.

Everything but the meaning of messages is the daemon's: listener, handshake parser, readiness, connection, frames.
"""

from __future__ import annotations

import socket
import sys

import trio

from gateway.core.admission import AddressRate, Admission
from gateway.core.credentials import TokenRules
from gateway.core.origins import OriginRules
from gateway.core.principal import Principal
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Counters
from gateway.ws import frames
from gateway.ws.connection import Connection, ConnectionLimits
from gateway.ws.frames import Item
from gateway.ws.listener import Listener
from gateway.ws.readiness import Readiness
from gateway.ws.request import Request
from gateway.ws.sockets import open_listening_sockets
from gateway.ws.upgrade import Admitted, Handshake, _check_upgrade, accept_key

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


class EchoConnection(Connection):
    """Sends every message back as it came."""

    __slots__ = ()

    def _take(self, items: list[Item]) -> None:
        for item in items:
            if isinstance(item, bytes):
                self.send(frames.BINARY, item)
            elif isinstance(item, str):
                self.send(frames.TEXT, item.encode())
            else:
                self._event(item)

    def _log_crash(self, error: Exception) -> None:
        print(repr(error), file=sys.stderr)


class Anybody(Handshake):
    """The handshake without tokens."""

    def decide(self, request: Request) -> Admitted:
        """Accept every upgrade."""
        return Admitted(
            Principal("echo", "", "free", 0.0),
            "echo",
            request.path,
            None,
            accept_key(_check_upgrade(request)),
        )


class Echoes:
    """Makes echo connections."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    def enter(self, sock: socket.socket, admitted: Admitted) -> Connection:
        return EchoConnection(sock, self._readiness, LIMITS, accept_text=True)

    def leave(self, connection: Connection) -> None:
        pass


async def serve(port: int, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve on loopback until cancelled; starts with the port."""
    readiness = Readiness()
    quiet = RateLimited(lambda *_, **__: None, trio.current_time)
    listener = Listener(
        open_listening_sockets("listen", "127.0.0.1", port, backlog=128),
        handshake=Anybody(
            path="/",
            origins=OriginRules(),
            allow_query_token=False,
            rules=TokenRules((), ""),
            admission=Admission(1000, AddressRate(0, 1)),
        ),
        entry=Echoes(readiness),
        tls=None,
        handshake_timeout_s=10.0,
        max_connections=1000,
        max_pending_per_address=0,
        counters=Counters(),
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
