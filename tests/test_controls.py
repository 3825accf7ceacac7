"""Control messages of clients, and tokens that end: from outside, and through `gateway.client`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import msgpack
import pytest
import trio

from gateway.client import open_client
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.tokens import claims, data_claim, sign

JSON, MSGPACK = "gateway.v1.json", "gateway.v1.msgpack"
TEXT = 0x1
Start = Callable[..., Daemon]


@pytest.fixture
def client(daemon: Daemon) -> Any:
    with RawClient(daemon.url) as connected:
        connected.upgrade(daemon.token(), protocols=JSON)
        connected.read_control("welcome")
        yield connected


def ask(client: RawClient, text: str) -> dict[str, Any]:
    client.send_frame(TEXT, text.encode())
    return client.read_control()


def test_ping_is_answered_with_the_servers_clock_and_its_id(client: RawClient) -> None:
    for identifier in ("7", '"' + "x" * 64 + '"', "-9223372036854775808"):
        pong = ask(client, f'{{"type":"ping","id":{identifier},"more":[1]}}')
        assert pong["type"] == "pong"
        assert abs(pong["time"] - time.time() * 1000) < 5000
        assert f"{pong['id']}" == identifier.strip('"')
    assert "id" not in ask(client, '{"type":"ping"}')


@pytest.mark.parametrize(
    ("text", "code", "identifier"),
    [
        ("", "bad_message", None),
        ("[]", "bad_message", None),
        ("7", "bad_message", None),
        ("{", "bad_message", None),
        ('{"type":NaN}', "bad_message", None),
        ('{"id":1}', "bad_message", 1),
        ('{"type":7,"id":"a"}', "bad_message", "a"),
        ('{"type":"ping","id":1.5}', "bad_message", None),
        ('{"type":"ping","id":true}', "bad_message", None),
        ('{"type":"ping","id":"' + "x" * 65 + '"}', "bad_message", None),
        ('{"type":"ping","id":9223372036854775808}', "bad_message", None),
        ("[" * 10_000, "bad_message", None),
        ('{"type":"authenticate","id":3}', "bad_message", 3),
        ('{"type":"authenticate","token":7}', "bad_message", None),
        ('{"type":"authenticate","token":"a.b.c","id":4}', "invalid_token", 4),
        ('{"type":"subscribe","id":5}', "unknown_type", 5),
        ('{"type":"welcome"}', "unknown_type", None),
    ],
)
def test_what_is_not_understood_gets_an_error_and_the_connection_goes_on(
    client: RawClient, text: str, code: str, identifier: object
) -> None:
    error = ask(client, text)
    assert (error["type"], error["code"], error.get("id")) == ("error", code, identifier)
    assert error["message"]
    client.send_binary(MessageEnvelope(message_type="tick_data").SerializeToString())
    assert client.read_control("ack")["count"] == 1, "control messages are not counted"


def test_tenth_bad_message_in_a_minute_closes(client: RawClient) -> None:
    for _ in range(9):
        assert ask(client, "x")["code"] == "bad_message"
    assert ask(client, '{"type":"ping"}')["type"] == "pong"
    assert ask(client, "x")["code"] == "bad_message"
    assert client.read_control("closing")["code"] == 1008
    assert client.read_close()[0] == 1008


def test_more_than_fifty_a_second_are_refused_and_ten_seconds_of_that_close(client: RawClient) -> None:
    for number in range(150):
        client.send_frame(TEXT, b'{"type":"ping","id":%d}' % number)
    answers = [client.read_control() for _ in range(150)]
    assert [answer["id"] for answer in answers] == [*range(150)]
    kinds = [answer.get("code", answer["type"]) for answer in answers]
    assert kinds[:100] == ["pong"] * 100
    assert set(kinds[100:]) <= {"pong", "rate_limited"}
    assert kinds.count("rate_limited") >= 40
    began = time.monotonic()
    with pytest.raises((ConnectionError, AssertionError, Exception)) as ended:  # by its close
        while time.monotonic() - began < 15:
            client.send_frame(TEXT, b'{"type":"ping"}')
            client.send_frame(TEXT, b'{"type":"ping"}')
            if client.read_control()["type"] == "closing":
                raise ConnectionError
            if client.read_control()["type"] == "closing":
                raise ConnectionError
            time.sleep(0.01)
    assert ended.type is ConnectionError
    assert client.read_close()[0] == 1008
    assert 8 < time.monotonic() - began < 13


def test_message_over_sixteen_kilobytes_is_too_big(client: RawClient) -> None:
    assert ask(client, '{"type":"ping","x":"' + "x" * (16_384 - 22) + '"}')["type"] == "pong"
    client.send_frame(TEXT, b'{"type":"ping","x":"' + b"x" * (16_384 - 21) + b'"}')
    assert client.read_close()[0] == 1009


def test_text_that_is_not_utf8_closes_1007(client: RawClient) -> None:
    client.send_frame(TEXT, b'{"type":"\xff"}')
    assert client.read_close()[0] == 1007


def test_plain_client_may_send_no_text(daemon: Daemon) -> None:
    for protocols in (None, "bearer, {token}"):
        with RawClient(daemon.url) as plain:
            token = daemon.token()
            plain.upgrade(token, protocols=protocols and protocols.format(token=token))
            plain.send_frame(TEXT, b'{"type":"ping"}')
            assert plain.read_close()[0] == 1003


def test_msgpack_client_asks_in_json_and_is_answered_in_msgpack(daemon: Daemon) -> None:
    with RawClient(daemon.url) as packed:
        packed.upgrade(daemon.token(), protocols=MSGPACK)
        packed.read_frame()
        packed.send_frame(TEXT, b'{"type":"ping","id":1}')
        opcode, payload = packed.read_frame()
        assert opcode == 0x2
        assert msgpack.unpackb(payload)["type"] == "pong"


# Tokens that end


def test_newer_token_keeps_the_connection_and_one_of_somebody_else_does_not_count(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"auth.leeway_s": 0})
    with RawClient(daemon.url) as client, RawClient(daemon.url) as other:
        for one in (client, other):
            one.upgrade(daemon.token(ttl_s=3), protocols=JSON)
            one.read_control("welcome")
        for token in (daemon.token("bob"), daemon.token(company="other")):
            assert ask(client, f'{{"type":"authenticate","token":"{token}"}}')["code"] == "other_user"
        answer = ask(client, f'{{"type":"authenticate","id":"x","token":"{daemon.token(ttl_s=60)}"}}')
        assert (answer["type"], answer["id"]) == ("authenticated", "x")
        assert 55 < answer["token_expires_at"] - time.time() < 61
        closing = other.read_control("closing")
        assert (closing["code"], closing["reason"]) == (4401, "token expired")
        time.sleep(1.5)
        assert ask(client, '{"type":"ping"}')["type"] == "pong"
    assert daemon.token() not in daemon.log()


def test_tokens_of_before_a_date_and_revoked_ones_end_now_and_are_refused(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"auth.revoked_file": "revoked"}, prepare=lambda home: (home / "revoked").touch())
    now = int(time.time())

    def token(user: str, **changes: Any) -> str:
        return sign(daemon.secret, claims(sub=user, data=data_claim(user), **changes))

    def handshake(of: str) -> int:
        with RawClient(daemon.url) as client:
            return client.request(client.headers(of)).status

    good, named, old = token("alice", jti="good"), token("bob", jti="bad-1"), token("carol", iat=now - 500)
    with ExitStack() as stack:
        clients = {}
        for name, of in {"good": good, "named": named, "old": old}.items():
            clients[name] = stack.enter_context(RawClient(daemon.url))
            clients[name].upgrade(of, protocols=JSON)
            clients[name].read_control("welcome")
        (daemon.home / "revoked").write_text("# stolen\n\nbad-1\r\n")
        daemon.signal(signal.SIGHUP)
        closing = clients["named"].read_control("closing")
        assert (closing["code"], closing["reason"]) == (4401, "token revoked")
        assert (handshake(named), handshake(good), handshake(old)) == (401, 101, 101)
        daemon.reconfigure(**{"auth.not_before": datetime.fromtimestamp(now - 100, UTC)})
        daemon.signal(signal.SIGHUP)
        assert clients["old"].read_control("closing")["code"] == 4401
        assert (handshake(named), handshake(good), handshake(old)) == (401, 101, 401)
        assert ask(clients["good"], f'{{"type":"authenticate","token":"{named}"}}')["code"] == "invalid_token"
        (daemon.home / "revoked").unlink()
        daemon.signal(signal.SIGHUP)
        assert "auth.revoked_file" in daemon.wait_log("reload failed")
        assert (handshake(named), handshake(good)) == (401, 101), "what held before holds"


async def test_client_library_renews_its_token_before_it_ends(start_daemon: Start) -> None:
    daemon = await trio.to_thread.run_sync(lambda: start_daemon(settings={"auth.leeway_s": 0}))
    asked: list[float] = []

    def token() -> str:
        asked.append(time.monotonic())
        return daemon.token(ttl_s=4)

    with trio.fail_after(30):
        async with open_client(daemon.url, token) as client:
            began = time.monotonic()
            while time.monotonic() - began < 9:
                await client.send("tick_data", b"x")
                await trio.sleep(0.1)
            await client.flush()
            assert client.reconnects == 0
            assert client.acked >= 80
    assert 3 <= len(asked) <= 6


async def test_client_library_keeps_to_the_rate_and_loses_nothing(start_daemon: Start) -> None:
    daemon = await trio.to_thread.run_sync(lambda: start_daemon(settings={"tiers.pro.messages_per_second": 50}))
    with trio.fail_after(30):
        async with open_client(daemon.url, daemon.token()) as client:
            for number in range(250):
                await client.send("tick_data", b"%d" % number)
        assert client.throttled == 0
    books = await trio.to_thread.run_sync(daemon.settled_books)
    assert (books["delivered"], books["dropped"]) == (250, 0)
