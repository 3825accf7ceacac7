"""What is killed and what survives: everything a client was acked for is in Kafka, and the books balance."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from gateway.client import GatewayClient, open_client
from gateway.testing import kafka as apache
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.conftest import Broker


async def send_numbers(client: GatewayClient, stop: trio.Event) -> int:
    """Send numbered messages over two topics until told to stop; returns how many."""
    count = 0
    while not stop.is_set():
        await client.send("user_event" if count % 5 == 0 else "tick_data", b"%d" % count)
        count += 1
        await trio.sleep(0.001)
    return count


async def acked_more(client: GatewayClient, messages: int) -> None:
    """Wait until the client has been acked for ``messages`` more."""
    acked = client.acked
    while client.acked < acked + messages:
        await trio.sleep(0.01)


def numbers_in(records: Records, key: str, wanted: set[int]) -> list[int]:
    """The numbers in a topic until all wanted ones are there."""
    found: list[int] = []
    while not wanted <= set(found):
        record = records.take(1, key=key)
        found += [int(MessageEnvelope.FromString(message.value() or b"").payload) for message in record]
    return found


async def survive(
    daemon: Daemon,
    bootstrap_servers: str,
    user: str,
    fault: Callable[[GatewayClient], Awaitable[None]],
    *,
    gateway_lives: bool,
) -> tuple[GatewayClient, int]:
    """Send numbers over two topics while ``fault`` runs; check that all of them arrive, in order.

    While the gateway lives nothing may arrive twice either. Returns the client and how many numbers it sent.
    """
    stop = trio.Event()
    with (
        Records(bootstrap_servers, "tick-data") as ticks,
        Records(bootstrap_servers, "user-events") as events,
        trio.fail_after(180),
    ):
        async with open_client(daemon.url, daemon.token(user)) as client:

            async def go_through_it() -> None:
                await acked_more(client, 100)
                await fault(client)
                await acked_more(client, 100)
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_through_it)
                count = await send_numbers(client, stop)
            await client.flush()
            assert (client.acked, client.unacked, client.rejected) == (count, 0, 0)
        expected_events = list(range(0, count, 5))
        expected_ticks = [number for number in range(count) if number % 5]
        found_ticks = await trio.to_thread.run_sync(numbers_in, ticks, user, set(expected_ticks))
        found_events = await trio.to_thread.run_sync(numbers_in, events, user, set(expected_events))
        if gateway_lives:
            assert (found_ticks, found_events) == (expected_ticks, expected_events)
            assert ticks.nothing_more(key=user)
            assert events.nothing_more(key=user)
            assert client.reconnects == 0
    for found, expected in ((found_ticks, expected_ticks), (found_events, expected_events)):
        assert list(dict.fromkeys(found)) == expected, "order holds but for what is sent again"
    books = daemon.books()
    assert (books["imbalance"], books["in_flight"]) == (0, 0)
    if gateway_lives:
        assert (books["received"], books["delivered"]) == (count, count)
    return client, count


def own_process(broker: Broker) -> apache.ApacheKafka:
    """The broker's process, for tests that stop and kill it."""
    if broker.process is None:
        pytest.skip("the broker of KAFKA_BOOTSTRAP is not this test's to stop; CI starts its own")
    return broker.process


def keep_port(daemon: Daemon) -> None:
    """Let the daemon come back where its clients look for it."""
    daemon.reconfigure(listen__port=int(daemon.url.rpartition(":")[2].partition("/")[0]))


def stopped(daemon: Daemon) -> list[dict[str, int]]:
    """The books of every end that was in order."""
    return [json.loads(line) for line in daemon.log().splitlines() if '"event": "stopped"' in line]


@pytest.mark.parametrize(("which", "kills"), [("embedded", 3), pytest.param("apache", 20, marks=pytest.mark.apache)])
async def test_gateway_killed_under_load_loses_nothing_that_was_acked(
    request: pytest.FixtureRequest, start_daemon: Callable[..., Daemon], which: str, kills: int
) -> None:
    broker: Broker = request.getfixturevalue(f"{which}_broker")
    daemon = start_daemon(broker.bootstrap_servers)
    keep_port(daemon)

    async def kill_again_and_again(client: GatewayClient) -> None:
        for _ in range(kills):
            await acked_more(client, 50)
            await trio.to_thread.run_sync(daemon.kill)
            await trio.to_thread.run_sync(daemon.start)

    client, count = await survive(
        daemon, broker.bootstrap_servers, "survivor", kill_again_and_again, gateway_lives=False
    )
    assert client.reconnects >= kills
    assert client.resent < count


async def test_gateway_stopped_and_started_under_load_loses_nothing(
    start_daemon: Callable[..., Daemon], broker: Broker
) -> None:
    daemon = start_daemon(broker.bootstrap_servers, settings={"drain.reconnect_window_ms": 300})
    keep_port(daemon)
    statuses: list[int] = []

    async def restart_again_and_again(client: GatewayClient) -> None:
        for _ in range(5):
            await acked_more(client, 50)
            statuses.append(await trio.to_thread.run_sync(daemon.stop))
            await trio.to_thread.run_sync(daemon.start)

    client, _ = await survive(
        daemon, broker.bootstrap_servers, "restarted", restart_again_and_again, gateway_lives=False
    )
    assert statuses == [0] * 5
    assert client.resent == 0, "everything was acked before each close"
    for books in stopped(daemon):
        assert (books["received"], books["imbalance"]) == (books["delivered"], 0)


@pytest.mark.apache
@pytest.mark.parametrize("fault", ["suspended", "killed", "slow"])
async def test_broker_outage_loses_doubles_and_reorders_nothing(
    start_daemon: Callable[..., Daemon], apache_broker: Broker, fault: str
) -> None:
    process = own_process(apache_broker)
    daemon = start_daemon(apache_broker.bootstrap_servers)

    async def outage(client: GatewayClient) -> None:
        if fault == "suspended":
            await trio.to_thread.run_sync(process.suspend, 5.0)
        elif fault == "killed":
            await trio.to_thread.run_sync(process.kill)
            await trio.to_thread.run_sync(process.start)
        else:  # every answer takes half a second or so
            for _ in range(20):
                await trio.to_thread.run_sync(process.suspend, 0.5)
                await trio.sleep(0.05)

    await survive(daemon, apache_broker.bootstrap_servers, f"patient-{fault}", outage, gateway_lives=True)


@pytest.mark.apache
async def test_gateway_stopped_while_kafka_is_away_spools_and_loses_nothing(
    start_daemon: Callable[..., Daemon], apache_broker: Broker
) -> None:
    process = own_process(apache_broker)
    daemon = start_daemon(apache_broker.bootstrap_servers, settings={"drain.flush_timeout_s": 1})
    keep_port(daemon)

    async def stop_in_the_dark(client: GatewayClient) -> None:
        await trio.to_thread.run_sync(process.kill)
        await trio.sleep(0.5)  # load that finds no Kafka
        assert await trio.to_thread.run_sync(daemon.stop) == 0
        await trio.to_thread.run_sync(process.start)
        await trio.to_thread.run_sync(daemon.start)

    await survive(daemon, apache_broker.bootstrap_servers, "darkness", stop_in_the_dark, gateway_lives=False)
    (books,) = stopped(daemon)
    assert books["spooled"] > 0
    assert books["imbalance"] == 0
    assert "gateway_spool_replayed_total 0.0" not in daemon.get("/metrics")[1]


@pytest.mark.apache
async def test_broker_that_is_down_for_thirty_seconds_at_the_start(
    start_daemon: Callable[..., Daemon], apache_broker: Broker
) -> None:
    process = own_process(apache_broker)
    process.kill()
    try:
        daemon = start_daemon(apache_broker.bootstrap_servers, wait_ready=False)
        with trio.fail_after(120):
            async with open_client(daemon.url, daemon.token("early")) as client:
                for number in range(100):
                    await client.send("tick_data", b"%d" % number)
                await trio.sleep(30)
                assert client.acked == 0
                assert daemon.get("/health/live")[0] == 200
                status, body = daemon.get("/health/ready")
                assert status == 503
                assert "kafka_unavailable" in body
                await trio.to_thread.run_sync(process.start)
                await trio.to_thread.run_sync(daemon.wait_ready)
                await client.flush()
        assert daemon.get("/health/ready")[0] == 200
        books = daemon.books()
        assert (books["received"], books["delivered"], books["imbalance"]) == (100, 100, 0)
    finally:
        if process.process is None:
            process.start()


@pytest.mark.apache
async def test_cluster_losing_a_broker_loses_doubles_and_reorders_nothing(start_daemon: Callable[..., Daemon]) -> None:
    """The ticks' topic survives it (min.insync.replicas 2 of 3); the events' partition has no leader meanwhile."""
    with apache.ApacheCluster(3) as cluster:
        make = partial(apache.create_topics, cluster.bootstrap_servers, config={"min.insync.replicas": "2"}, replicas=3)
        make(["tick-data", "trading-signals", "notifications", "failed-messages"], partitions=6)
        apache.create_topics(cluster.bootstrap_servers, ["user-events"], partitions=1)
        lost = cluster.nodes[apache.leader(cluster.bootstrap_servers, "user-events") - 1]
        daemon = start_daemon(cluster.bootstrap_servers)

        async def lose_a_broker(client: GatewayClient) -> None:
            await trio.to_thread.run_sync(lost.kill)
            before = daemon.books()["delivered"]
            while daemon.books()["delivered"] < before + 1000:  # ticks go on: the two that are left are enough
                await trio.sleep(0.1)
            assert daemon.books()["in_flight"] > 0, "events wait for their leader"
            await trio.to_thread.run_sync(lost.start)

        await survive(daemon, cluster.bootstrap_servers, "majority", lose_a_broker, gateway_lives=True)


@pytest.mark.apache
def test_what_kafka_and_its_dead_letter_topic_refuse_is_spooled_and_a_full_disk_acks_nothing(
    start_daemon: Callable[..., Daemon], apache_broker: Broker
) -> None:
    apache.create_topics(apache_broker.bootstrap_servers, ["small"], partitions=1, config={"max.message.bytes": "500"})
    daemon = start_daemon(
        apache_broker.bootstrap_servers,
        settings={
            "routes.topics": {"tick_data": "small", "user_event": "user-events"},
            "routes.dead_letter": "small",
            "kafka.properties": {"batch.num.messages": 1, "compression.type": "none"},
        },
    )
    big = MessageEnvelope(message_type="tick_data", payload=bytes(200_000 // 4)).SerializeToString()
    fine = MessageEnvelope(message_type="user_event", payload=b"fine").SerializeToString()
    with RawClient(daemon.url) as client, RawClient(daemon.url) as other:
        client.upgrade(daemon.token("sizes"), protocols="gateway.v1.json")
        client.send_binary(big)
        rejected = client.read_control("rejected")
        assert (rejected["reason"], rejected["last"]) == ("kafka_refused", 1)
        assert client.read_control("ack")["count"] == 1, "the spool has it"
        assert daemon.books()["spooled"] == 1

        whole = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        full = sum(path.stat().st_size for path in (daemon.home / "spool").iterdir()) + 1000
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (full, whole[1]))  # no file may grow beyond this
        client.send_binary(big)
        client.send_binary(fine)
        deadline = time.monotonic() + 20
        while "spool_unwritable" not in (ready := daemon.get("/health/ready"))[1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ready[0] == 503
        assert "File too large" in ready[1]
        other.upgrade(daemon.token("other"), protocols="gateway.v1.json")
        other.send_binary(fine)
        assert other.read_control("ack")["count"] == 1, "who needs no spool goes on"
        client.ping()
        assert b'"ack"' not in client.buffer, "nothing is acked behind what the disk has not taken"

        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, whole)
        count = 0
        while count < 3:
            count = client.read_control("ack")["count"]
    assert daemon.get("/health/ready")[0] == 200
    books = daemon.books()
    assert (books["received"], books["delivered"], books["spooled"], books["imbalance"]) == (4, 2, 2, 0)
    apache.alter_topic(apache_broker.bootstrap_servers, "small", {"max.message.bytes": "1000000"})
    assert daemon.stop() == 0
    with Records(apache_broker.bootstrap_servers, "small") as records:
        daemon.start()
        assert [record.value() for record in records.take(2, key="sizes")] == [big, big]
    assert daemon.settled_books()["dead_lettered"] == 2


def test_full_queue_stops_reading_and_says_so_until_kafka_is_back(start_daemon: Callable[..., Daemon]) -> None:
    with Daemon(settings={"log.level": "warning"}) as kafka:
        daemon = start_daemon(
            kafka.kafka,
            settings={"kafka.max_queued_messages": 200, "session.ack_interval_ms": 50},
        )
        message = MessageEnvelope(message_type="tick_data", user_id="pressed", company_id="acme", payload=bytes(900))
        with (
            Records(kafka.kafka, "tick-data") as records,
            RawClient(daemon.url) as client,
            RawClient(daemon.url) as plain,
        ):
            client.upgrade(daemon.token("pressed"), protocols="gateway.v1.json")
            plain.upgrade(daemon.token("plain"))
            kafka.signal(signal.SIGSTOP)
            try:
                for number in range(1000):
                    message.timestamp = number
                    client.send_binary(message.SerializeToString())
                assert client.read_control("degraded")["reason"] == "kafka_unavailable"
                status, body = daemon.get("/health/ready")
                assert status == 503
                assert "producer_queue_full" in body
                assert daemon.get("/health/live")[0] == 200
                assert daemon.books()["in_flight"] == 200
                with RawClient(daemon.url) as late:
                    late.upgrade(daemon.token("late"), protocols="gateway.v1.json")
                    late.read_control("degraded")
            finally:
                kafka.signal(signal.SIGCONT)
            assert client.read_control("recovered")["reason"] == "kafka_unavailable"
            count = 0
            while count < 1000:
                count = client.read_control("ack")["count"]
            found = records.take(1000, key="pressed")
            assert records.nothing_more(key="pressed")
            numbers = [MessageEnvelope.FromString(record.value() or b"").timestamp for record in found]
            assert numbers == list(range(1000))
            plain.ping()
        books = daemon.books()
        assert (books["received"], books["delivered"], books["imbalance"]) == (1000, 1000, 0)
        assert daemon.get("/health/ready")[0] == 200
