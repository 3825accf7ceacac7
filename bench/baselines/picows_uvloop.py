"""picows on uvloop: a WebSocket server in Cython, a callback a frame."""

from __future__ import annotations

import asyncio
import signal

import jwt
import picows
import uvloop

from bench.baselines.common import POLL_S, PORT, Router, authenticate

ROUTER = Router()


class Listener(picows.WSListener):
    """One connection."""

    def __init__(self, user_id: str, company_id: str) -> None:
        super().__init__()
        self._user_id = user_id
        self._company_id = company_id

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Route a message, answer a close; picows answers pings."""
        if frame.msg_type == picows.WSMsgType.BINARY:
            ROUTER.route(frame.get_payload_as_bytes(), self._user_id, self._company_id)
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()


def accept(request: picows.WSUpgradeRequest) -> Listener | None:
    """A listener for a good token, None for any other."""
    try:
        return Listener(*authenticate(request.headers.get("Authorization", "")))
    except (jwt.InvalidTokenError, ValueError):
        return None


async def main() -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def poll() -> None:
        ROUTER.producer.poll(0)
        loop.call_later(POLL_S, poll)

    poll()
    server = await picows.ws_create_server(accept, "127.0.0.1", PORT, backlog=4096)
    print("ready", flush=True)
    await stop.wait()
    server.close()
    ROUTER.finish()


if __name__ == "__main__":
    uvloop.run(main())
