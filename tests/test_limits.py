"""Limits and protection from outside: what a tenant may do, what it is told, who is shut out and for how long."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import Closed, RawClient, frame
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.ticks_pb2 import BatchTickData, Tick

JSON = "gateway.v1.json"
Start = Callable[..., Daemon]


def envelope(payload: bytes = b"x", message_type: str = "tick_data") -> bytes:
    return MessageEnvelope(message_type=message_type, payload=payload).SerializeToString()


def controls(client: RawClient, settled: int) -> list[dict[str, Any]]:
    """All control messages up to the ack of ``settled`` messages and the last throttle notice."""
    found: list[dict[str, Any]] = []
    while not any(message["type"] == "ack" and message["count"] >= settled for message in found):
        found.append(client.read_control())
    return found


def connect(stack: ExitStack, daemon: Daemon, token: str, **options: Any) -> tuple[RawClient, dict[str, Any]]:
    client = stack.enter_context(RawClient(daemon.url))
    client.upgrade(token, protocols=JSON, **options)
    return client, client.read_control("welcome")


def refusal(daemon: Daemon, token: str, **options: Any) -> tuple[int, str, str | None]:
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(token), **options)
        return answer.status, answer.code if answer.status != 101 else "", answer.headers.get("retry-after")


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def metric(daemon: Daemon, line: str) -> float:
    page = daemon.get("/metrics")[1]
    return next((float(one.rpartition(" ")[2]) for one in page.splitlines() if one.startswith(line + " ")), -1.0)


# Rates


def test_welcome_tells_the_tiers_limits(start_daemon: Start) -> None:
    settings = {
        "tiers.free.messages_per_second": 50,
        "tiers.pro.messages_per_second": 75,
        "tiers.pro.company_messages_per_second": 60.5,
        "tiers.enterprise.messages_per_second": 100,
        "tiers.enterprise.burst_s": 5,
    }
    daemon = start_daemon(settings=settings)
    with ExitStack() as stack:
        told = {
            tier: connect(stack, daemon, daemon.token(tier, company=tier, tier=tier))[1]["limits"]
            for tier in ("free", "pro", "enterprise")
        }
    assert {tier: (limits["messages_per_second"], limits["burst"]) for tier, limits in told.items()} == {
        "free": (50, 100),
        "pro": (60.5, 121),
        "enterprise": (100, 500),
    }


def test_what_is_over_the_rate_is_dropped_settled_told_and_in_the_books(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.messages_per_second": 50})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        for number in range(300):
            client.send_binary(envelope(b"%d" % number))
        said = controls(client, 300)
        while sum(message["dropped"] for message in said if message["type"] == "throttle") < 190:
            said.append(client.read_control())
        throttles = [message for message in said if message["type"] == "throttle"]
        assert all(
            (message["scope"], message["messages_per_second"]) == ("user", 50) and 0 < message["retry_after_ms"] <= 20
            for message in throttles
        )
        dropped = sum(message["dropped"] for message in throttles)
        assert 190 <= dropped <= 200, "a hundred at once, and fifty a second meanwhile"
        time.sleep(0.5)
        client.send_binary(envelope())
        assert client.read_control("ack")["count"] == 301, "it goes on"
    books = daemon.settled_books()
    assert (books["received"], books["dropped"], books["delivered"]) == (301, dropped, 301 - dropped)
    assert books["imbalance"] == 0
    wait_until(lambda: metric(daemon, 'gateway_drops_total{reason="rate_limited"}') == dropped)


def test_throttle_is_told_once_a_second_at_most(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.messages_per_second": 10, "session.ack_interval_ms": 20})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        times: list[float] = []
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            client.send_binary(envelope())
            client.send_binary(envelope())
            message = client.read_control()
            if message["type"] == "throttle":
                times.append(time.monotonic())
    assert 3 <= len(times) <= 4
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(times))


def test_all_connections_of_a_user_share_one_bucket_and_another_user_has_its_own(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.messages_per_second": 10})
    with ExitStack() as stack:
        clients = [connect(stack, daemon, daemon.token(user))[0] for user in ("alice", "alice", "bob")]
        for client in clients:
            for _ in range(20):
                client.send_binary(envelope())
            controls(client, 20)
    books = daemon.settled_books()
    assert books["delivered"] in range(40, 45), books
    assert books["delivered"] + books["dropped"] == 60


def test_plain_client_is_limited_too(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.messages_per_second": 5})
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        for _ in range(30):
            client.send_binary(envelope())
        client.close()
    books = daemon.settled_books()
    assert books["delivered"] in (10, 11)
    assert books["dropped"] == 30 - books["delivered"]


def test_rate_of_a_live_connection_changes_with_a_reload_and_with_its_companys_tier(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.free.messages_per_second": 5, "tiers.pro.messages_per_second": 1000})
    with ExitStack() as stack:
        client, welcome = connect(stack, daemon, daemon.token(tier="free"))
        assert welcome["limits"]["messages_per_second"] == 5

        def dropped_of(count: int) -> int:
            before = daemon.settled_books()["dropped"]
            for _ in range(count):
                client.send_binary(envelope())
            client.ping()
            return daemon.settled_books()["dropped"] - before

        assert dropped_of(30) >= 19
        daemon.reconfigure(**{"tiers.free.messages_per_second": 500})
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("reloaded")
        time.sleep(0.2)
        assert dropped_of(50) == 0
        daemon.reconfigure(**{"tiers.free.messages_per_second": 1})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.log().count('"reloaded"') == 2)
        assert dropped_of(30) >= 27
        time.sleep(1.1)  # a newer token, in whole seconds
        _, welcome = connect(stack, daemon, daemon.token("bob", tier="pro"))
        assert welcome["tier"] == "pro"
        time.sleep(0.2)
        assert dropped_of(100) == 0, "the company is a pro now"


def test_companys_budget_of_bytes_is_told_as_the_companys(start_daemon: Start) -> None:
    size = len(envelope())
    daemon = start_daemon(settings={"tiers.pro.company_bytes_per_day": 10 * size})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        for _ in range(15):
            client.send_binary(envelope())
        throttle = next(message for message in controls(client, 15) if message["type"] == "throttle")
        assert (throttle["scope"], throttle["dropped"], throttle["messages_per_second"]) == ("company", 5, 0)
        assert 0 < throttle["retry_after_ms"] <= 86_400_000
    assert daemon.settled_books()["delivered"] == 10


def test_who_is_over_by_one_a_second_is_not_shut_out(start_daemon: Start) -> None:
    daemon = start_daemon(
        settings={"tiers.pro.messages_per_second": 20, "tiers.pro.burst_s": 0.1, "breaker.share": 0.5}
    )
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        began = time.monotonic()
        for number in range(21 * 5):
            time.sleep(max(0.0, began + number / 21 - time.monotonic()))
            client.send_binary(envelope())
        client.ping()
    books = daemon.settled_books()
    assert 0 < books["dropped"] <= 12


# The breaker


def test_user_whose_messages_are_mostly_refused_is_closed_and_shut_out_and_nobody_else(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"breaker.share": 0.5, "breaker.ban_s": 2})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token("mallory"))
        other, _ = connect(stack, daemon, daemon.token("mallory"), target="/ws/mt5?account=2")
        bystander, _ = connect(stack, daemon, daemon.token("alice"))
        for _ in range(9):
            client.send_binary(envelope())
        client.sock.sendall(frame(0x2, b"\xff") * 200)
        for one in (client, other):
            closing = one.read_control("closing")
            assert (closing["code"], closing["reason"][:6]) == (1008, "banned")
            assert one.read_close()[0] == 1008
        status, code, retry_after = refusal(daemon, daemon.token("mallory"))
        assert (status, code) == (429, "banned")
        assert retry_after in ("1", "2")
        bystander.send_binary(envelope())
        assert bystander.read_control("ack")["count"] == 1
        connect(stack, daemon, daemon.token("mallory", company="other"))
        line = json.loads(next(line for line in daemon.log().splitlines() if '"banned"' in line))
        assert (line["kind"], line["user_id"], line["company_id"], line["seconds"]) == ("user", "mallory", "acme", 2)
        assert daemon.log().count('"banned"') == 2, "one line of the ban, one of the handshake that it refused"
        assert metric(daemon, 'gateway_bans_total{kind="user"}') == 1
        time.sleep(2.1)
        client, _ = connect(stack, daemon, daemon.token("mallory"))
        for _ in range(20):
            client.send_binary(b"\xff")
        assert client.read_close()[0] == 1008
        assert int(refusal(daemon, daemon.token("mallory"))[2] or 0) in (3, 4), "twice as long"
    books = daemon.settled_books()
    assert (books["delivered"], books["dead_lettered"]) == (10, books["received"] - 10)
    assert books["imbalance"] == 0


def test_half_refused_is_not_too_much_and_neither_are_nineteen(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"breaker.share": 0.5})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token("alice"))
        for _ in range(100):
            client.send_binary(envelope())
            client.send_binary(b"\xff")
        controls(client, 200)
        client, _ = connect(stack, daemon, daemon.token("bob"))
        for _ in range(19):
            client.send_binary(b"\xff")
        controls(client, 19)


def test_user_who_floods_over_its_rate_is_shut_out_too(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"breaker.share": 0.5, "tiers.pro.messages_per_second": 5})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token("mallory"))
        for _ in range(30):
            client.send_binary(envelope())
        throttle = client.read_control("throttle")
        assert throttle["dropped"] >= 10, "it is told of what was dropped before it is closed"
        assert client.read_close()[0] == 1008
    assert daemon.settled_books()["imbalance"] == 0


def test_address_whose_handshakes_fail_is_shut_out_before_its_token_is_looked_at(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"breaker.share": 0.5, "breaker.ban_s": 2, "breaker.exempt_addresses": []})
    for _ in range(20):
        assert refusal(daemon, "a.b.c")[0] == 401
    status, code, retry_after = refusal(daemon, daemon.token())
    assert (status, code) == (429, "banned")
    assert retry_after in ("1", "2")
    with RawClient(daemon.url, source="127.0.0.2") as client:
        assert client.upgrade(daemon.token()).status == 101, "another address"
    assert metric(daemon, 'gateway_bans_total{kind="address"}') == 1
    time.sleep(2.1)
    assert refusal(daemon, daemon.token())[0] == 101


def test_loopback_is_never_shut_out_by_default(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"breaker.share": 0.5})
    for _ in range(50):
        assert refusal(daemon, "a.b.c")[0] == 401


# Places

PLACES = {
    "tiers.free.users": 1,
    "tiers.free.accounts": 2,
    "tiers.free.connections_per_account": 1,
    "tiers.pro.users": 2,
    "tiers.pro.accounts": 3,
    "tiers.pro.accounts_per_user": 2,
    "tiers.pro.connections_per_account": 1,
}


def account(name: str) -> dict[str, str]:
    return {"target": f"/ws/mt5?account={name}"}


def test_users_and_accounts_of_a_company_are_limited_and_their_places_given_back(start_daemon: Start) -> None:
    daemon = start_daemon(settings=PLACES)
    with ExitStack() as stack:
        connect(stack, daemon, daemon.token("alice"), **account("1"))
        connect(stack, daemon, daemon.token("alice"), **account("2"))
        assert refusal(daemon, daemon.token("alice"), **account("3"))[:2] == (403, "too_many_accounts")
        bob, _ = connect(stack, daemon, daemon.token("bob"))
        assert refusal(daemon, daemon.token("bob"), **account("9"))[:2] == (403, "too_many_accounts")
        assert refusal(daemon, daemon.token("carol"))[:2] == (403, "too_many_users")
        connect(stack, daemon, daemon.token("carol", company="other"))
        assert metric(daemon, 'gateway_handshakes_total{outcome="too_many_users"}') == 1
        bob.close()
        wait_until(lambda: refusal(daemon, daemon.token("carol"))[0] == 101)


def test_newer_connection_of_an_account_replaces_the_older_one_and_only_its_users(start_daemon: Start) -> None:
    daemon = start_daemon(settings=PLACES)
    with ExitStack() as stack:
        older, _ = connect(stack, daemon, daemon.token("alice"), **account("1"))
        other, _ = connect(stack, daemon, daemon.token("bob"), **account("1"))
        assert refusal(daemon, "not.a.token", **account("1"))[0] == 401
        older.send_binary(envelope())
        assert older.read_control("ack")["count"] == 1, "who is not authenticated replaces nobody"
        newer, _ = connect(stack, daemon, daemon.token("alice"), **account("1"))
        assert older.read_control("closing")["code"] == 4429
        assert older.read_close()[0] == 4429
        for one in (newer, other):
            one.send_binary(envelope())
            assert one.read_control("ack")["count"] == 1


def test_lowered_limits_close_those_that_came_last(start_daemon: Start) -> None:
    daemon = start_daemon(settings=PLACES)
    with ExitStack() as stack:
        alice, _ = connect(stack, daemon, daemon.token("alice"))
        bob, _ = connect(stack, daemon, daemon.token("bob"))
        daemon.reconfigure(**{"tiers.pro.users": 1})
        daemon.signal(signal.SIGHUP)
        assert bob.read_close()[0] == 4429
        alice.send_binary(envelope())
        assert alice.read_control("ack")["count"] == 1
        assert refusal(daemon, daemon.token("bob"))[:2] == (403, "too_many_users")


def test_connections_of_an_address_are_limited(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"listen.max_connections_per_address": 2})
    with ExitStack() as stack:
        first, _ = connect(stack, daemon, daemon.token("a"))
        connect(stack, daemon, daemon.token("b"))
        assert refusal(daemon, daemon.token("c")) == (429, "too_many_connections", "5")
        with RawClient(daemon.url, source="127.0.0.2") as client:
            assert client.upgrade(daemon.token("c")).status == 101
        first.close()
        wait_until(lambda: refusal(daemon, daemon.token("c"))[0] == 101)


def test_storm_on_a_full_company_never_lets_one_too_many_in_and_gives_all_places_back(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.users": 5})
    for _ in range(3):
        with ExitStack() as stack:
            clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(40)]
            for number, client in enumerate(clients):
                headers = client.headers(daemon.token(f"user-{number}"))
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
                client.sock.sendall(f"GET {client.path} HTTP/1.1\r\n{lines}\r\n".encode())
            admitted = sum(client.read_response().status == 101 for client in clients)
            assert admitted == 5
        wait_until(lambda: json.loads(daemon.get("/health")[1])["connections"] == 0)


# Overload


def test_newcomers_are_refused_near_the_memory_budget_and_who_is_there_goes_on(start_daemon: Start) -> None:
    daemon = start_daemon()
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        daemon.reconfigure(**{"memory.budget_bytes": 10_000_000})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.get("/health/ready")[0] == 503)
        assert "short_of_memory" in daemon.get("/health/ready")[1]
        assert refusal(daemon, daemon.token("bob")) == (503, "overloaded", "10")
        client.send_binary(envelope())
        assert client.read_control("ack")["count"] == 1
        daemon.reconfigure(**{"memory.budget_bytes": 10_000_000_000})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: refusal(daemon, daemon.token("bob"))[0] == 101)


# Pairs


def ticks(*symbols: str) -> bytes:
    batch = BatchTickData(ticks=[Tick(symbol=symbol, bid=1.0) for symbol in symbols])
    return envelope(batch.SerializeToString())


def test_more_pairs_than_the_tier_allows_are_told_and_nothing_is_dropped(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.pairs": 3, "monitoring.inspect_ticks": True})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        client.send_binary(ticks("EURUSD", "XAUUSD", "EURUSD"))
        client.send_binary(b"\xff")
        client.send_binary(envelope(b"\xff\xff no ticks"))
        assert "throttle" not in {message["type"] for message in controls(client, 3)}
        time.sleep(1.1)
        client.send_binary(ticks("GBPUSD", "USDJPY"))
        throttle = client.read_control("throttle")
        assert (throttle["scope"], throttle["dropped"]) == ("pairs", 0)
        assert metric(daemon, "gateway_pairs_over_limit_total") >= 1
    assert daemon.settled_books()["dropped"] == 0


def test_nobody_looks_into_ticks_unless_that_is_wanted(start_daemon: Start) -> None:
    daemon = start_daemon(settings={"tiers.pro.pairs": 1})
    with ExitStack() as stack:
        client, _ = connect(stack, daemon, daemon.token())
        for _ in range(3):
            client.send_binary(ticks("EURUSD", "XAUUSD"))
            time.sleep(0.5)
        assert "throttle" not in {message["type"] for message in controls(client, 3)}


# Workers


def test_workers_share_one_view_of_their_tenants(start_daemon: Start) -> None:
    daemon = start_daemon(
        workers=2,
        settings={"tiers.pro.users": 3, "tiers.pro.connections_per_account": 1, "breaker.share": 0.5},
    )
    wait_until(lambda: metric(daemon, "gateway_registry_up") == 1)
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(30)]
        statuses = [
            client.request(client.headers(daemon.token(f"user-{number}"))).status
            for number, client in enumerate(clients)
        ]
        assert statuses.count(101) == 3
        assert statuses.count(403) == 27
    wait_until(lambda: metric(daemon, "gateway_connections") == 0)
    with ExitStack() as stack:
        older = connect(stack, daemon, daemon.token("alice"))[0]
        for _ in range(10):  # to one worker and to the other
            newer, _ = connect(stack, daemon, daemon.token("alice"))
            assert older.read_close()[0] == 4429
            older = newer
        for _ in range(30):
            newer.send_binary(b"\xff")
        assert newer.read_close()[0] == 1008
        wait_until(lambda: refusal(daemon, daemon.token("alice"))[:2] == (429, "banned"))
        time.sleep(0.2)
        assert {refusal(daemon, daemon.token("alice"))[:2] for _ in range(10)} == {(429, "banned")}


def test_worker_that_is_killed_gives_its_places_back(start_daemon: Start) -> None:
    daemon = start_daemon(workers=2, settings={"tiers.pro.users": 2})
    wait_until(lambda: metric(daemon, "gateway_registry_up") == 1)
    with ExitStack() as stack:
        for name in ("alice", "bob"):
            connect(stack, daemon, daemon.token(name))
        assert refusal(daemon, daemon.token("carol"))[:2] == (403, "too_many_users")
        children = [path.read_text().split() for path in Path(f"/proc/{daemon.pid}/task").glob("*/children")]
        workers = [int(worker) for workers in children for worker in workers]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

        def carol_is_in() -> bool:
            try:
                return refusal(daemon, daemon.token("carol"))[0] == 101
            except (OSError, Closed):
                return False  # nobody listens

        wait_until(carol_is_in, 30)
