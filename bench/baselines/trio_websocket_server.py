"""trio-websocket's server."""

from __future__ import annotations

import signal
from functools import partial

import jwt
import trio
from trio_websocket import ConnectionClosed, WebSocketRequest, serve_websocket

from bench.baselines.common import POLL_S, PORT, Router, authenticate

ROUTER = Router()


async def handle(request: WebSocketRequest) -> None:
    """Admit and route one connection."""
    authorization = dict(request.headers).get(b"authorization", b"").decode()
    try:
        user_id, company_id = authenticate(authorization)
    except (jwt.InvalidTokenError, ValueError):
        await request.reject(401)
        return
    connection = await request.accept()
    try:
        while True:
            message = await connection.get_message()
            if isinstance(message, bytes):
                ROUTER.route(message, user_id, company_id)
    except ConnectionClosed:
        return


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
                partial(
                    serve_websocket, handle, "127.0.0.1", PORT, None, message_queue_size=64, max_message_size=65_536
                )
            )
            print("ready", flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()
    ROUTER.finish()


if __name__ == "__main__":
    trio.run(main)
