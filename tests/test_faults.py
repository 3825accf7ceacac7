"""What is killed and what survives: everything a client was acked for is in Kafka."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import trio

from bench.daemon import Daemon
from gateway.client import GatewayClient, open_client
from gateway.v1.envelope_pb2 import MessageEnvelope
from tests.conftest import Broker
from tests.rawclient import RawClient
from tests.records import Records


async def send_numbers(client: GatewayClient, stop: trio.Event) -> int:
    """Send numbered messages over two topics until told to stop; returns how many."""
    count = 0
    while not stop.is_set():
        await client.send("user_event" if count % 5 == 0 else "tick_data", b"%d" % count)
        count += 1
        await trio.sleep(0.001)
    return count


def numbers_in(records: Records, key: str, wanted: set[int]) -> list[int]:
    """The numbers in a topic until all wanted ones are there."""
    found: list[int] = []
    while not wanted <= set(found):
        record = records.take(1, key=key)
        found += [int(MessageEnvelope.FromString(message.value() or b"").payload) for message in record]
    return found


@pytest.mark.parametrize(("which", "kills"), [("embedded", 3), pytest.param("apache", 20, marks=pytest.mark.apache)])
async def test_gateway_killed_under_load_loses_nothing_that_was_acked(
    request: pytest.FixtureRequest, start_daemon: Callable[..., Daemon], which: str, kills: int
) -> None:
    broker: Broker = request.getfixturevalue(f"{which}_broker")
    daemon = start_daemon(broker.bootstrap_servers)
    daemon.reconfigure(listen__port=int(daemon.url.rpartition(":")[2].partition("/")[0]))
    stop = trio.Event()
    with (
        Records(broker.bootstrap_servers, "tick-data") as ticks,
        Records(broker.bootstrap_servers, "user-events") as events,
        trio.fail_after(180),
    ):
        async with open_client(daemon.url, daemon.token("survivor")) as client:

            async def kill_again_and_again() -> None:
                for _ in range(kills):
                    acked = client.acked
                    while client.acked < acked + 50:
                        await trio.sleep(0.01)
                    await trio.to_thread.run_sync(daemon.kill)
                    await trio.to_thread.run_sync(daemon.start)
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_again_and_again)
                count = await send_numbers(client, stop)
            await client.flush()
            assert (client.acked, client.unacked, client.rejected) == (count, 0, 0)
        assert client.reconnects >= kills
        expected_events = set(range(0, count, 5))
        expected_ticks = set(range(count)) - expected_events
        found_ticks = await trio.to_thread.run_sync(numbers_in, ticks, "survivor", expected_ticks)
        found_events = await trio.to_thread.run_sync(numbers_in, events, "survivor", expected_events)
    for found, expected in ((found_ticks, expected_ticks), (found_events, expected_events)):
        assert set(found) == expected
        first_seen = list(dict.fromkeys(found))
        assert first_seen == sorted(first_seen), "order holds but for what is sent again"
    assert client.resent < count
    books = daemon.books()
    assert books["imbalance"] == 0


@pytest.mark.apache
@pytest.mark.parametrize("fault", ["suspended", "killed"])
async def test_broker_outage_loses_doubles_and_reorders_nothing(
    start_daemon: Callable[..., Daemon], apache_broker: Broker, fault: str
) -> None:
    if apache_broker.process is None:
        pytest.skip("the broker of KAFKA_BOOTSTRAP is not this test's to stop; CI starts its own")
    process = apache_broker.process
    daemon = start_daemon(apache_broker.bootstrap_servers)
    stop = trio.Event()
    user = f"patient-{fault}"
    with Records(apache_broker.bootstrap_servers, "tick-data") as ticks, trio.fail_after(120):
        async with open_client(daemon.url, daemon.token(user)) as client:

            async def outage() -> None:
                while client.acked < 100:
                    await trio.sleep(0.01)
                if fault == "suspended":
                    await trio.to_thread.run_sync(process.suspend, 5.0)
                else:
                    await trio.to_thread.run_sync(process.kill)
                    await trio.to_thread.run_sync(process.start)
                acked = client.acked
                while client.acked < acked + 100:
                    await trio.sleep(0.01)
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(outage)
                count = await send_numbers(client, stop)
            await client.flush()
        assert (client.acked, client.reconnects) == (count, 0)
        ticks_sent = [number for number in range(count) if number % 5]
        records = await trio.to_thread.run_sync(lambda: ticks.take(len(ticks_sent), key=user))
        assert ticks.nothing_more(key=user)
    assert [int(MessageEnvelope.FromString(record.value() or b"").payload) for record in records] == ticks_sent
    books = daemon.books()
    assert (books["received"], books["delivered"], books["imbalance"]) == (count, count, 0)


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
