"""Two gateways on one Redis, from outside: one limit, one ban, whatever becomes of Redis or of a gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.redis_server import RedisServer

pytestmark = pytest.mark.redis

JSON = "gateway.v1.json"
ENVELOPE = MessageEnvelope(message_type="tick_data").SerializeToString()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


Pair = Callable[..., list[Daemon]]


@pytest.fixture
def pair(start_daemon: Callable[..., Daemon], server: RedisServer) -> Pair:
    def start(**settings: Any) -> list[Daemon]:
        options = {"registry.redis_url": server.url, "registry.lease_s": 2, **settings}
        first = start_daemon(settings=options)
        second = start_daemon(first.kafka, settings={**options, "auth.secret_file": str(first.home / "secret")})
        for daemon in (first, second):
            wait_until(partial(is_up, daemon))
        return [first, second]

    return start


def wait_until(holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_up(daemon: Daemon) -> bool:
    return bool(health(daemon)["registry"]["up"])


def health(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.get("/health")[1])
    return found


def refusal(daemon: Daemon, token: str, **options: Any) -> tuple[int, str]:
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(token), **options)
        return answer.status, answer.code if answer.status != 101 else ""


def connect(stack: ExitStack, daemon: Daemon, token: str, **options: Any) -> RawClient:
    client = stack.enter_context(RawClient(daemon.url))
    client.upgrade(token, protocols=JSON, **options)
    client.read_control("welcome")
    return client


def test_two_hundred_at_once_and_two_thousand_attempts_are_never_one_over(pair: Pair) -> None:
    daemons = pair(**{"tiers.pro.users": 10})
    tokens = [daemons[0].token(f"user-{number}") for number in range(200)]
    for _ in range(10):
        with ExitStack() as stack:
            clients = [stack.enter_context(RawClient(daemons[number % 2].url)) for number in range(200)]
            for client, token in zip(clients, tokens, strict=True):
                lines = "".join(f"{name}: {value}\r\n" for name, value in client.headers(token))
                client.sock.sendall(f"GET {client.path} HTTP/1.1\r\n{lines}\r\n".encode())
            answers = [client.read_response() for client in clients]
            assert sum(answer.status == 101 for answer in answers) == 10
            assert {answer.code for answer in answers if answer.status != 101} == {"too_many_users"}
        wait_until(lambda: not any(health(daemon)["connections"] for daemon in daemons))
        time.sleep(0.1)
    with ExitStack() as stack:
        for number in range(10):
            connect(stack, daemons[number % 2], tokens[number])


def test_account_has_one_connection_over_both_and_a_ban_holds_in_both(pair: Pair) -> None:
    first, second = pair(**{"tiers.pro.connections_per_account": 1, "breaker.share": 0.5})
    with ExitStack() as stack:
        older = connect(stack, first, first.token("alice"))
        newer = connect(stack, second, first.token("alice"))
        assert older.read_close()[0] == 4429
        other = connect(stack, first, first.token("alice"), target="/ws/mt5?account=2")
        for _ in range(30):
            newer.send_binary(b"\xff")
        assert newer.read_close()[0] == 1008
        assert other.read_close()[0] == 1008, "the user is shut out there too"
        assert refusal(first, first.token("alice")) == refusal(second, first.token("alice")) == (429, "banned")


def test_rate_is_shared_by_a_users_connections_to_both(pair: Pair) -> None:
    first, second = pair(**{"tiers.pro.messages_per_second": 50})
    with ExitStack() as stack:
        clients = [connect(stack, daemon, first.token("alice")) for daemon in (first, second)]
        time.sleep(0.5)
        for client in clients:
            for _ in range(100):
                client.send_binary(ENVELOPE)
            client.ping()
    delivered = sum(daemon.settled_books()["delivered"] for daemon in (first, second))
    assert 100 <= delivered <= 160, "two seconds' worth of one user, a little more while it was new"


def test_places_of_a_gateway_that_is_killed_are_free_after_its_lease(pair: Pair) -> None:
    first, second = pair(**{"tiers.pro.users": 1})
    with ExitStack() as stack:
        connect(stack, second, first.token("alice"))
        assert refusal(first, first.token("bob")) == (403, "too_many_users")
        second.kill()
        assert refusal(first, first.token("bob")) == (403, "too_many_users")
        began = time.monotonic()
        wait_until(lambda: refusal(first, first.token("bob"))[0] == 101)
        assert time.monotonic() - began < 4


def test_without_redis_places_are_given_by_what_each_knows_and_counted_together_again(
    pair: Pair, server: RedisServer
) -> None:
    first, second = pair(**{"tiers.pro.users": 2})
    with ExitStack() as stack:
        alice = connect(stack, first, first.token("alice"))
        server.kill()
        connect(stack, second, first.token("bob"))
        wait_until(lambda: not health(second)["registry"]["up"])
        assert second.get("/health/ready")[0] == 200
        assert "gateway_registry_up 0.0" in second.get("/metrics")[1]
        second.wait_log("registry does not answer")
        server.start()
        for daemon in (first, second):
            wait_until(partial(is_up, daemon))
            assert refusal(daemon, first.token("carol")) == (403, "too_many_users")
        alice.send_binary(ENVELOPE)
        assert alice.read_control("ack")["count"] == 1


def test_refuse_says_so_while_redis_stands_still(pair: Pair, server: RedisServer) -> None:
    first, _ = pair(**{"registry.on_failure": "refuse", "registry.timeout_s": 0.2})
    with ExitStack() as stack:
        alice = connect(stack, first, first.token("alice"))
        server.stop_answering()
        try:
            assert refusal(first, first.token("bob")) == (503, "registry_unavailable")
            wait_until(lambda: first.get("/health/ready")[0] == 503)
            assert "registry_unavailable" in first.get("/health/ready")[1]
            alice.send_binary(ENVELOPE)
            assert alice.read_control("ack")["count"] == 1, "who is in goes on"
        finally:
            server.go_on()
        wait_until(lambda: refusal(first, first.token("bob"))[0] == 101)


def test_password_of_redis_is_shown_nowhere(start_daemon: Callable[..., Daemon], server: RedisServer) -> None:
    url = server.url.replace("redis://", "redis://user:hush-hush@")
    daemon = start_daemon(settings={"registry.redis_url": url})
    daemon.wait_log("registry does not answer")
    assert "hush-hush" not in daemon.log()
    assert not health(daemon)["registry"]["up"]


def test_workers_of_a_host_share_one_view_through_redis(
    start_daemon: Callable[..., Daemon], server: RedisServer
) -> None:
    daemon = start_daemon(workers=2, settings={"registry.redis_url": server.url, "tiers.pro.users": 3})
    wait_until(lambda: "gateway_registry_up 1.0" in daemon.get("/metrics")[1])
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(20)]
        statuses = [
            client.request(client.headers(daemon.token(f"user-{number}"))).status
            for number, client in enumerate(clients)
        ]
        assert statuses.count(101) == 3
