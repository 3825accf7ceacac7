"""Serves the sidecar on hypercorn's Trio worker, hardened.

* hypercorn sends inside a shielded scope, so a client that stops reading would hold a shutdown for ever: the sockets
  carry TCP_USER_TIMEOUT, which makes the send fail.
* A request can make hypercorn's worker raise out of `serve` (a non-ASCII upgrade header does): it is started again on
  the same listening socket.
* HTTP/1.1 is all that is spoken.
* Requests are bounded in size and in time.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import hypercorn.protocol
import trio
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ops.asgi import Sidecar
    from gateway.telemetry.logging import RateLimited

USER_TIMEOUT_MS: Final = 2_000
"""Bytes a client does not take for this long end its connection (tcp(7)); a scraper on loopback takes microseconds."""
READ_TIMEOUT_S: Final = 10
RESTART_PAUSE_S: Final = 0.1


BACKLOG: Final = 64


def prepare(sock: socket.socket) -> None:
    """Set what a listening socket of the sidecar needs; accepted ones inherit it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class _Http1Only(H11Protocol):
    """hypercorn's HTTP/1.1 without its ways to HTTP/2 (``Upgrade: h2c``, prior knowledge), which no setting closes."""

    async def _check_protocol(self, event: Any) -> None:
        return


hypercorn.protocol.H11Protocol = _Http1Only  # type: ignore[attr-defined]  # the name by which it makes them


def _config(sockets: Sequence[socket.socket]) -> Config:
    config = Config()
    # hypercorn closes what it is given; a duplicate leaves the socket to the next start
    config.bind = [f"fd://{os.dup(sock.fileno())}" for sock in sockets]
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.alpn_protocols = ["http/1.1"]
    config.h11_max_incomplete_size = 16_384
    config.read_timeout = READ_TIMEOUT_S
    config.keep_alive_timeout = READ_TIMEOUT_S
    config.graceful_timeout = 1.0
    config.shutdown_timeout = 1.0
    config.startup_timeout = 5.0
    config.websocket_max_message_size = 1024
    return config


async def run(
    app: Sidecar,
    sockets: Sequence[socket.socket],
    log_restart: RateLimited,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` on ``sockets`` until cancelled; starts with the port. Closes ``sockets``.

    Cancelled, it ends within `USER_TIMEOUT_MS` whatever its clients do.
    """
    try:
        reported = False
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(partial(serve, app, _config(sockets), shutdown_trigger=trio.sleep_forever))
                    if not reported:
                        task_status.started(sockets[0].getsockname()[1])
                        reported = True
            except Exception as error:  # the barrier around hypercorn's worker
                log_restart("sidecar restarted", exc_info=error)
            await trio.sleep(RESTART_PAUSE_S)
    finally:
        for sock in sockets:
            sock.close()
