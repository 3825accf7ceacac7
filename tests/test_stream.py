"""The replaying client: pace, batches, backoff, and what it does when the gateway goes away."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gateway.client import Backoff
from gateway.client.stream import Pace, stream
from gateway.client.ticks import COLUMNS, walk
from gateway.errors import HandshakeRejected
from gateway.testing.daemon import Daemon
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.ticks_pb2 import BatchTickData, Tick
from tests.test_journey import ROWS

TICKS = [Tick(symbol="A", time_msc=1000 + offset) for offset in (0, 0, 5, 5, 5, 1000)]


def test_own_pace_groups_the_ticks_of_a_millisecond() -> None:
    schedule = list(Pace(batch=2).schedule(iter(TICKS), "acc"))
    assert [(due, len(batch.ticks)) for due, batch in schedule] == [
        (0.0, 2),
        (0.005, 2),
        (0.005, 1),
        (1.0, 1),
    ]
    assert [due for due, _ in Pace(speed=10).schedule(iter(TICKS), "")] == [0.0, 0.0005, 0.1]
    assert schedule[0][1].account == "acc"


@pytest.mark.parametrize(
    ("rate", "sizes", "dues"),
    [
        (0.0, [4, 2], [0.0, 0.0]),
        (10.0, [1] * 6, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (300.0, [3, 3], [0.0, 0.01]),
    ],
)
def test_rates(rate: float, sizes: list[int], dues: list[float]) -> None:
    schedule = list(Pace(rate=rate, batch=4).schedule(iter(TICKS), ""))
    assert [len(batch.ticks) for _, batch in schedule] == sizes
    assert [due for due, _ in schedule] == pytest.approx(dues)


def test_backoff_doubles_with_jitter_up_to_its_bound_and_honours_the_server() -> None:
    backoff = Backoff()
    delays = [backoff.next_s() for _ in range(10)]
    for number, delay in enumerate(delays):
        whole = min(30.0, 0.5 * 2**number)
        assert whole / 2 <= delay <= whole
    assert backoff.next_s(100.0) == 100.0
    backoff.reset()
    assert backoff.next_s() <= 0.5


def test_walk_is_a_market() -> None:
    source = walk(0)
    ticks = [next(source) for _ in range(500)]
    assert all(tick.ask > tick.bid > 0 for tick in ticks)
    assert len({tick.bid for tick in ticks}) > 50
    assert abs(ticks[-1].bid / ticks[0].bid - 1) < 0.01


async def test_refused_token_ends_the_stream(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join([",".join(COLUMNS), *ROWS]))
    with pytest.raises(HandshakeRejected, match="401 invalid_token"):
        await stream(path, daemon.url, "a.b.c", pace=Pace(rate=0))


async def test_stream_reconnects_to_a_restarted_gateway(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """The gateway is stopped in mid-stream and another one starts on its port; every tick arrives, in order."""
    kafka = start_daemon(settings={"log.level": "warning"})
    first = start_daemon(kafka.kafka)
    port = int(first.url.rpartition(":")[2].partition("/")[0])
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join([",".join(COLUMNS), *(f"{number},EURUSD,1.1,1.2,0" for number in range(240))]))
    said: list[str] = []
    with Records(kafka.kafka, "tick-data") as records:
        async with trio.open_nursery() as nursery:
            results = []

            async def replay() -> None:
                token = first.token("traveller")
                results.append(await stream(path, first.url, token, pace=Pace(rate=100), say=said.append))

            nursery.start_soon(replay)
            early = await trio.to_thread.run_sync(lambda: records.take(20, key="traveller"))
            first.signal(signal.SIGTERM)
            assert first.process is not None
            assert await trio.to_thread.run_sync(first.process.wait) == 0
            with trio.fail_after(30):
                while not said:
                    await trio.sleep(0.05)
            secret = first.home / "secret"
            await trio.to_thread.run_sync(
                lambda: start_daemon(kafka.kafka, settings={"listen.port": port, "auth.secret_file": str(secret)})
            )
        late = records.take(results[0].messages - len(early), key="traveller")
        assert records.nothing_more(key="traveller"), "what was acked before the close is not sent again"
    assert results[0].reconnects >= 1
    assert results[0].ticks == 240
    values = [record.value() or b"" for record in (*early, *late)]
    batches = [BatchTickData.FromString(MessageEnvelope.FromString(value).payload) for value in values]
    assert [tick.time_msc for batch in batches for tick in batch.ticks] == list(range(240))
