"""The sidecar over a real socket: its answers, and clients that do not behave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient


def ask(daemon: Daemon, request: bytes) -> bytes:
    host, port = daemon.sidecar.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(request)
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionError:
            pass
    return answer


def get(daemon: Daemon, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    answer = ask(daemon, f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


def test_the_five_pages(daemon: Daemon) -> None:
    for path in ("/health/live", "/health/ready", "/health", "/version"):
        status, headers, body = get(daemon, path)
        assert (status, headers["content-type"]) == (200, "application/json")
        json.loads(body)
    status, headers, body = get(daemon, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert json.loads(get(daemon, "/version")[2])["gateway"] == "0.1.0"
    details = json.loads(get(daemon, "/health")[2])
    assert details["state"] == "ready"
    assert details["kafka"]["up"] is True
    assert details["messages"]["imbalance"] == 0


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health", "/metrics", "/version"])
def test_head_works_and_other_methods_do_not(daemon: Daemon, path: str) -> None:
    status, headers, body = get(daemon, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0
    for method in ("POST", "PUT", "DELETE", *(() if path.startswith("/health") else ("OPTIONS",))):
        status, headers, _ = get(daemon, path, method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health"])
def test_checks_of_balancers_are_answered_like_head(daemon: Daemon, path: str) -> None:
    for method, slash in (("OPTIONS", ""), ("OPTIONS", "/"), ("HEAD", "/")):
        status, headers, body = get(daemon, path + slash, method)
        assert (status, body) == (200, b""), (method, slash)
        assert int(headers["content-length"]) > 0
    for method in ("OPTIONS", "HEAD", "GET"):  # HAProxy's default: no Host, which HTTP/1.0 does not ask for
        assert ask(daemon, f"{method} {path} HTTP/1.0\r\n\r\n".encode()).startswith(b"HTTP/1.1 200")


def test_unknown_paths_are_404(daemon: Daemon) -> None:
    assert get(daemon, "/")[0] == 404
    assert get(daemon, "/metrics/x")[0] == 404
    assert get(daemon, "/metrics/")[0] == 200


def test_metrics_are_prometheus_text_with_the_contracts_names(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        time.sleep(1.1)  # the page may be a second old
        families = {
            family.name: family for family in text_string_to_metric_families(get(daemon, "/metrics")[2].decode())
        }
    for name in (
        "gateway_connections",
        "gateway_handshakes",
        "gateway_messages",
        "gateway_message_bytes",
        "gateway_dead_letters",
        "gateway_routing_seconds",
        "gateway_delivery_seconds",
        "gateway_producer_queue_messages",
        "gateway_loop_lag_seconds",
        "gateway_books_imbalance",
        "process_resident_memory_bytes",
    ):
        assert name in families, name
    (connections,) = families["gateway_connections"].samples
    assert connections.value >= 1
    messages = {
        (sample.labels["outcome"], sample.labels["message_type"]) for sample in families["gateway_messages"].samples
    }
    assert ("delivered", "tick_data") in messages


UPGRADE = (
    b"GET /metrics HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
BAD = {
    "non-ASCII protocol": UPGRADE + b"Sec-WebSocket-Protocol: \xff\xfe\r\n\r\n",
    "websocket": UPGRADE + b"\r\n",
    "h2c": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: AAAA\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(40),
    "garbage": bytes(range(256)),
    "huge head": b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000,
    "non-ASCII path": b"GET /\xff HTTP/1.1\r\nHost: \xff\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_the_sidecar_outlives_bad_requests(daemon: Daemon, name: str) -> None:
    host, port = daemon.sidecar.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(BAD[name])
        sock.settimeout(0.5)
        with suppress(OSError):
            sock.recv(1000)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert get(daemon, "/health/live")[0] == 200
            break
        except (OSError, IndexError):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.ping()


def test_client_that_stops_reading_does_not_hold_up_a_shutdown(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    host, port = daemon.sidecar.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect((host, int(port)))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 200)
        time.sleep(0.5)  # let the answers fill the socket
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10
