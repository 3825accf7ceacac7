"""The WebSocket server with nothing of the router's behind it, in this process: accept, handshake, echo, end."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
import trustme

from gateway.core import catalogue
from gateway.core.admission import AddressRate, Admission
from gateway.core.origins import OriginRules
from gateway.errors import Refused
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.rawclient import frame
from gateway.ws.endpoints import Asked, Endpoint, Endpoints, Granted, PathTemplate
from gateway.ws.heartbeat import Heartbeat
from gateway.ws.listener import Listener
from gateway.ws.readiness import Readiness
from gateway.ws.sockets import open_listening_sockets
from gateway.ws.upgrade import Upgrade, bearer_token
from tests.counted import counted
from tests.echo import LIMITS, Echo

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
GOOD = {
    "Host": "gateway.example",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


class Server:
    """What a test may look at and change."""

    def __init__(self, listener: Listener, admission: Admission, metrics: Metrics) -> None:
        self.listener = listener
        self.admission = admission
        self.metrics = metrics
        self.asked: list[tuple[str, str | None]] = []
        self.handlers: list[Echo] = []
        self.streams: list[trio.SocketStream] = []

    async def connect(self) -> trio.SocketStream:
        """A client's connection, closed at the end at the latest."""
        self.streams.append(await trio.open_tcp_stream("127.0.0.1", self.listener.port))
        return self.streams[-1]

    def outcomes(self, outcome: str) -> float:
        return counted(self.metrics, "gateway_handshakes", outcome=outcome)


@asynccontextmanager
async def serving(
    *,
    tls: ssl.SSLContext | None = None,
    timeout_s: float = 5.0,
    max_connections: int = 10,
    rate: AddressRate | None = None,
    max_pending: int = 0,
) -> AsyncIterator[Server]:
    readiness, metrics = Readiness(), Metrics()
    admission = Admission(max_connections, rate or AddressRate(0, 1))
    admission.open()
    made: list[Server] = []
    quiet = RateLimited(lambda *_, **__: None, trio.current_time)

    def authorise(asked: Asked) -> Granted:
        token, subprotocol = bearer_token(asked, in_query=True)
        made[0].asked.append((token, subprotocol))
        if token == "bad":
            raise Refused(catalogue.INVALID_TOKEN, "bad")
        return Granted(asked.parameters["room"], subprotocol, text=True)

    async def open_echo(granted: Granted) -> Echo:
        made[0].handlers.append(Echo())
        return made[0].handlers[-1]

    endpoint = Endpoint(
        name="echo",
        path=PathTemplate("/echo/{room}"),
        limits=replace(LIMITS, close_timeout_s=0.5),
        origins=OriginRules(frozenset({"https://page.example"})),
        authorise=authorise,
        open=open_echo,
        subprotocols=("one", "two"),
    )
    sockets = open_listening_sockets("listen", "127.0.0.1", 0, backlog=16)
    listener = Listener(
        sockets,
        upgrade=Upgrade(Endpoints([endpoint]), admission),
        readiness=readiness,
        tls_context=tls,
        handshake_timeout_s=timeout_s,
        max_connections=max_connections,
        max_pending_per_address=max_pending,
        metrics=metrics,
        log_refused=quiet,
        log_crash=quiet,
    )
    made.append(Server(listener, admission, metrics))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            nursery.start_soon(listener.run, nursery)
            with trio.fail_after(20):
                yield made[0]
            nursery.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()
        for stream in made[0].streams:
            stream.socket.close()


async def ask(
    server: Server, target: str = "/echo/1?access_token=good", headers: dict[str, str] | None = None
) -> tuple[trio.SocketStream, bytes]:
    """Send a handshake; the stream and the answer's head and body."""
    stream = await server.connect()
    fields = {**GOOD, **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    await stream.send_all(f"GET {target} HTTP/1.1\r\n{head}\r\n".encode())
    return stream, await answer_on(stream)


async def answer_on(stream: trio.abc.ReceiveStream) -> bytes:
    answer = b""
    while b"\r\n\r\n" not in answer or (not answer.startswith(b"HTTP/1.1 101") and not answer.endswith(b"}")):
        data = await stream.receive_some()
        if not data:
            break
        answer += data
    return answer


async def test_handshake_of_the_rfc_is_answered_and_messages_come_back() -> None:
    async with serving() as server:
        stream, answer = await ask(server, headers={"Sec-WebSocket-Protocol": "none, two, one"})
        assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer, "RFC 6455 1.3"
        assert b"\r\nSec-WebSocket-Protocol: two\r\n" in answer
        await stream.send_all(frame(0x1, b"text") + frame(0x2, b"bytes"))
        received = b""
        while len(received) < 13:
            received += await stream.receive_some()
        assert received == b"\x81\x04text\x82\x05bytes"
        await stream.send_all(frame(0x8, b"\x03\xe8"))
        assert await stream.receive_some() == b"\x88\x02\x03\xe8"
        await stream.aclose()
        assert server.asked == [("good", "two")]
        assert server.outcomes("accepted") == 1


async def test_message_behind_the_handshake_is_taken() -> None:
    async with serving() as server:
        stream = await server.connect()
        head = "".join(f"{name}: {value}\r\n" for name, value in GOOD.items())
        await stream.send_all(f"GET /echo/1?access_token=x HTTP/1.1\r\n{head}\r\n".encode() + frame(0x2, b"early"))
        received = b""
        while not received.endswith(b"\x82\x05early"):
            received += await stream.receive_some()
        await stream.aclose()


@pytest.mark.parametrize(
    ("target", "headers", "refusal"),
    [
        ("/elsewhere", {}, catalogue.NOT_FOUND),
        ("/echo", {}, catalogue.NOT_FOUND),
        ("/echo/1", {"Upgrade": ""}, catalogue.UPGRADE_REQUIRED),
        ("/echo/1", {"Sec-WebSocket-Version": "8"}, catalogue.UPGRADE_REQUIRED),
        ("/echo/1", {"Sec-WebSocket-Key": "short"}, catalogue.BAD_KEY),
        ("/echo/1", {"Origin": "https://evil.example"}, catalogue.ORIGIN_NOT_ALLOWED),
        ("/echo/1", {}, catalogue.INVALID_TOKEN),
        ("/echo/1", {"Authorization": "Basic x"}, catalogue.INVALID_TOKEN),
        ("/echo/1?access_token=bad", {}, catalogue.INVALID_TOKEN),
        ("/echo/1?a=%ff", {}, catalogue.BAD_REQUEST),
        ("/echo/1", {"Host": "a b"}, catalogue.BAD_HOST),
        ("/echo/1", {"Content-Length": "3"}, catalogue.BODY_NOT_ALLOWED),
    ],
)
async def test_handshake_that_is_refused_is_answered_with_why(
    target: str, headers: dict[str, str], refusal: catalogue.Refusal
) -> None:
    async with serving() as server:
        stream, answer = await ask(server, target, headers)
        assert answer.startswith(f"HTTP/1.1 {refusal.status} {refusal.phrase}\r\n".encode())
        assert f'"code": "{refusal.code}"'.encode() in answer
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()
        assert server.outcomes(refusal.code) == 1
        assert server.handlers == []


@pytest.mark.parametrize(
    ("headers", "token", "answered"),
    [
        ({"Authorization": "Bearer t"}, "t", None),
        ({"Authorization": "bearer t", "Sec-WebSocket-Protocol": "one"}, "t", "one"),
        ({"Sec-WebSocket-Protocol": "bearer, t"}, "t", "bearer"),
        ({"Sec-WebSocket-Protocol": "one, bearer, t"}, "t", "one"),
        ({"Authorization": "Bearer t", "Sec-WebSocket-Protocol": "bearer, u"}, "t", "bearer"),
    ],
)
async def test_token_is_taken_from_the_first_place_that_has_one(
    headers: dict[str, str], token: str, answered: str | None
) -> None:
    async with serving() as server:
        stream, answer = await ask(server, "/echo/1", headers)
        assert answer.startswith(b"HTTP/1.1 101")
        assert server.asked == [(token, answered)]
        await stream.aclose()


async def test_page_that_is_allowed_and_own_page_may_connect() -> None:
    async with serving() as server:
        for origin in ("https://page.example", "https://gateway.example", "gateway.example"):
            stream, answer = await ask(server, headers={"Origin": origin})
            assert answer.startswith(b"HTTP/1.1 101"), origin
            await stream.aclose()


async def test_request_that_does_not_arrive_in_time_is_refused() -> None:
    async with serving(timeout_s=0.1) as server:
        stream = await server.connect()
        await stream.send_all(b"GET /echo/1 HTTP/1.1\r\nHost: a\r\n")
        assert b'"handshake_timeout"' in await answer_on(stream)
        await stream.aclose()


async def test_attempts_beyond_an_addresses_rate_and_those_pending_are_turned_away() -> None:
    async with serving(rate=AddressRate(0.01, 2), max_pending=2) as server:
        silent = [await server.connect() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked(0.02)
        _, answer = await ask(server)
        assert answer.startswith(b"HTTP/1.1 429 ")
        for stream in silent:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        _, answer = await ask(server)
        assert b"\r\nRetry-After: " in answer, "now it is the rate"
        assert server.outcomes("too_many_attempts") == 2
        assert server.outcomes("disconnected") == 2


async def test_nobody_comes_in_while_admission_is_closed_and_beyond_the_cap_before_a_token_is_read() -> None:
    async with serving(max_connections=1) as server:
        server.admission.close(catalogue.DRAINING)
        _, answer = await ask(server)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"draining"' in answer
        server.admission.open()
        server.admission.enter()
        _, answer = await ask(server)
        assert b'"at_capacity"' in answer
        assert server.asked == []


async def test_tls_is_spoken_and_failed_handshakes_are_counted() -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with serving(tls=context) as server:
        stream = trio.SSLStream(await server.connect(), trusting, server_hostname="localhost", https_compatible=True)
        head = "".join(f"{name}: {value}\r\n" for name, value in GOOD.items())
        await stream.send_all(f"GET /echo/1?access_token=x HTTP/1.1\r\n{head}\r\n".encode())
        assert (await answer_on(stream)).startswith(b"HTTP/1.1 101")
        await stream.send_all(frame(0x2, b"secret"))
        assert await stream.receive_some() == b"\x82\x06secret"
        plain = await server.connect()
        await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            while await plain.receive_some():
                pass
        assert server.outcomes("tls_failed") == 1
        await trio.aclose_forcefully(stream)


async def test_what_waits_in_the_backlog_is_answered_when_the_listener_closes() -> None:
    async with serving() as server, trio.open_nursery() as nursery:
        streams = [await server.connect() for _ in range(3)]
        server.admission.close(catalogue.DRAINING)
        server.listener.close(nursery)
        for stream in streams:
            await stream.send_all(b"GET /echo/1 HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await answer_on(stream)).startswith(b"HTTP/1.1 426 ")
            await stream.aclose()
        await server.listener.wait_answered()
        with pytest.raises(OSError, match="connect"):
            await server.connect()


class Speaker:
    """Somebody with something to say, or nothing but trouble."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.said = 0
        self.crashed: Exception | None = None
        self.connection = self
        self.due = 0.0

    def send_notices(self) -> None:
        if self.error is not None:
            raise self.error
        self.said += 1

    def tick(self, now: float) -> None:
        self.due = now + 10.0
        self.send_notices()

    def crash(self, error: Exception) -> None:
        self.crashed = error


async def test_heartbeat_looks_after_all_and_one_that_raises_ends_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    good, bad = Speaker(), Speaker(ValueError("a bug"))
    sweeps: list[float] = []
    heartbeat = Heartbeat(
        [bad, good],  # type: ignore[list-item]  # as much of a member as is asked
        notices_s=0.2,
        after_sweep=lambda: sweeps.append(trio.current_time()),
    )
    heartbeat.notify(bad)
    heartbeat.notify(good)
    heartbeat.notify(good)
    with trio.move_on_after(0.5):
        await heartbeat.run()
    assert (good.said, bad.crashed) == (1, bad.error)
    bad.crashed = None
    with trio.move_on_after(3.5):
        await heartbeat.run()
    assert (good.said, bad.crashed, len(sweeps)) == (2, bad.error, 3)
