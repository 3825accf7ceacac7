"""The websockets library's server on Trio."""

from __future__ import annotations

import signal
from functools import partial

import jwt
import trio
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.trio.server import ServerConnection, serve

from bench.baselines.common import POLL_S, PORT, Router, authenticate

ROUTER = Router()


def admit(connection: ServerConnection, request: Request) -> Response | None:
    """Let a good token in."""
    try:
        connection.identity = authenticate(request.headers.get("Authorization", ""))  # type: ignore[attr-defined]  # ours
    except (jwt.InvalidTokenError, ValueError):
        return Response(401, "Unauthorized", Headers(), b"")
    return None


async def handle(connection: ServerConnection) -> None:
    """Route one connection's messages."""
    user_id, company_id = connection.identity  # type: ignore[attr-defined]  # ours
    async for message in connection:
        if isinstance(message, bytes):
            ROUTER.route(message, user_id, company_id)


async def poll() -> None:
    """Read delivery reports."""
    while True:
        ROUTER.producer.poll(0)
        await trio.sleep(POLL_S)


async def main() -> None:
    """Serve until SIGTERM."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await nursery.start(
                partial(serve, handle, PORT, host="127.0.0.1", backlog=4096, compression=None, process_request=admit)
            )
            print("ready", flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()
    ROUTER.finish()


if __name__ == "__main__":
    trio.run(main)
