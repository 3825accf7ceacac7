"""Bad frames over a real socket: the close code, the end of the connection, and everybody else unaffected."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient, frame
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope

BINARY, TEXT, CONTINUATION, CLOSE, PING, PONG = 0x2, 0x1, 0x0, 0x8, 0x9, 0xA
LIMIT = 65_536


def close_frame(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


CASES: dict[str, tuple[bytes, int]] = {
    "unmasked": (frame(BINARY, b"x", masked=False), 1002),
    "RSV1": (frame(BINARY, b"x", rsv=4), 1002),
    "RSV2 on a ping": (frame(PING, b"", rsv=2), 1002),
    "opcode 3": (frame(0x3, b"x"), 1002),
    "opcode 11": (frame(0xB), 1002),
    "stray continuation": (frame(CONTINUATION, b"x"), 1002),
    "message inside a fragmented one": (frame(BINARY, b"x", fin=False) + frame(BINARY, b"y"), 1002),
    "text": (frame(TEXT, b"hello"), 1003),
    "text announced large": (struct.pack("!BBH", 0x81, 0x80 | 126, 50_000), 1003),
    "fragmented ping": (frame(PING, b"x", fin=False), 1002),
    "ping of 126 bytes": (frame(PING, b"x" * 126), 1002),
    "ping with a long length": (frame(PING, b"x", length_form=126), 1002),
    "close with one byte": (frame(CLOSE, b"\x03"), 1002),
    "close 999": (close_frame(999), 1002),
    "close 1005": (close_frame(1005), 1002),
    "close 1006": (close_frame(1006), 1002),
    "close 5000": (close_frame(5000), 1002),
    "close with bad UTF-8": (close_frame(1000, b"\xff"), 1007),
    "length with the top bit": (struct.pack("!BBQ", 0x82, 0x80 | 127, 1 << 63), 1002),
    "2 MiB declared, ten bytes sent": (struct.pack("!BBQ", 0x82, 0x80 | 127, 2 << 20) + b"x" * 14, 1009),
    "limit + 1": (frame(BINARY, bytes(LIMIT + 1)), 1009),
    "limit + 1 in fragments": (
        frame(BINARY, bytes(LIMIT), fin=False) + frame(CONTINUATION, b"x"),
        1009,
    ),
    "4,097 fragments": (frame(BINARY, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 4096, 1009),
    "ping flood": (frame(PING, bytes(125)) * 3000, 1008),  # over many reads: one read's may have gathered
    "pong flood": (frame(PONG, bytes(125)) * 3000, 1008),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_frame_closes_with_its_code(daemon: Daemon, name: str) -> None:
    sent, code = CASES[name]
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.sock.sendall(sent)
        assert client.read_close()[0] == code
        began = time.monotonic()
        client.expect_end()
        assert time.monotonic() - began < 5
    with RawClient(daemon.url) as other:
        other.upgrade(daemon.token())
        other.ping()


def test_too_big_then_a_ping_is_1009_and_the_server_lives(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.sock.sendall(struct.pack("!BBQ", 0x82, 0x80 | 127, 2 << 20) + frame(PING))
        assert client.read_close()[0] == 1009
    assert daemon.get("/health/ready")[0] == 200


def test_ping_after_our_close_is_ignored(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.sock.sendall(close_frame(1000) + frame(PING, b"late"))
        assert client.read_close()[0] == 1000
        client.expect_end()
        assert client.buffer == b""


@pytest.mark.parametrize("code", [1005, 1000, 3333])
def test_close_is_answered_with_its_code(daemon: Daemon, code: int) -> None:
    sent = frame(CLOSE) if code == 1005 else close_frame(code, b"bye")
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.sock.sendall(sent)
        assert client.read_close()[0] == code
        client.expect_end()


def test_mt5_lengths_and_close_without_a_code_are_served(daemon: Daemon) -> None:
    envelope = MessageEnvelope(message_type="tick_data", payload=b"p" * 10).SerializeToString()
    large = MessageEnvelope(message_type="tick_data", payload=b"p" * 65_100).SerializeToString()
    with Records(daemon.kafka, "tick-data") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token("quirky"))
        for form, message in ((126, envelope), (127, envelope), (127, large), (None, large)):
            client.send_frame(BINARY, message, length_form=form)
        client.send_frame(CLOSE)
        assert client.read_close()[0] == 1005
        values = [record.value() for record in records.take(4, key="quirky")]
    stamp = len(values[0] or b"") - len(envelope)
    assert [(value or b"")[: len(value or b"") - stamp] for value in values] == [
        envelope,
        envelope,
        large,
        large,
    ]


def test_reset_in_mid_message_produces_nothing(daemon: Daemon) -> None:
    whole = MessageEnvelope(message_type="tick_data", user_id="cutter").SerializeToString()
    with Records(daemon.kafka, "tick-data") as records:
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("cutter"))
            client.ping()
            client.sock.sendall(frame(BINARY, whole * 50)[:-1])
            client.reset()
        assert records.nothing_more(key="cutter")


def test_silent_connection_is_closed_with_4408(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"session.ping_interval_s": 1, "session.idle_timeout_s": 2})
    with RawClient(daemon.url) as silent, RawClient(daemon.url) as alive:
        silent.upgrade(daemon.token("silent"))
        alive.upgrade(daemon.token("alive"))
        deadline = time.monotonic() + 5
        silent_frames = []
        while time.monotonic() < deadline:
            opcode, payload = alive.read_frame()
            assert opcode == PING, (opcode, payload)
            alive.send_frame(PONG, payload)
        while (opcode := (answer := silent.read_frame())[0]) == PING:
            silent_frames.append(answer)
        assert silent_frames, "a silent client is pinged first"
        assert opcode == CLOSE
        assert struct.unpack("!H", answer[1][:2])[0] == 4408
        alive.ping()


def test_pongs_that_nobody_reads_end_the_connection(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        settings={
            "session.max_controls_per_s": 10_000,
            "session.max_unsent_bytes": 4096,
            "session.unsent_timeout_s": 2,
        }
    )
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        began = time.monotonic()
        flood = frame(PING, b"x" * 125) * 20
        with pytest.raises(OSError):  # whichever send meets the end
            while time.monotonic() - began < 15:
                client.sock.sendall(flood)
                time.sleep(0.001)
    assert time.monotonic() - began < 12
    assert daemon.get("/health/ready")[0] == 200


def test_expired_token_closes_with_4401(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"auth.leeway_s": 0})
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token(ttl_s=2), protocols="gateway.v1.json")
        notice = client.read_control("closing")
        assert (notice["code"], notice["reason"]) == (4401, "token expired")
        assert client.read_close()[0] == 4401


def test_token_within_the_leeway_is_admitted_and_kept_that_long(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"auth.leeway_s": 4})
    with RawClient(daemon.url) as client:
        admitted = time.time()
        client.upgrade(daemon.token(ttl_s=1))
        time.sleep(1.5)  # past its expiry, not past the leeway
        client.ping()
        assert client.read_close()[0] == 4401
        assert 4 < time.time() - admitted < 8


def test_timeouts_do_not_wait_for_notices(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        settings={"session.ack_interval_ms": 20_000, "session.ping_interval_s": 1, "session.idle_timeout_s": 2}
    )
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        began = time.monotonic()
        assert client.read_close()[0] == 4408
        assert time.monotonic() - began < 6


def test_bad_frames_and_dead_letters_are_logged(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("noisy"))
        client.send_binary(b"\xff")
        client.send_frame(TEXT, b"hello")
        assert client.read_close()[0] == 1003
        client.expect_end()
    lines = [line for line in daemon.wait_log('"code": 1003').splitlines() if '"user_id": "noisy"' in line]
    assert any('"reason": "not_an_envelope"' in line for line in lines)
    assert any('"code": 1003' in line for line in lines)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_fragments_with_control_frames_between_are_joined(daemon: Daemon, size: int) -> None:
    message = MessageEnvelope(
        message_type="tick_data", user_id="joiner", company_id="acme", payload=b"z" * 40
    ).SerializeToString()
    parts = [message[start : start + size] for start in range(0, len(message), size)]
    sent = b""
    for index, part in enumerate(parts):
        sent += frame(CONTINUATION if index else BINARY, part, fin=index == len(parts) - 1)
        if index == 0:
            sent += frame(PING, b"between")
    with Records(daemon.kafka, "tick-data") as records, RawClient(daemon.url) as client:
        client.upgrade(daemon.token("joiner"))
        client.sock.sendall(sent)
        assert client.read_frame() == (PONG, b"between")
        assert records.take(1, key="joiner")[0].value() == message
