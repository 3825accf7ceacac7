"""The request parser without a socket: what splitting and fuzzing must not change."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.ingress import request

HEAD = (
    b"GET /ws/mt5?account=1 HTTP/1.1\r\nHost: gw.example:8001\r\n"
    b"Upgrade: websocket\r\nX-Thing: a, b\r\nx-thing: c\r\n\r\n"
)


def test_a_head_is_read() -> None:
    parsed = request.parse(HEAD)
    assert (parsed.method, parsed.path, parsed.query) == ("GET", "/ws/mt5", "account=1")
    assert (parsed.host, parsed.port) == ("gw.example", 8001)
    assert parsed.tokens("x-thing") == ["a", "b", "c"]
    with pytest.raises(Refused, match="repeated"):
        parsed.one("x-thing")


@given(st.integers(0, len(HEAD) - 1))
def test_the_end_is_found_only_when_it_is_there(cut: int) -> None:
    assert request.head_end(HEAD[:cut]) == -1
    assert request.head_end(HEAD + b"rest") == len(HEAD)


@given(st.binary(max_size=2000))
def test_garbage_is_refused_or_waited_for_and_never_raises_otherwise(data: bytes) -> None:
    try:
        if request.head_end(data) >= 0:
            request.parse(data[: request.head_end(data)])
    except Refused:
        pass


@given(st.lists(st.binary(max_size=40), max_size=8), st.binary(max_size=60))
def test_garbage_headers_are_refused_or_read(lines: list[bytes], host: bytes) -> None:
    head = b"\r\n".join([b"GET / HTTP/1.1", b"Host: " + host, *lines]) + b"\r\n\r\n"
    with suppress(Refused):
        end = request.head_end(head)
        if end >= 0:
            request.parse(head[:end])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("gw.example", ("gw.example", None)),
        ("GW.example:80", ("gw.example", 80)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:8001", ("[::1]", 8001)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example", None)),
        ("gw.example:", ("gw.example", None)),
        ("my_host", ("my_host", None)),
    ],
)
def test_hosts_that_are_served(host: str, expected: tuple[str, int | None]) -> None:
    parsed = request.parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert (parsed.host, parsed.port) == expected


@pytest.mark.parametrize(
    "host", ["", ":80", "a..b", "-a", "a b", "[::1", "[1]", "[::1]x", "a:b", "a:65536", "xn--", "a@b", "é"]
)
def test_hosts_that_are_refused(host: str) -> None:
    with pytest.raises(Refused):
        request.parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
