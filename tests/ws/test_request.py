"""The request parser without a socket: what splitting and fuzzing must not change."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.ws import request

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


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"a", b"G", b": "]), max_size=40), st.data())
def test_looking_only_at_what_is_new_finds_the_same(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"GET /" + b"".join(parts)

    def outcome(pieces: list[bytes]) -> object:
        buffer = b""
        for piece in pieces:
            seen, buffer = len(buffer), buffer + piece
            try:
                end = request.head_end(buffer, seen)
            except Refused as refused:
                return refused.refusal
            if end >= 0:
                return end
        return -1

    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[start:stop] for start, stop in pairwise([0, *cuts, len(stream)])]
    assert outcome(pieces) == outcome([stream[index : index + 1] for index in range(len(stream))])


def test_a_path_in_the_host_keeps_the_query_of_the_target() -> None:
    parsed = request.parse(b"GET /?account=7 HTTP/1.1\r\nHost: a:1/ws/mt5\r\n\r\n")
    assert (parsed.path, parsed.query) == ("/ws/mt5", "account=7")
    parsed = request.parse(b"GET / HTTP/1.1\r\nHost: a:1/ws/mt5?account=8\r\n\r\n")
    assert (parsed.path, parsed.query) == ("/ws/mt5", "account=8")


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
