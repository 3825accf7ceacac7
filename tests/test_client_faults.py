"""What clients, proxies and scrapers do that is no attack: served, or told why not, and every figure balances."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trio
import trio.testing
import trio_websocket
import trustme
import websockets.asyncio.client
import websockets.sync.client
from prometheus_client.parser import text_string_to_metric_families
from websockets.protocol import State

from gateway.client import open_client
from gateway.core.books import FEW_COMPANIES, SLICE_COMPANIES
from gateway.errors import ClientError
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient, frame
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.tokens import claims, data_claim, sign

ROOT = Path(__file__).parent.parent
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def wait_for(condition: Callable[[], object], *, timeout_s: float = 20.0, say: Callable[[], object] = str) -> None:
    """Poll until ``condition`` is true; fails the test with what ``say`` returns when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.02)


def lines_of(daemon: Daemon) -> list[dict[str, Any]]:
    """The daemon's JSON log lines; the last one may not be whole yet."""
    found: list[dict[str, Any]] = []
    for line in daemon.log().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def warnings_of(daemon: Daemon) -> list[str]:
    """What was logged at level warning or above."""
    return [line["event"] for line in lines_of(daemon) if line["level"] in ("warning", "error", "critical")]


class Page:
    """One reading of /metrics."""

    def __init__(self, daemon: Daemon) -> None:
        status, text = daemon.get("/metrics")
        assert status == 200
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self._samples)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of ``name`` with these labels; fails the test when the page has no such name."""
        assert self.has(name), f"no {name} on /metrics"
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and all(sample.labels.get(label) == value for label, value in labels.items())
        )

    def bytes_of(self) -> dict[str, float]:
        """Bytes by outcome."""
        return {
            outcome: self.total("gateway_message_bytes_total", outcome=outcome)
            for outcome in ("received", "delivered", "dead_lettered", "dropped", "spooled")
        }

    def messages(self, outcome: str) -> float:
        return self.total("gateway_messages_total", outcome=outcome)


def page_where(daemon: Daemon, condition: Callable[[Page], bool]) -> Page:
    """A page for which ``condition`` holds: the daemon may show one that is a second old."""
    pages = [Page(daemon)]

    def holds() -> bool:
        pages[0] = Page(daemon)
        return condition(pages[0])

    wait_for(holds, say=lambda: daemon.get("/metrics")[1])
    return pages[0]


def tls_files(directory: Path) -> tuple[Path, dict[str, str]]:
    """A private CA's file, and the settings of a server certificate it has issued."""
    ca = trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    ca.cert_pem.write_to_path(directory / "ca.pem")
    issued.private_key_pem.write_to_path(directory / "server.key")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(directory / "server.pem", append=number > 0)
    return directory / "ca.pem", {
        "tls.cert_file": str(directory / "server.pem"),
        "tls.key_file": str(directory / "server.key"),
    }


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].partition("/")[0].rpartition(":")
    return host, int(port)


def tick(user: str, number: int, size: int = 100) -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id=user, company_id="acme", payload=bytes(size), timestamp=number + 1
    ).SerializeToString()


@pytest.fixture
def kafka() -> Iterator[Daemon]:
    """A Kafka in a process that can be stopped."""
    with Daemon(settings={"log.level": "warning"}) as host:
        yield host


# Pings


@pytest.mark.parametrize("count", [25, 300])
def test_pings_that_gathered_while_the_gateway_stood_still_are_no_flood(daemon: Daemon, count: int) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.ping()
        daemon.signal(signal.SIGSTOP)
        try:  # what a client that pings once a second has sent by then
            client.sock.sendall(b"".join(frame(PING, b"%d" % number) for number in range(count)))
        finally:
            daemon.signal(signal.SIGCONT)
        opcode, payload = client.read_frame()
        while (opcode, payload) != (PONG, b"%d" % (count - 1)):
            assert opcode == PONG, (opcode, payload)
            opcode, payload = client.read_frame()
        client.ping()


@pytest.mark.parametrize("opcode", [PING, PONG])
def test_many_control_frames_in_one_piece_are_no_flood(daemon: Daemon, opcode: int) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        for _ in range(3):  # a network that stood still may do so again
            client.sock.sendall(frame(opcode, b"x") * 100)
            client.ping()


def test_a_second_of_hasty_pings_is_no_flood(daemon: Daemon) -> None:
    """More than 20 in one second, far less than 20 a second over ten."""
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        for _ in range(50):
            client.ping()


def test_floods_of_control_frames_are_closed_with_1008(daemon: Daemon) -> None:
    """Hundreds a second, over many reads, for as long as it takes: pings, pongs, pings behind messages."""
    message = frame(BINARY, tick("alice", 0))
    floods = (frame(PING, b"x"), frame(PONG, b"x"), message + frame(PING, b"x"))
    with RawClient(daemon.url) as pings, RawClient(daemon.url) as pongs, RawClient(daemon.url) as mixed:
        clients = dict(zip((pings, pongs, mixed), floods, strict=True))
        for client in clients:
            client.upgrade(daemon.token())
        deadline = time.monotonic() + 45  # ten seconds of reading, on a machine that may be slow
        ended: set[RawClient] = set()
        while len(ended) < len(clients):
            assert time.monotonic() < deadline, f"{len(ended)} of {len(clients)} floods were closed"
            for client, flood in clients.items():
                if client in ended:
                    continue
                try:
                    client.sock.sendall(flood)
                    if select.select([client.sock], [], [], 0)[0]:
                        data = client.sock.recv(65536)
                        client.buffer += data
                        if not data:
                            ended.add(client)
                except ConnectionError:
                    ended.add(client)
            time.sleep(0.002)
        for client in clients:
            assert client.read_close()[0] == 1008


# While Kafka is away


async def hold(
    daemon: Daemon, kafka: Daemon, tls: ssl.SSLContext | None, sync: websockets.sync.client.ClientConnection, count: int
) -> list[str]:
    """Library clients through an outage; the names of those that lost their connection."""
    wake = partial(kafka.signal, signal.SIGCONT)

    def token(user: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {daemon.token(user)}"}

    def connect(user: str) -> websockets.asyncio.client.connect:
        return websockets.asyncio.client.connect(
            daemon.url, additional_headers=token(user), ssl=tls, ping_interval=1, ping_timeout=5, close_timeout=10
        )

    async with (
        connect("asyncio") as sender,
        connect("idle") as idle,
        aiohttp.ClientSession() as session,
        session.ws_connect(daemon.url, headers=token("aiohttp"), ssl=tls or True, heartbeat=5) as other,
    ):

        async def read_pongs() -> None:
            async for _ in other:
                pass

        reader = asyncio.create_task(read_pongs())
        kafka.signal(signal.SIGSTOP)
        try:
            for number in range(count):
                await sender.send(tick("asyncio", number))
                await other.send_bytes(tick("aiohttp", number))
                await asyncio.to_thread(sync.send, tick("sync", number))
            deadline = asyncio.get_running_loop().time() + 20
            while "producer_queue_full" not in (await asyncio.to_thread(daemon.get, "/health/ready"))[1]:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.05)
            lost: list[str] = []
            until = asyncio.get_running_loop().time() + 9
            while not lost and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.1)
                states = {"asyncio": sender.state, "idle": idle.state, "sync": sync.state}
                lost = [name for name, state in states.items() if state is not State.OPEN]
                lost += ["aiohttp"] if other.closed else []
        finally:
            wake()
            reader.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await reader
    await asyncio.sleep(0.25)  # aiohttp's documentation, "Graceful Shutdown": TLS transports close after the session
    return lost


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_library_clients_keep_their_connection_while_kafka_is_away(
    start_daemon: Callable[..., Daemon], kafka: Daemon, tmp_path: Path, scheme: str
) -> None:
    count = 400
    ca, files = tls_files(tmp_path)
    daemon = start_daemon(
        kafka.kafka, settings={"kafka.max_queued_messages": 200, **(files if scheme == "wss" else {})}
    )
    tls = ssl.create_default_context(cafile=ca) if scheme == "wss" else None
    with (
        Records(kafka.kafka, "tick-data") as records,
        websockets.sync.client.connect(
            daemon.url,
            ssl=tls,
            additional_headers={"Authorization": f"Bearer {daemon.token('sync')}"},
            ping_interval=1,
            ping_timeout=5,
        ) as sync,
    ):
        assert asyncio.run(hold(daemon, kafka, tls, sync, count)) == [], "lost their connection in the outage"
        found: dict[str, list[int]] = {}
        for record in records.take(3 * count, timeout_s=60):
            envelope = MessageEnvelope.FromString(record.value() or b"")
            found.setdefault(envelope.user_id, []).append(envelope.timestamp - 1)
        assert records.nothing_more(key="sync")
    assert found == {user: list(range(count)) for user in ("asyncio", "aiohttp", "sync")}
    books = daemon.settled_books()
    assert (books["received"], books["delivered"], books["imbalance"]) == (3 * count, 3 * count, 0)


def test_the_quiet_are_answered_while_kafka_is_away(start_daemon: Callable[..., Daemon], kafka: Daemon) -> None:
    daemon = start_daemon(kafka.kafka, settings={"kafka.max_queued_messages": 50})
    with RawClient(daemon.url) as loud, RawClient(daemon.url) as quiet, RawClient(daemon.url) as leaving:
        for client in (loud, quiet, leaving):
            client.upgrade(daemon.token("loud"))
            client.sock.settimeout(5)
        kafka.signal(signal.SIGSTOP)
        try:
            # a ping behind more data than the queue has room for: what a library's keepalive sends
            loud.sock.sendall(b"".join(frame(BINARY, tick("loud", number)) for number in range(300)))
            wait_for(lambda: "producer_queue_full" in daemon.get("/health/ready")[1])
            quiet.ping()
            loud.ping()
            assert leaving.close()[0] == 1000
            assert daemon.books()["delivered"] == 0
        finally:
            kafka.signal(signal.SIGCONT)
        loud.sock.settimeout(15)
        loud.ping()
    wait_for(lambda: daemon.books()["delivered"] == 300, say=daemon.books)
    assert daemon.books()["imbalance"] == 0


class Flooder:
    """Sends numbered messages as fast as they are taken, and knows what of the last one has been taken."""

    def __init__(self, client: RawClient, user: str) -> None:
        self.client, self.user = client, user
        self.taken_bytes = self.messages = 0
        self._rest = b""

    def push(self) -> int:
        """Send until nothing is taken, or a megabyte was; the bytes that were."""
        self.client.sock.setblocking(False)
        taken = 0
        with suppress(BlockingIOError):
            while taken < 1 << 20:
                if not self._rest:
                    self._rest = frame(BINARY, tick(self.user, self.messages, 8000))
                    self.messages += 1
                sent = self.client.sock.send(self._rest)
                self._rest = self._rest[sent:]
                taken += sent
        self.taken_bytes += taken
        return taken

    def finish(self) -> None:
        """Send the rest of the last message."""
        self.client.sock.settimeout(60)
        self.client.sock.sendall(self._rest)


def test_floods_of_messages_meet_back_pressure_while_kafka_is_away_and_arrive_afterwards(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={"kafka.max_queued_messages": 100, "session.ack_interval_ms": 50})
    users = ["flood-0", "flood-1"]
    with ExitStack() as stack:
        records = stack.enter_context(Records(kafka.kafka, "tick-data"))
        flooders = [Flooder(stack.enter_context(RawClient(daemon.url)), user) for user in users]
        for flooder in flooders:
            flooder.client.upgrade(daemon.token(flooder.user), protocols="gateway.v1.json")
        before = daemon.rss_bytes()
        kafka.signal(signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 30
            quiet_since = time.monotonic()
            while time.monotonic() - quiet_since < 2:
                assert time.monotonic() < deadline, "bytes are still taken"
                # the kernel may hold some 35 MiB for each
                assert sum(flooder.taken_bytes for flooder in flooders) < 160 << 20
                if sum(flooder.push() for flooder in flooders):
                    quiet_since = time.monotonic()
                else:
                    time.sleep(0.02)
            assert daemon.rss_bytes() - before < 64 << 20
            assert daemon.get("/health/live")[0] == 200
            assert daemon.books()["delivered"] == 0
        finally:
            kafka.signal(signal.SIGCONT)
        for flooder in flooders:
            flooder.finish()
        for flooder in flooders:
            while flooder.client.read_control("ack")["count"] < flooder.messages:
                pass
        found: dict[str, list[int]] = {}
        for record in records.take(sum(flooder.messages for flooder in flooders), timeout_s=60):
            envelope = MessageEnvelope.FromString(record.value() or b"")
            found.setdefault(envelope.user_id, []).append(envelope.timestamp - 1)
        assert records.nothing_more(key=users[0])
        assert found == {flooder.user: list(range(flooder.messages)) for flooder in flooders}


# Requests and origins


def request_of(daemon: Daemon, target: str = "/ws/mt5", line: str = "", **changes: str) -> bytes:
    headers = {
        "Host": "gw.example",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        "Authorization": f"Bearer {daemon.token()}",
        **changes,
    }
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{line or f'GET {target} HTTP/1.1'}\r\n{text}\r\n".encode()


def status_of(daemon: Daemon, request: bytes) -> int:
    with RawClient(daemon.url) as client:
        return client.raw_request(request).status


SERVED: dict[str, tuple[str, dict[str, str]]] = {
    "trailing dot in Host": ("/ws/mt5", {"Host": "gw.example."}),
    "trailing dot and port in Host": ("/ws/mt5", {"Host": "gw.example.:8001", "Origin": "https://gw.example:8001"}),
    "trailing dot in Host only": ("/ws/mt5", {"Host": "gw.example.", "Origin": "https://gw.example"}),
    "trailing dot in Origin only": ("/ws/mt5", {"Origin": "https://gw.example."}),
    "trailing slash": ("/ws/mt5/", {}),
    "trailing slash and query": ("/ws/mt5/?account=5012345", {}),
    "trailing slash in an absolute target": ("wss://gw.example:8001/ws/mt5/", {}),
    "trailing slash in a path in Host": ("/", {"Host": "gw.example:8001/ws/mt5/"}),
    "default port in Origin": ("/ws/mt5", {"Origin": "https://gw.example:443"}),
    "default port in Host": ("/ws/mt5", {"Host": "gw.example:443", "Origin": "https://gw.example"}),
    "default port of http in Origin": ("/ws/mt5", {"Host": "gw.example:80", "Origin": "http://gw.example"}),
    "default port in Origin only": ("/ws/mt5", {"Host": "gw.example:8001", "Origin": "http://gw.example:80"}),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_proxies_and_browsers_write_otherwise_is_served(daemon: Daemon, name: str) -> None:
    target, changes = SERVED[name]
    assert status_of(daemon, request_of(daemon, target, **changes)) == 101


def test_empty_lines_before_the_request_are_skipped(daemon: Daemon) -> None:
    """RFC 9112 2.2: a client may have sent one behind an earlier request."""
    request = request_of(daemon)
    assert status_of(daemon, b"\r\n" + request) == 101
    with RawClient(daemon.url) as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"\r", b"\n", request[:7], request[7:]):
            client.sock.sendall(piece)
            time.sleep(0.02)  # pieces of their own, most likely
        assert client.read_response().status == 101
    with RawClient(daemon.url) as client:  # the limit of a head holds for what comes before it too
        assert client.raw_request(b"\r\n" * 20_000).status in (400, 431)
        client.expect_end()


def test_allowed_origins_match_with_the_default_port_spelled_out(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        settings={
            "listen.allowed_origins": ["https://desk.example", "http://plain.example", "https://named.example:443"]
        }
    )
    for origin, status in (
        ("https://desk.example:443", 101),
        ("http://plain.example:80", 101),
        ("https://named.example", 101),
        ("https://desk.example:80", 403),
        ("https://desk.example:8443", 403),
        ("http://desk.example:443", 403),
        ("http://named.example", 403),
    ):
        assert status_of(daemon, request_of(daemon, Origin=origin)) == status, origin


def test_refused_origin_is_logged_with_the_host_it_was_compared_with(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    for origin, host in (
        ("https://gw.example", "upstream.internal:9000"),  # nginx writes the upstream's name
        ("https://desk.example:8443", "127.0.0.1"),
    ):
        assert status_of(daemon, request_of(daemon, Host=host, Origin=origin)) == 403

        def said(origin: str = origin, host: str = host) -> bool:
            return any(
                origin in (line := json.dumps(fields)) and host in line.replace("127.0.0.1", "", 1)
                for fields in lines_of(daemon)
                if fields.get("code") == "origin_not_allowed"
            )

        wait_for(said, timeout_s=5, say=daemon.log)


def test_public_origin_passes_whatever_host_a_proxy_wrote(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.public_origin": "https://gw.example"})
    for host in ("gw.example", "upstream.internal:9000", "10.0.0.7"):
        for origin, status in (
            ("https://gw.example", 101),
            ("https://gw.example:443", 101),
            ("https://evil.example", 403),
            ("https://gw.example.evil.example", 403),
            ("https://gw.example:8443", 403 if host != "gw.example" else None),
            ("null", 403),
        ):
            if status is not None:
                assert status_of(daemon, request_of(daemon, Host=host, Origin=origin)) == status, (host, origin)
        assert status_of(daemon, request_of(daemon, Host=host)) == 101


@pytest.mark.parametrize("value", ["nonsense", "https://gw.example/path", "ftp://gw.example", "https://gw.example:x"])
def test_public_origin_that_can_never_match_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "secret").write_text("s" * 40)
    toml = tmp_path / "gateway.toml"
    toml.write_text(f'[auth]\nsecret_file = "secret"\n[listen]\npublic_origin = "{value}"\n')
    command = [sys.executable, "-m", "gateway", "check-config", str(toml)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    assert "listen.public_origin" in done.stderr
    assert "is not a setting" not in done.stderr
    assert "Traceback" not in done.stderr


REFUSED_TARGETS = [
    "ws://127.0.0.1:x/ws/mt5",
    "ws://127.0.0.1:99999/ws/mt5",
    "ws://127.0.0.1:-1/ws/mt5",
    "ws://127.0.0.1:80:80/ws/mt5",
    "ws://:8001/ws/mt5",
    "ws://user:secret@127.0.0.1/ws/mt5",
    "ws://[::1/ws/mt5",
]


@pytest.mark.parametrize("target", REFUSED_TARGETS)
def test_target_that_is_no_url_is_refused(daemon: Daemon, target: str) -> None:
    assert status_of(daemon, request_of(daemon, target)) == 400


@pytest.mark.parametrize(
    "origin",
    [
        "file://gw.example",
        "ftp://gw.example",
        "chrome-extension://gw.example",
        "//gw.example",
        "https://gw.example?",
        "https://gw.example#",
        "https://gw.example/",
    ],
)
def test_origin_that_no_page_of_this_host_has_is_refused(daemon: Daemon, origin: str) -> None:
    assert status_of(daemon, request_of(daemon, Origin=origin)) == 403


@pytest.mark.parametrize("method", ["get", "Get", "post", "oPTIONS"])
def test_method_in_lower_case_is_another_method(daemon: Daemon, method: str) -> None:
    with RawClient(daemon.url) as client:
        answer = client.raw_request(request_of(daemon, line=f"{method} /ws/mt5 HTTP/1.1"))
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "GET"


# Tokens

Make = Callable[[bytes], str]


def encoded(encoding: str) -> Make:
    return lambda secret: sign(secret, json.dumps(claims()).encode(encoding))


def header(**fields: Any) -> Make:
    return lambda secret: sign(secret, claims(), {"alg": "HS256", "typ": "JWT", **fields})


def repeated(name: str, value: Any) -> Make:
    """Good claims behind another value of one of them."""
    return lambda secret: sign(secret, (json.dumps({name: value})[:-1] + ", " + json.dumps(claims())[1:]).encode())


BAD_TOKENS: dict[str, Make] = {
    "b64 false": header(b64=False),
    "b64 true": header(b64=True),
    "no iat": lambda secret: sign(secret, claims(iat=None)),
    "iat null": lambda secret: sign(secret, json.dumps({**claims(), "iat": None}).encode()),
    "sub twice": repeated("sub", "mallory"),
    "sub twice alike": repeated("sub", "alice"),
    "exp twice": repeated("exp", 1),
    "iss twice": repeated("iss", "somebody"),
    "data twice": repeated("data", data_claim("mallory")),
    "claims in UTF-16": encoded("utf-16"),
    "claims in UTF-16 without a mark": encoded("utf-16-le"),
    "claims in UTF-32": encoded("utf-32"),
    "claims behind a byte order mark": encoded("utf-8-sig"),
    "header in UTF-16": lambda secret: sign(secret, claims(), '{"alg":"HS256"}'.encode("utf-16")),
    "header behind a byte order mark": lambda secret: sign(secret, claims(), '{"alg":"HS256"}'.encode("utf-8-sig")),
    "claims with NaN": lambda secret: sign(secret, json.dumps({**claims(), "x": float("nan")}).encode()),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_token_that_another_reader_would_read_otherwise_is_refused(daemon: Daemon, name: str) -> None:
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(BAD_TOKENS[name](daemon.secret)))
        assert answer.status == 401
        assert answer.code == "invalid_token"
    with RawClient(daemon.url) as client:
        client.upgrade(sign(daemon.secret, claims()))


# TLS handshakes


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with TLS whose CA nobody knows, at the default log level."""
    _, files = tls_files(tmp_path_factory.mktemp("tls"))
    with Daemon(settings={**files, "listen.handshake_timeout_s": 1}) as running:
        yield running


def connection_to(url: str, source: str) -> socket.socket:
    return socket.create_connection(address_of(url), timeout=10, source_address=(source, 0))


def distrust(version: ssl.TLSVersion) -> Callable[[socket.socket], None]:
    def shake(sock: socket.socket) -> None:
        context = ssl.create_default_context()
        context.minimum_version = context.maximum_version = version
        with pytest.raises(ssl.SSLError), context.wrap_socket(sock, server_hostname="localhost"):
            pass

    return shake


def speak(data: bytes) -> Callable[[socket.socket], None]:
    def shake(sock: socket.socket) -> None:
        with suppress(OSError):
            sock.sendall(data)
            while sock.recv(4096):
                pass

    return shake


TLS_FAILURES: dict[str, tuple[str, Callable[[socket.socket], None], str]] = {
    "CA not trusted, TLS 1.3": ("127.0.0.11", distrust(ssl.TLSVersion.TLSv1_3), r"unknown.ca"),
    "CA not trusted, TLS 1.2": ("127.0.0.12", distrust(ssl.TLSVersion.TLSv1_2), r"unknown.ca"),
    "plain HTTP": ("127.0.0.13", speak(b"GET /ws/mt5 HTTP/1.1\r\nHost: localhost\r\n\r\n"), r"http.request"),
    "no TLS at all": ("127.0.0.14", speak(b"\x00" * 64), r"version|record|packet|unexpected"),
    "silence": ("127.0.0.15", speak(b""), r"time.?out|timed.out|in time"),
}


@pytest.mark.parametrize("name", TLS_FAILURES)
def test_failed_tls_handshake_is_logged_with_address_and_reason(secured: Daemon, name: str) -> None:
    source, shake, reason = TLS_FAILURES[name]

    def said() -> bool:
        with connection_to(secured.url, source) as sock:  # again each time: lines are limited in their rate
            shake(sock)
        return any(
            source in (text := json.dumps(line))
            and re.search(reason, text, re.IGNORECASE) is not None
            and line["level"] in ("info", "warning")
            for line in lines_of(secured)
        )

    wait_for(said, timeout_s=6, say=secured.log)


def test_lines_about_failed_tls_handshakes_are_limited(secured: Daemon) -> None:
    source = "127.0.0.20"

    def failed() -> float:
        return Page(secured).total("gateway_handshakes_total", outcome="tls_failed")

    before = failed()
    for _ in range(60):
        with connection_to(secured.url, source) as sock:
            speak(b"GET / HTTP/1.1\r\n\r\n")(sock)
    wait_for(lambda: failed() >= before + 60, say=failed)
    wait_for(lambda: any(source in json.dumps(line) for line in lines_of(secured)), timeout_s=5, say=secured.log)
    assert sum(source in json.dumps(line) for line in lines_of(secured)) < 45
    assert "Traceback" not in secured.log()


def test_sockets_beyond_the_overflow_leave_a_line(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.max_connections": 1})
    source = "127.0.0.21"
    with ExitStack() as stack:
        for _ in range(256 + 64):  # those beyond the connections allowed that are still heard, and some more
            stack.enter_context(connection_to(daemon.url, source))
        page_where(daemon, lambda page: page.total("gateway_handshakes_total", outcome="overflow") > 0)
        wait_for(lambda: any(source in json.dumps(line) for line in lines_of(daemon)), timeout_s=5, say=daemon.log)
    assert len([line for line in lines_of(daemon) if source in json.dumps(line)]) < 60


# The rate of an address

RATE = {"listen.handshakes_per_address_per_s": 0.01, "listen.handshakes_per_address_burst": 2}


def orderly_end(sock: socket.socket) -> bytes:
    """What is left until the end of file; a reset fails the test, for it may take away an answer not yet read."""
    rest = b""
    while data := sock.recv(65536):
        rest += data
    return rest


def test_address_over_its_rate_gets_a_429_it_can_read_whenever_it_sends_its_request(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon(settings=RATE)
    request = request_of(daemon, **{f"X-{number}": "a" * 4000 for number in range(3)})
    for _ in range(2):
        assert status_of(daemon, request) == 101
    for _ in range(5):
        with RawClient(daemon.url) as waiting:  # asked at accept: there is no need to hear the request
            answer = waiting.read_response()
            assert (answer.status, answer.code) == (429, "too_many_attempts")
            assert 50 <= int(answer.headers["retry-after"]) <= 101
            assert answer.headers["content-type"] == "application/json"
        daemon.signal(signal.SIGSTOP)
        try:
            sent = RawClient(daemon.url)
            sent.sock.sendall(request)  # the system has it all before the gateway sees the connection
        finally:
            daemon.signal(signal.SIGCONT)
        with sent:
            answer = sent.read_response()
            assert (answer.status, answer.code) == (429, "too_many_attempts")
            assert orderly_end(sent.sock) == b""
    with RawClient(daemon.url, source="127.0.0.2") as other:
        other.upgrade(daemon.token())


def test_attempts_that_fail_early_count_too(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings=RATE)
    assert status_of(daemon, request_of(daemon, "/nope")) == 404
    assert status_of(daemon, b"nonsense\r\n\r\n") == 400
    assert status_of(daemon, request_of(daemon)) == 429


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def answer_to_hello(daemon: Daemon, source: str) -> bytes:
    """The first bytes that come back for a ClientHello, none when the connection is ended."""
    with connection_to(daemon.url, source) as sock, suppress(ConnectionError):
        sock.sendall(client_hello())
        return sock.recv(4096)
    return b""


@pytest.mark.parametrize("cause", ["rate", "rate, used up by handshakes that failed", "pending"])
def test_address_over_its_rate_costs_no_cryptography(
    start_daemon: Callable[..., Daemon], tmp_path: Path, cause: str
) -> None:
    ca, files = tls_files(tmp_path)
    limits: dict[str, Any] = {"listen.max_pending_per_address": 2} if cause == "pending" else RATE
    daemon = start_daemon(settings={**files, **limits})
    tls = ssl.create_default_context(cafile=ca)
    with ExitStack() as stack:
        for _ in range(2):
            if cause == "rate":
                with RawClient(daemon.url, tls=tls) as client:
                    client.upgrade(daemon.token())
            elif cause == "pending":
                stack.enter_context(connection_to(daemon.url, "127.0.0.1"))
            else:
                with connection_to(daemon.url, "127.0.0.1") as sock:
                    speak(b"\x00" * 64)(sock)
        assert answer_to_hello(daemon, "127.0.0.1") == b""
        assert answer_to_hello(daemon, "127.0.0.2")[:1] == b"\x16", "another address gets its ServerHello"
        page_where(daemon, lambda page: page.total("gateway_handshakes_total", outcome="too_many_attempts") == 1)
        wait_for(
            lambda: any(
                "127.0.0.1" in (text := json.dumps(line)) and "too_many_attempts" in text for line in lines_of(daemon)
            ),
            timeout_s=5,
            say=daemon.log,
        )


def attempts_of_a_network() -> None:
    """Run in a network namespace of its own: statuses by source address, in order, as JSON."""
    sources = ["fd00:1::1", "fd00:1::2", "fd00:1::3", "fd00:2::1", "127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.2"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # the resolver takes IPv4 for absent where there is nothing but 127.0.0.0/8 (getaddrinfo(3), AI_ADDRCONFIG)
    subprocess.run(["ip", "addr", "add", "10.99.0.1/32", "dev", "lo"], check=True)
    for address in sources[:4]:
        subprocess.run(["ip", "-6", "addr", "add", f"{address}/64", "dev", "lo", "nodad"], check=True)
    statuses: list[int] = []
    with Daemon(settings={**RATE, "listen.host": "::"}) as daemon:
        for source in sources:
            host = f"[{source}]" if ":" in source else source
            with RawClient(daemon.url.replace("[::]", host), source=source) as client:
                statuses.append(client.request(client.headers(daemon.token(), Host="gw.example")).status)
    print(json.dumps(statuses))


def test_one_ipv6_network_is_one_address_and_ipv4_addresses_are_not() -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None or not Path("/proc/net/if_inet6").exists():
        pytest.skip("unshare, ip and IPv6 are needed")
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be had here")
    code = "from tests.test_client_faults import attempts_of_a_network as run; run()"
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses[:4] == [101, 101, 429, 101], "three of one /64, and one of another"
    assert statuses[4:] == [101, 101, 429, 101], "IPv4 addresses on a socket for both families count one by one"


# What SIGHUP changes


def reload(daemon: Daemon, **settings: Any) -> dict[str, Any]:
    """Change settings and send SIGHUP; the fields of the line that says so."""

    def reloads() -> list[dict[str, Any]]:
        return [line for line in lines_of(daemon) if line["event"].startswith("reload")]

    before = len(reloads())
    daemon.reconfigure(**settings)
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(reloads()) > before, say=daemon.log)
    return reloads()[-1]


def expired(daemon: Daemon, ago_s: int) -> str:
    now = int(time.time())
    return sign(daemon.secret, claims(iat=now - 3600, exp=now - ago_s))


def test_leeway_of_a_reload_holds_for_newcomers_and_for_those_who_are_there(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon(settings={"auth.leeway_s": 0, "session.ping_interval_s": 1, "session.idle_timeout_s": 30})

    def stays(client: RawClient, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            client.ping()  # a close would be a frame of another kind, and the end of the connection
            time.sleep(0.2)

    with RawClient(daemon.url) as early, RawClient(daemon.url) as late:
        assert late.request(late.headers(expired(daemon, 60))).status == 401
        early.upgrade(daemon.token(ttl_s=4))
        assert reload(daemon, auth__leeway_s=120)["event"] == "reloaded"
        with RawClient(daemon.url) as fresh:
            fresh.upgrade(expired(daemon, 60))
            stays(fresh, 1.0)
            with RawClient(daemon.url) as beyond:
                assert beyond.request(beyond.headers(expired(daemon, 180))).status == 401
            stays(early, 4.0)  # beyond its expiry, within the new leeway
            assert reload(daemon, auth__leeway_s=0)["event"] == "reloaded"
            assert fresh.read_close()[0] == 4401
            assert early.read_close()[0] == 4401


@pytest.mark.parametrize(
    ("setting", "value", "names"),
    [
        ("log__format", "console", ["log.format", "format"]),
        ("listen__allowed_origins", ["https://new.example"], ["listen"]),
        ("session__ack_interval_ms", 999, ["session"]),
        ("spool__max_bytes", 1_000_000, ["spool"]),
    ],
)
def test_what_a_reload_does_not_take_is_named(
    start_daemon: Callable[..., Daemon], setting: str, value: Any, names: list[str]
) -> None:
    daemon = start_daemon()
    line = reload(daemon, **{setting: value})
    if setting == "listen__allowed_origins" and status_of(daemon, request_of(daemon, Origin=value[0])) == 101:
        return  # taken: nothing to name
    assert line["event"] == "reloaded"
    assert any(name in json.dumps(line) for name in names), line


# The Python client against a server that is not ours

WELCOME = {
    "type": "welcome",
    "connection": "c",
    "user_id": "u",
    "company_id": "acme",
    "tier": "pro",
    "token_expires_at": 4_000_000_000,
    "limits": {"messages_per_second": 0, "burst": 0, "max_message_bytes": 65536},
    "ping_interval_s": 20,
    "ack_interval_ms": 50,
}


class OddServer:
    """Greets as a gateway does and acks what it gets; on its first connection it says and does ``oddities`` first."""

    def __init__(
        self, *, welcome: str = json.dumps(WELCOME), says: str | None = None, closes: int | None = None
    ) -> None:
        self.connections = 0
        self._welcome, self._says, self._closes = welcome, says, closes

    async def __call__(self, request: trio_websocket.WebSocketRequest) -> None:
        self.connections += 1
        first = self.connections == 1
        with suppress(trio_websocket.ConnectionClosed):
            connection = await request.accept(subprotocol="gateway.v1.json")
            await connection.send_message(self._welcome if first else json.dumps(WELCOME))
            if first and self._says is not None:
                await connection.send_message(self._says)
            if first and self._closes is not None:
                await connection.aclose(self._closes, "as told")
                return
            count = 0
            while True:
                await connection.get_message()
                count += 1
                await connection.send_message(json.dumps({"type": "ack", "count": count}))


async def acked_by(server: OddServer) -> int | None:
    """How many of two messages, sent one after the other, are acked; None for an error that the caller can catch."""
    acked: int | None = None
    async with trio.open_nursery() as nursery:
        listening: trio_websocket.WebSocketServer = await nursery.start(
            partial(trio_websocket.serve_websocket, server, "127.0.0.1", 0, ssl_context=None)
        )
        with trio.fail_after(20), suppress(ClientError):
            async with open_client(f"ws://127.0.0.1:{listening.port}/ws/mt5", "token") as client:
                for payload in (b"one", b"two"):
                    await client.send("tick_data", payload)
                    await client.flush()
            acked = client.acked
        nursery.cancel_scope.cancel()
    return acked


ODD_MESSAGES = {
    "no type": "{}",
    "no map": "[]",
    "a number": "7",
    "no JSON": "nonsense",
    "type of another kind": '{"type": ["ack"]}',
    "ack without count": '{"type": "ack"}',
    "ack with text": '{"type": "ack", "count": "one"}',
    "ack below zero": '{"type": "ack", "count": -5}',
    "ack of more than was sent": '{"type": "ack", "count": 1000000}',
    "rejected without count": '{"type": "rejected"}',
    "unknown type": '{"type": "horoscope"}',
}


@pytest.mark.parametrize("name", ODD_MESSAGES)
async def test_malformed_control_message_is_no_crash_of_the_client(name: str) -> None:
    assert await acked_by(OddServer(says=ODD_MESSAGES[name])) in (2, None)


@pytest.mark.parametrize("welcome", ["{}", "null", '{"type": "welcome"}', "nonsense"])
async def test_malformed_welcome_is_no_crash_of_the_client(welcome: str) -> None:
    assert await acked_by(OddServer(welcome=welcome)) in (2, None)


async def test_closing_notice_without_a_delay_is_no_crash_of_the_client() -> None:
    assert await acked_by(OddServer(says='{"type": "closing", "code": 1012}', closes=1012)) in (2, None)


async def test_client_closed_with_1008_comes_back() -> None:
    """As the contract says: after the Retry-After of the next handshake."""
    server = OddServer(closes=1008)
    assert await acked_by(server) == 2
    assert server.connections == 2


async def test_sending_and_flushing_let_others_run_and_can_be_cancelled(daemon: Daemon) -> None:
    async with open_client(daemon.url, daemon.token("polite")) as client:
        with trio.testing.assert_checkpoints():
            await client.send("tick_data", b"one")
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.send("tick_data", b"two")
        assert scope.cancelled_caught
        await client.flush()
        with trio.testing.assert_checkpoints():
            await client.flush()
        assert client.acked == 1, "cancelled, nothing is kept"


# `gateway spool inspect` beside a daemon that starts

HOOK = """
import fcntl, os, sys, time

home = os.environ["FLOCK_TEST"]
flock = fcntl.flock

def wait_for(name):
    deadline = time.monotonic() + 20
    while not os.path.exists(os.path.join(home, name)) and time.monotonic() < deadline:
        time.sleep(0.005)

def say(name):
    open(os.path.join(home, name), "w").close()

def slow(fd, operation):
    if operation & fcntl.LOCK_UN:
        return flock(fd, operation)
    if "inspect" in sys.argv:
        wait_for("starting")
        flock(fd, operation)
        say("inspecting")
        time.sleep(0.5)
    else:
        say("starting")
        wait_for("inspecting")
        flock(fd, operation)

fcntl.flock = slow
"""


def test_inspecting_a_spool_does_not_stop_a_daemon_from_starting(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """A slow machine is played: whoever inspects is held up at its lock just when the daemon wants its own."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path / "hook"), os.environ.get("PYTHONPATH")))),
        "FLOCK_TEST": str(tmp_path),
    }
    (tmp_path / "spool").mkdir(mode=0o700)
    (tmp_path / "spool" / "lock").touch(mode=0o600)
    inspecting = subprocess.Popen(
        [sys.executable, "-m", "gateway", "spool", "inspect", str(tmp_path / "spool")],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )

    def release() -> None:
        inspecting.wait()
        (tmp_path / "inspecting").touch()  # where nothing is locked, nothing is waited for

    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        daemon = start_daemon(settings={"spool.directory": str(tmp_path / "spool")}, environment=environment)
        assert daemon.get("/health/ready")[0] == 200
    finally:
        inspecting.terminate()
        releasing.join()


# Figures


def mixed_messages(client: RawClient) -> int:
    """35 messages of every kind: whole, to be stamped, to be traced, of nobody's type, no envelopes."""
    whole = MessageEnvelope(message_type="tick_data", user_id="alice", company_id="acme", payload=b"whole")
    stamped = MessageEnvelope(message_type="user_event", payload=b"stamped")
    traced = MessageEnvelope(message_type="tick_data", user_id="alice", enable_tracing=True)
    unknown = MessageEnvelope(message_type="horoscope", payload=b"unknown")
    for _ in range(7):
        for message in (whole, stamped, traced, unknown):
            client.send_binary(message.SerializeToString())
        client.send_binary(b"\xff\xff\xff")
    return 35


def unplaced_bytes(page: Page) -> float:
    placed = page.bytes_of()
    return placed.pop("received") - sum(placed.values())


def test_bytes_balance_when_messages_are_stamped(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("alice"))
        count = mixed_messages(client)
    page = page_where(
        daemon,
        lambda page: page.messages("received") == count and page.total("gateway_messages_in_flight") == 0,
    )
    assert page.messages("dead_lettered") == 14
    assert unplaced_bytes(page) == 0, page.bytes_of()
    assert page.total("gateway_books_imbalance_bytes") == 0
    assert page.total("gateway_message_bytes_in_flight") == 0


def test_bytes_balance_while_kafka_is_away_and_through_the_spool(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={"drain.flush_timeout_s": 1})

    def balanced(page: Page) -> None:
        assert unplaced_bytes(page) == page.total("gateway_message_bytes_in_flight"), page.bytes_of()
        assert page.total("gateway_books_imbalance_bytes") == 0

    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("alice"))
        kafka.signal(signal.SIGSTOP)
        try:
            count = mixed_messages(client)
            page = page_where(daemon, lambda page: page.messages("received") == count)
            assert page.total("gateway_messages_in_flight") == count
            balanced(page)
            assert unplaced_bytes(page) > 0
            client.sock.close()
            assert daemon.stop() == 0
        finally:
            kafka.signal(signal.SIGCONT)
    daemon.start()
    page = page_where(
        daemon,
        lambda page: page.messages("received") == count and page.total("gateway_messages_in_flight") == 0,
    )
    assert page.messages("delivered") + page.messages("dead_lettered") == count
    balanced(page)


def test_dead_letters_of_the_page_are_those_of_the_books(start_daemon: Callable[..., Daemon], kafka: Daemon) -> None:
    daemon = start_daemon(kafka.kafka)

    def dead_letters(page: Page) -> tuple[float, float]:
        return page.total("gateway_dead_letters_total"), page.messages("dead_lettered")

    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("alice"))
        kafka.signal(signal.SIGSTOP)
        try:
            count = mixed_messages(client)
            page = page_where(daemon, lambda page: page.messages("received") == count)
            assert dead_letters(page) == (0, 0), "none is in its topic yet"
            assert page.total("gateway_dead_letter_attempts_total") == 14
        finally:
            kafka.signal(signal.SIGCONT)
        page = page_where(daemon, lambda page: page.messages("dead_lettered") == 14)
        assert dead_letters(page) == (14, 14)
        for reason in ("not_an_envelope", "unknown_message_type"):
            assert page.total("gateway_dead_letters_total", reason=reason) == 7
            assert page.total("gateway_dead_letter_attempts_total", reason=reason) == 7


def test_dead_letters_out_of_the_spool_are_dead_letters_of_the_page(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={"drain.flush_timeout_s": 1})
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("alice"))
        kafka.signal(signal.SIGSTOP)
        try:
            count = mixed_messages(client)
            wait_for(lambda: daemon.books()["received"] == count)
            client.sock.close()
            assert daemon.stop() == 0
        finally:
            kafka.signal(signal.SIGCONT)
    daemon.start()
    page = page_where(daemon, lambda page: page.messages("dead_lettered") == 14)
    assert page.total("gateway_dead_letters_total") == 14


def test_page_has_every_company_and_every_message_where_the_sums_are_gathered_in_slices(
    start_daemon: Callable[..., Daemon],
) -> None:
    companies = FEW_COMPANIES + SLICE_COMPANIES + 1
    daemon = start_daemon(settings={"log.level": "warning"})
    kinds = ("tick_data", "user_event", "trading_signal", "notification")
    messages = b"".join(frame(BINARY, MessageEnvelope(message_type=kind).SerializeToString()) for kind in kinds)
    with ExitStack() as stack:
        for number in range(companies):
            client = stack.enter_context(RawClient(daemon.url))
            client.upgrade(daemon.token(f"user-{number}", f"company-{number}"))
            client.sock.sendall(messages)
        page_where(
            daemon,
            lambda page: page.total("gateway_companies") >= companies and page.messages("delivered") == 4 * companies,
        )
        wait_for(lambda: daemon.books()["delivered"] == 4 * companies)
        assert daemon.books()["imbalance"] == 0
    page_where(daemon, lambda page: page.total("gateway_connections") == 0 and page.total("gateway_companies") <= 1)
    assert daemon.books()["delivered"] == 4 * companies, "companies that are gone are still in the sum"


# The sidecar

UPGRADES = {
    "websocket": "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\n",
    "h2c": "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA\r\n",
}


@pytest.mark.parametrize("name", UPGRADES)
@pytest.mark.parametrize("path", ["/health/live", "/nothing"])
def test_upgrade_on_the_sidecar_is_answered_in_json(daemon: Daemon, name: str, path: str) -> None:
    with RawClient(daemon.sidecar) as client:
        answer = client.raw_request(f"GET {path} HTTP/1.1\r\nHost: a\r\n{UPGRADES[name]}\r\n".encode())
    assert answer.status != 101
    assert answer.headers["content-type"] == "application/json", answer
    json.loads(answer.body)


def h2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def test_sidecar_does_not_speak_http_2(daemon: Daemon) -> None:
    path = b"/health/live"
    # RFC 7541: :method GET, :scheme http, :path and :authority as literals
    block = b"\x82\x86\x04" + bytes([len(path)]) + path + b"\x41\x01a"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    answer = b""
    with socket.create_connection(address_of(daemon.sidecar), timeout=5) as sock, suppress(OSError):
        sock.sendall(preface + h2_frame(4, 0, 0, b"") + h2_frame(1, 0x5, 1, block))
        while b'"live"' not in answer and (data := sock.recv(65536)):
            answer += data
    assert b'"live"' not in answer
    assert answer == b"" or re.match(rb"HTTP/1\.1 [45]", answer), answer
    assert daemon.get("/health/live")[0] == 200


# The log, the demo, the checkout


def test_kafka_that_is_away_at_the_start_is_said_once(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("127.0.0.1:1", wait_ready=False)
    wait_for(lambda: warnings_of(daemon), say=daemon.log)
    time.sleep(5)  # a real wait: silence cannot be awaited
    assert 1 <= len(warnings_of(daemon)) <= 3, daemon.log()
    assert "kafka_unavailable" in daemon.get("/health/ready")[1]


def test_kafka_that_goes_away_later_is_said_once(start_daemon: Callable[..., Daemon], kafka: Daemon) -> None:
    daemon = start_daemon(kafka.kafka)
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        kafka.kill()
        for number in range(10):
            client.send_binary(tick("alice", number))
        wait_for(lambda: daemon.get("/health/ready")[0] == 503)
        time.sleep(5)
        assert 1 <= len(warnings_of(daemon)) <= 3, daemon.log()
    daemon.kill()


def test_demo_shows_figures_of_one_moment() -> None:
    command = [sys.executable, "-m", "gateway", "demo", "--clients", "20", "--rate", "50", "--seconds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done
    assert "books: balanced" in done.stdout
    assert "books: -" not in done.stdout
    for sent, arrived in re.findall(r"sent: ([\d,]+)  in Kafka: ([\d,]+)", done.stdout):
        assert int(arrived.replace(",", "")) <= int(sent.replace(",", "")), done.stdout


def test_what_the_readme_writes_into_the_checkout_is_not_for_git(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    shutil.copy(ROOT / ".gitignore", tmp_path / ".gitignore")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)

    def ignored(*names: str) -> set[str]:
        done = subprocess.run(
            ["git", "check-ignore", *names], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    written = {name for block in blocks for name in re.findall(r"(?<![0-9&<])> *([\w./-]+)", block)}
    written = {name for name in written if not name.startswith("/")} | {"jwt-secret", "token", "gateway.toml"}
    assert ignored(*written) == written
    tracked = {"deploy/gateway.toml", "protos/gateway/v1/token.proto", "gateway/keys.py", "tests/tokens.py"}
    assert ignored(*tracked) == set()
