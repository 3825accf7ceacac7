"""Several processes on one port: one parent that starts, watches and drains them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from gateway.ops.aggregate import Sum, parse
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import Closed, RawClient
from gateway.v1.envelope_pb2 import MessageEnvelope

TICK = MessageEnvelope(message_type="tick_data").SerializeToString()


@pytest.fixture(scope="module")
def pair() -> Iterator[Daemon]:
    """A parent with two workers."""
    with Daemon(workers=2) as running:
        yield running


def health(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.get("/health")[1])
    return found


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def pids(daemon: Daemon) -> list[int]:
    return [worker["pid"] for worker in health(daemon)["workers"]]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def counted(daemon: Daemon, outcome: str) -> float:
    families = text_string_to_metric_families(daemon.get("/metrics")[1])
    return sum(
        sample.value
        for family in families
        if family.name == "gateway_messages"
        for sample in family.samples
        if sample.labels["outcome"] == outcome
    )


def open_clients(stack: ExitStack, daemon: Daemon, count: int) -> list[RawClient]:
    clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(count)]
    for number, client in enumerate(clients):
        client.upgrade(daemon.token(f"user-{number}"))
    return clients


def test_connections_are_spread_and_added_up(pair: Daemon) -> None:
    with ExitStack() as stack:
        before = counted(pair, "received")
        clients = open_clients(stack, pair, 40)
        for client in clients:
            client.send_binary(TICK)
            client.ping()
        wait_for(lambda: health(pair)["connections"] == 40, "all are counted")
        shares = [worker["connections"] for worker in health(pair)["workers"]]
        assert len(shares) == 2
        assert min(shares) > 0, "both have some"
        wait_for(lambda: counted(pair, "delivered") == before + 40, "all are delivered")
        assert health(pair)["messages"]["imbalance"] == 0
        assert pair.get("/health/ready")[0] == 200
        assert "gateway_workers 2.0" in pair.get("/metrics")[1]


def test_crash_of_one_worker_loses_only_its_connections_and_it_comes_back(pair: Daemon) -> None:
    with ExitStack() as stack:
        clients = open_clients(stack, pair, 40)
        for client in clients:
            client.send_binary(TICK)
            client.ping()
        wait_for(lambda: health(pair)["connections"] == 40, "all are counted")
        share = health(pair)["workers"][0]["connections"]
        received = counted(pair, "received")
        victim, other = pids(pair)
        os.kill(victim, signal.SIGKILL)
        lost = 0
        for client in clients:
            try:
                client.ping()
            except (Closed, OSError):
                lost += 1
        assert lost == share
        wait_for(lambda: health(pair)["restarts"] == 1, "it is started again")
        wait_for(lambda: all(worker.get("ready") for worker in health(pair)["workers"]), "and ready")
        assert pids(pair)[1] == other
        assert counted(pair, "received") >= received, "no counter goes back"
        open_clients(stack, pair, 10)


def test_sigterm_drains_all_workers_and_leaves_none(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(workers=3, settings={"drain.reconnect_window_ms": 0})
    with ExitStack() as stack:
        clients = open_clients(stack, daemon, 12)
        wait_for(lambda: None not in pids(daemon), "all run")
        workers = pids(daemon)
        daemon.signal(signal.SIGTERM)
        for client in clients:
            assert client.close()[0] in (1012, 1000)
        assert daemon.process is not None
        assert daemon.process.wait(30) == 0
    assert not any(map(runs, workers))
    assert daemon.log().count('"event": "stopped"') == 3


def test_workers_end_with_a_parent_that_is_killed(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(workers=2)
    wait_for(lambda: None not in pids(daemon), "all run")
    workers = pids(daemon)
    daemon.kill()
    wait_for(lambda: not any(map(runs, workers)), "nobody is left")


def test_sighup_reaches_every_worker(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(workers=2)
    daemon.reconfigure(routes__topics={"tick_data": "elsewhere"})
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.log().count('"event": "reloaded"') == 2, "both have read it")


@pytest.mark.parametrize("ended", [False, True])
def test_settings_of_a_reload_while_no_worker_runs_are_those_that_workers_come_back_with(
    start_daemon: Callable[..., Daemon], ended: bool
) -> None:
    daemon = start_daemon(workers=2)
    victims = pids(daemon)
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)  # both end at once
    daemon.reconfigure(routes__topics={"tick_data": "elsewhere"})
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if ended:
        daemon.wait_log('"event": "worker ended"')
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(health(daemon)["workers"]) == 2 and not {*pids(daemon)} & {*victims}, "both are there again")
    taken = ('["elsewhere", "failed-messages"]', '"event": "reloaded"')  # started with it, or told when it listened
    wait_for(lambda: sum(map(daemon.log().count, taken)) >= 2, "both have the new route")


def test_parent_outlives_a_file_that_is_nested_too_deeply(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(workers=2)
    (daemon.home / "gateway.toml").write_text("a = " + "[" * 5000)
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("nested too deeply")
    assert runs(daemon.pid)
    assert daemon.get("/health/live")[0] == 200


def test_each_worker_has_its_own_spool_and_one_without_a_worker_is_named(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(workers=2)
    assert sorted(path.name for path in (daemon.home / "spool").iterdir()) == ["worker-0", "worker-1"]
    assert daemon.stop() == 0
    orphan = daemon.home / "spool" / "worker-7"
    orphan.mkdir()
    (orphan / "0000000001.spool").write_bytes(b"GWSPOOL1")
    daemon.start()
    daemon.wait_log(f'"directory": "{orphan}"')


def test_port_in_use_is_one_line_and_exit_status_1(daemon: Daemon) -> None:
    port = int(daemon.sidecar.rpartition(":")[2])
    with pytest.raises(RuntimeError, match=f"sidecar: 127.0.0.1:{port}: Address already in use"):
        Daemon(workers=2, settings={"sidecar.port": port}).__enter__()


PAGE = """# HELP gateway_messages_total Messages.
# TYPE gateway_messages_total counter
gateway_messages_total{outcome="received"} 5.0
# HELP gateway_connections Open.
# TYPE gateway_connections gauge
gateway_connections 3.0
# HELP gateway_kafka_up Up.
# TYPE gateway_kafka_up gauge
gateway_kafka_up 1.0
# HELP gateway_loop_lag_seconds Lag.
# TYPE gateway_loop_lag_seconds histogram
gateway_loop_lag_seconds_bucket{le="0.1"} 2.0
gateway_loop_lag_seconds_bucket{le="+Inf"} 4.0
gateway_loop_lag_seconds_count 4.0
gateway_loop_lag_seconds_sum 0.5
"""


def test_sum_adds_counters_and_gauges_takes_the_worst_and_keeps_what_ended_processes_counted() -> None:
    one, two = parse(PAGE), parse(PAGE.replace("gateway_kafka_up 1.0", "gateway_kafka_up 0.0"))
    total = Sum()
    total.learn({"gateway_kafka_up": "lowest"})
    total.retire(parse(PAGE))
    text = total.text([one, two], [GaugeMetricFamily("gateway_workers", 'Of a "host".', 2.0)]).decode()
    found = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["gateway_messages_total", ("received",)] == 15.0
    assert found["gateway_connections", ()] == 6.0, "of those that run"
    assert found["gateway_kafka_up", ()] == 0.0
    assert found["gateway_loop_lag_seconds_bucket", ("+Inf",)] == 12.0
    assert found["gateway_workers", ()] == 2.0
