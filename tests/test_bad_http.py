"""Bad HTTP over a real socket: the answer, and a daemon that goes on serving everybody else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import Closed, RawClient, frame

KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
GOOD = ["Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade", KEY, "Sec-WebSocket-Version: 13"]


def head(*lines: str, first: str = "GET /ws/mt5 HTTP/1.1") -> bytes:
    return ("\r\n".join([first, *lines]) + "\r\n\r\n").encode("latin-1")


def without(name: str) -> list[str]:
    return [line for line in GOOD if not line.startswith(f"{name}:")]


CASES: dict[str, tuple[bytes, int, str]] = {
    "POST": (head(*GOOD, first="POST /ws/mt5 HTTP/1.1"), 405, "method_not_allowed"),
    "HEAD": (head(*GOOD, first="HEAD /ws/mt5 HTTP/1.1"), 405, "method_not_allowed"),
    "HTTP/1.0": (head(*GOOD, first="GET /ws/mt5 HTTP/1.0"), 505, "http_version_not_supported"),
    "HTTP/2.0": (head(*GOOD, first="GET /ws/mt5 HTTP/2.0"), 505, "http_version_not_supported"),
    "no version": (head(*GOOD, first="GET /ws/mt5"), 400, "bad_request"),
    "two spaces": (head(*GOOD, first="GET  /ws/mt5 HTTP/1.1"), 400, "bad_request"),
    "unknown path": (head(*GOOD, first="GET /nope HTTP/1.1"), 404, "not_found"),
    "path traversal": (head(*GOOD, first="GET /ws/../ws/mt5 HTTP/1.1"), 404, "not_found"),
    "fragment": (head(*GOOD, first="GET /ws/mt5#x HTTP/1.1"), 400, "bad_request"),
    "non-ASCII target": (head(*GOOD, first="GET /ws/mt\xe9 HTTP/1.1"), 400, "bad_request"),
    "no upgrade": (head(*without("Upgrade")), 426, "upgrade_required"),
    "other upgrade": (head(*without("Upgrade"), "Upgrade: h2c"), 426, "upgrade_required"),
    "no connection": (head(*without("Connection")), 426, "upgrade_required"),
    "version 8": (
        head(*without("Sec-WebSocket-Version"), "Sec-WebSocket-Version: 8"),
        426,
        "upgrade_required",
    ),
    "no version header": (head(*without("Sec-WebSocket-Version")), 426, "upgrade_required"),
    "no key": (head(*without("Sec-WebSocket-Key")), 400, "bad_websocket_key"),
    "short key": (
        head(*without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: c2hvcnQ="),
        400,
        "bad_websocket_key",
    ),
    "key is no base64": (
        head(*without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: " + "!" * 24),
        400,
        "bad_websocket_key",
    ),
    "two keys": (head(*GOOD, KEY), 400, "bad_websocket_key"),
    "no host": (head(*without("Host")), 400, "bad_host"),
    "two hosts": (head(*GOOD, "Host: b"), 400, "bad_host"),
    "bad punycode host": (head(*without("Host"), "Host: xn--\x7f.example"), 400, "bad_request"),
    "xn-- that decodes to nothing": (
        head(*without("Host"), "Host: xn--99999999999.example"),
        400,
        "bad_host",
    ),
    "host with a space": (head(*without("Host"), "Host: a b"), 400, "bad_host"),
    "host port": (head(*without("Host"), "Host: a:99999"), 400, "bad_host"),
    "header line over 8 KiB": (head(*GOOD, "X: " + "a" * 8200), 431, "head_too_large"),
    "head over 16 KiB": (head(*GOOD, *(f"X{n}: {'a' * 4000}" for n in range(5))), 431, "head_too_large"),
    "over 128 headers": (head(*GOOD, *(f"X{n}: a" for n in range(130))), 431, "head_too_large"),
    "target over 8 KiB": (head(*GOOD, first=f"GET /ws/mt5?{'a' * 8200} HTTP/1.1"), 414, "target_too_long"),
    "endless target": (b"GET /" + b"a" * 9000, 414, "target_too_long"),
    "endless head": (head(*GOOD)[:-2] + b"X: " + b"a" * 16_400, 431, "head_too_large"),
    "non-ASCII protocol": (head(*GOOD, "Sec-WebSocket-Protocol: b\xe9"), 400, "bad_request"),
    "non-ASCII connection": (head(*GOOD, "Connection: \xff"), 400, "bad_request"),
    "non-ASCII host": (head(*without("Host"), "Host: \xe9.example"), 400, "bad_request"),
    "non-ASCII extensions": (head(*GOOD, "Sec-WebSocket-Extensions: \xff\xfe"), 400, "bad_request"),
    "bare LF": (
        b"\n".join([b"GET /ws/mt5 HTTP/1.1", *(line.encode() for line in GOOD), b"", b""]),
        400,
        "bad_request",
    ),
    "one bare LF": (head(*GOOD).replace(b"\r\nUpgrade", b"\nUpgrade"), 400, "bad_request"),
    "bare CR": (head(*GOOD, "X: a\rb"), 400, "bad_request"),
    "obs-fold": (head(*GOOD, "X: a", " b"), 400, "bad_request"),
    "space before colon": (head(*GOOD, "X : a"), 400, "bad_request"),
    "header without colon": (head(*GOOD, "nonsense"), 400, "bad_request"),
    "NUL in a header": (head(*GOOD, "X: a\0b"), 400, "bad_request"),
    "transfer-encoding": (head(*GOOD, "Transfer-Encoding: chunked"), 400, "body_not_allowed"),
    "body": (head(*GOOD, "Content-Length: 5") + b"hello", 400, "body_not_allowed"),
    "two content-lengths": (head(*GOOD, "Content-Length: 0", "Content-Length: 0"), 400, "body_not_allowed"),
    "foreign origin": (head(*GOOD, "Origin: https://evil.example"), 403, "origin_not_allowed"),
    "null origin": (head(*GOOD, "Origin: null"), 403, "origin_not_allowed"),
    "look-alike origin": (head(*GOOD, "Origin: https://127.0.0.1.evil.example"), 403, "origin_not_allowed"),
    "origin with a user": (head(*GOOD, "Origin: https://127.0.0.1@evil.example"), 403, "origin_not_allowed"),
    "two origins": (head(*GOOD, "Origin: https://a", "Origin: https://b"), 400, "bad_request"),
    "bad account": (head(*GOOD, first="GET /ws/mt5?account=a%20b HTTP/1.1"), 400, "bad_account"),
    "empty account": (head(*GOOD, first="GET /ws/mt5?account= HTTP/1.1"), 400, "bad_account"),
    "long account": (head(*GOOD, first=f"GET /ws/mt5?account={'a' * 65} HTTP/1.1"), 400, "bad_account"),
    "two accounts": (head(*GOOD, first="GET /ws/mt5?account=a&account=b HTTP/1.1"), 400, "bad_account"),
    "query of another encoding": (head(*GOOD, first="GET /ws/mt5?account=%ff HTTP/1.1"), 400, "bad_request"),
    "no token": (head(*GOOD), 401, "invalid_token"),
    "TLS on the plain port": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        400,
        "bad_request",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_request_gets_its_answer_and_the_connection_is_closed(daemon: Daemon, name: str) -> None:
    sent, status, code = CASES[name]
    with RawClient(daemon.url) as client:
        answer = client.raw_request(sent)
        assert (answer.status, answer.code) == (status, code)
        assert answer.headers["content-type"] == "application/json"
        assert "close" in answer.headers["connection"].lower()
        client.expect_end()
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())


def test_refusals_carry_the_headers_of_the_contract(daemon: Daemon) -> None:
    def answer_to(name: str) -> dict[str, str]:
        with RawClient(daemon.url) as client:
            return client.raw_request(CASES[name][0]).headers

    assert answer_to("no upgrade")["sec-websocket-version"] == "13"
    assert answer_to("version 8")["upgrade"] == "websocket"
    assert answer_to("no token")["www-authenticate"] == 'Bearer error="invalid_token"'
    assert answer_to("POST")["allow"] == "GET"


def test_silent_and_slow_clients_get_408_within_the_deadline(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.handshake_timeout_s": 1.0})
    began = time.monotonic()
    with RawClient(daemon.url) as silent, RawClient(daemon.url) as slow:
        for byte in b"GET /ws":
            slow.sock.sendall(bytes([byte]))
            time.sleep(0.1)
        assert silent.read_response().status == 408
        assert slow.read_response().code == "handshake_timeout"
    assert time.monotonic() - began < 5


def test_request_in_single_bytes_is_a_request(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        request = "".join(f"{name}: {value}\r\n" for name, value in client.headers(daemon.token()))
        for byte in f"GET /ws/mt5 HTTP/1.1\r\n{request}\r\n".encode():
            client.sock.sendall(bytes([byte]))
        assert client.read_response().status == 101


def test_attempts_over_an_address_rate_get_429_with_retry_after(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        settings={"listen.handshakes_per_address_per_s": 0.5, "listen.handshakes_per_address_burst": 3}
    )
    statuses = []
    for _ in range(5):
        with RawClient(daemon.url) as client:
            answer = client.request(client.headers(daemon.token()))
            statuses.append(answer.status)
    assert statuses == [101, 101, 101, 429, 429]
    assert answer.code == "too_many_attempts"
    assert 1 <= int(answer.headers["retry-after"]) <= 3
    with RawClient(daemon.url, source="127.0.0.2") as other:
        other.upgrade(daemon.token())


def test_silent_sockets_of_one_address_leave_places_for_others(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.max_pending_per_address": 5, "listen.max_connections": 10})
    silent = [RawClient(daemon.url) for _ in range(5)]
    with RawClient(daemon.url) as sixth:
        answer = sixth.read_response()
        assert (answer.status, answer.code) == (429, "too_many_attempts")
        assert answer.headers["retry-after"] == "1"
    with RawClient(daemon.url, source="127.0.0.2") as other:
        other.upgrade(daemon.token())
    for client in silent:
        client.sock.close()
    deadline = time.monotonic() + 5
    status = 0
    while status != 101:
        with RawClient(daemon.url) as client:
            status = client.request(client.headers(daemon.token())).status
        assert time.monotonic() < deadline


def test_connections_over_the_cap_get_503_until_a_place_is_free(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.max_connections": 2})
    with RawClient(daemon.url) as first, RawClient(daemon.url) as second:
        first.upgrade(daemon.token())
        second.upgrade(daemon.token())
        with RawClient(daemon.url) as third:
            answer = third.request(third.headers(daemon.token()))
            assert (answer.status, answer.code) == (503, "at_capacity")
            assert answer.headers["retry-after"]
        first.close()
    with RawClient(daemon.url) as fourth:
        fourth.upgrade(daemon.token())


def test_connections_closed_at_once_leave_no_descriptor(daemon: Daemon) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{daemon.pid}/fd"))

    before = descriptors()
    host, port = daemon.url.removeprefix("ws://").partition("/")[0].split(":")
    for _ in range(500):
        socket.create_connection((host, int(port))).close()
    deadline = time.monotonic() + 10
    while descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descriptors() <= before


def test_refusals_are_logged_without_the_token(daemon: Daemon) -> None:
    secret = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0LXBheWxvYWQ.c2lnbmF0dXJl"
    with RawClient(daemon.url) as client:
        assert client.request(client.headers(secret)).status == 401
    with RawClient(daemon.url) as client:
        assert client.request(client.headers(), target=f"/ws/mt5?access_token={secret}").status == 401
    client_log = daemon.log()
    assert "c2VjcmV0LXBheWxvYWQ" not in client_log


MT5_ODDITIES: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "absolute-form target": ("wss://host:8001/ws/mt5", []),
    "host without port": ("/ws/mt5", [("Host", "127.0.0.1")]),
    "path in the host": ("/", [("Host", "127.0.0.1:8001/ws/mt5")]),
    "origin equal to the host": ("/ws/mt5", [("Host", "gw.example"), ("Origin", "https://gw.example:8001")]),
    "bare origin": ("/ws/mt5", [("Host", "gw.example"), ("Origin", "gw.example")]),
    "account": ("/ws/mt5?account=5012345", []),
    "several upgrade tokens": ("/ws/mt5", [("Connection", "keep-alive, Upgrade"), ("Upgrade", "WebSocket")]),
    "compression offered": (
        "/ws/mt5",
        [("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits")],
    ),
}


@pytest.mark.parametrize("name", MT5_ODDITIES)
def test_odd_mt5_requests_are_served(daemon: Daemon, name: str) -> None:
    target, changes = MT5_ODDITIES[name]
    with RawClient(daemon.url) as client:
        headers = client.headers(daemon.token(), **{key.replace("-", "_"): value for key, value in changes})
        answer = client.request(headers, target=target)
        assert answer.status == 101
        assert "Sec-WebSocket-Accept: " in answer.head
        assert "sec-websocket-extensions" not in answer.headers
        client.ping()


def test_allowed_origins_match_exactly(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"listen.allowed_origins": ["https://desk.example"]})
    for origin, status in (
        ("https://desk.example", 101),
        ("https://desk.example.evil", 403),
        ("http://desk.example", 403),
        ("https://DESK.example", 403),
    ):
        with RawClient(daemon.url) as client:
            assert client.request(client.headers(daemon.token(), Origin=origin)).status == status, origin


def test_frames_behind_the_request_are_not_lost(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        request = "".join(f"{name}: {value}\r\n" for name, value in client.headers(daemon.token()))
        client.sock.sendall(f"GET /ws/mt5 HTTP/1.1\r\n{request}\r\n".encode() + frame(0x9, b"early"))
        assert client.read_response().status == 101
        assert client.read_frame() == (0xA, b"early")


def test_readiness_and_handshakes_say_starting_while_kafka_is_not_reached(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon("127.0.0.1:1", wait_ready=False)
    status, body = daemon.get("/health/ready")
    assert status == 503
    assert "starting" in body
    assert "kafka_unavailable" in body
    assert daemon.get("/health/live")[0] == 200
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(daemon.token()))
        assert (answer.status, answer.code) == (503, "starting")
        assert int(answer.headers["retry-after"]) >= 1
    assert daemon.stop(30) == 0


def test_closed_port_is_not_mistaken_for_a_refusal(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client, pytest.raises(Closed):
        client.sock.shutdown(socket.SHUT_WR)
        client.read_response()
