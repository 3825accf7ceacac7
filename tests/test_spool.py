"""The spool from outside: what Kafka does not take survives the process and goes out first at the next start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient, frame
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope

IMPATIENT = {"drain.flush_timeout_s": 1, "drain.close_timeout_s": 1, "session.close_timeout_s": 1}


def tick(user: str, number: int) -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id=user, company_id="acme", timestamp=number + 1
    ).SerializeToString()


def numbers(records: Records, count: int, user: str) -> list[int]:
    found = records.take(count, key=user)
    return [MessageEnvelope.FromString(record.value() or b"").timestamp - 1 for record in found]


def last_line(daemon: Daemon, event: str) -> dict[str, object]:
    """The fields of the last log line of ``event``."""
    lines = [json.loads(line) for line in daemon.log().splitlines() if f'"event": "{event}"' in line]
    assert lines, daemon.log()
    found: dict[str, object] = lines[-1]
    return found


def gateway(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def kafka() -> Iterator[Daemon]:
    """A Kafka in a process that can be stopped."""
    with Daemon(settings={"log.level": "warning"}) as host:
        yield host


def drained_without_kafka(daemon: Daemon, kafka: Daemon, user: str, count: int, signals: int = 1) -> int:
    """Send ``count`` messages to a gateway whose Kafka does not answer, then let it drain; the exit status."""
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token(user))
        kafka.signal(signal.SIGSTOP)
        try:
            for number in range(count):
                client.send_binary(tick(user, number))
            client.ping()
            for _ in range(signals - 1):
                daemon.signal(signal.SIGTERM)
                deadline = time.monotonic() + 10
                while '"draining"' not in daemon.log():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            return daemon.stop()
        finally:
            kafka.signal(signal.SIGCONT)


def test_what_a_drain_cannot_flush_is_spooled_and_goes_out_first_at_the_next_start(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    with Records(kafka.kafka, "tick-data") as records:
        assert drained_without_kafka(daemon, kafka, "alice", 500) == 0
        stopped = last_line(daemon, "stopped")
        assert (stopped["received"], stopped["spooled"], stopped["imbalance"]) == (500, 500, 0)
        daemon.start()
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("alice"))
            client.send_binary(tick("alice", 500))
            found = numbers(records, 501, "alice")
            while 500 not in found:  # what was under way when the drain gave up may have got through
                found += numbers(records, 1, "alice")
        assert list(dict.fromkeys(found)) == list(range(501)), "in order, the new one last"
        books = daemon.settled_books()
        assert (books["received"], books["delivered"], books["imbalance"]) == (501, 501, 0)
        assert "gateway_spool_replayed_total 500.0" in daemon.get("/metrics")[1]
        deadline = time.monotonic() + 10
        while list((daemon.home / "spool").glob("*.spool")):
            assert time.monotonic() < deadline, "what Kafka has is deleted"
            time.sleep(0.05)


def test_backlog_that_found_no_room_is_spooled_behind_the_queue(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={**IMPATIENT, "kafka.max_queued_messages": 20})
    with Records(kafka.kafka, "tick-data") as records:
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("alice"))
            kafka.signal(signal.SIGSTOP)
            try:
                client.sock.sendall(b"".join(frame(0x2, tick("alice", number)) for number in range(50)))
                deadline = time.monotonic() + 10
                while daemon.books()["in_flight"] != 20:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                assert daemon.stop() == 0
            finally:
                kafka.signal(signal.SIGCONT)
        stopped = last_line(daemon, "stopped")
        assert (stopped["received"], stopped["spooled"], stopped["imbalance"]) == (50, 50, 0)
        daemon.start()
        found: list[int] = []
        while 49 not in found:
            found += numbers(records, 1, "alice")
        assert list(dict.fromkeys(found)) == list(range(50))


def test_second_sigterm_cuts_the_drain_short_and_still_spools(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={"drain.flush_timeout_s": 600, "drain.close_timeout_s": 600})
    began = time.monotonic()
    assert drained_without_kafka(daemon, kafka, "alice", 50, signals=2) == 0
    assert time.monotonic() - began < 60
    stopped = last_line(daemon, "stopped")
    assert (stopped["received"], stopped["spooled"], stopped["imbalance"]) == (50, 50, 0)


def test_inspect_names_what_is_there_and_replay_sends_it_without_the_daemon(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    config = str(daemon.home / "gateway.toml")
    with Records(kafka.kafka, "tick-data") as records:
        held = gateway("spool", "replay", "--config", config)
        assert held.returncode == 1
        assert "in use by another process" in held.stderr
        assert drained_without_kafka(daemon, kafka, "alice", 30) == 0
        shown = gateway("spool", "inspect", "--config", config)
        assert shown.returncode == 0
        assert "30 records" in shown.stdout
        assert "tick-data 30" in shown.stdout
        lines = gateway("spool", "inspect", str(daemon.home / "spool"), "--records").stdout.splitlines()
        first = json.loads(lines[0])
        assert len(lines) == 30
        assert (first["user_id"], first["topic"], first["reason"]) == ("alice", "tick-data", "drain_timeout")
        done = gateway("spool", "replay", "--config", config)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
        assert "30 records offered to Kafka, 0 segments left" in done.stdout
        found: list[int] = []
        while 29 not in found:
            found += numbers(records, 1, "alice")
        assert list(dict.fromkeys(found)) == list(range(30))
        assert "0 records to send in 0 segments" in gateway("spool", "inspect", "--config", config).stdout


def test_replay_that_does_not_reach_kafka_keeps_everything(start_daemon: Callable[..., Daemon], kafka: Daemon) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    assert drained_without_kafka(daemon, kafka, "alice", 30) == 0
    daemon.reconfigure(kafka__bootstrap_servers="127.0.0.1:1")
    done = gateway("spool", "replay", "--config", str(daemon.home / "gateway.toml"), "--timeout", "1")
    assert done.returncode == 1
    assert "1 segments left" in done.stdout
    assert "30 records" in gateway("spool", "inspect", str(daemon.home / "spool")).stdout


def test_damaged_segment_is_named_sent_up_to_the_fault_and_kept_aside(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    assert drained_without_kafka(daemon, kafka, "alice", 30) == 0
    (segment,) = (daemon.home / "spool").glob("*.spool")
    content = segment.read_bytes()
    segment.write_bytes(content[:-10])
    shown = gateway("spool", "inspect", str(daemon.home / "spool"))
    assert shown.returncode == 1
    assert "29 records" in shown.stdout
    assert "damaged from byte" in shown.stdout
    with Records(kafka.kafka, "tick-data") as records:
        daemon.start()
        assert set(range(29)) <= set(numbers(records, 29, "alice"))
    damage = last_line(daemon, "spool segment damaged")
    assert (damage["segment"], damage["records"]) == (str(segment), 29)
    aside = Path(segment).with_suffix(".damaged")
    deadline = time.monotonic() + 10
    while not aside.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert aside.read_bytes() == content[:-10]
    assert not segment.exists()


def test_kafka_that_is_away_at_the_start_keeps_clients_out_until_the_spool_is_on_its_way(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    assert drained_without_kafka(daemon, kafka, "alice", 30) == 0
    with Records(kafka.kafka, "tick-data") as records:
        kafka.signal(signal.SIGSTOP)
        try:
            daemon._wait_ready = False
            daemon.start()
            status, body = daemon.get("/health/ready")
            assert status == 503
            assert "spool_not_sent_yet" in body
            with RawClient(daemon.url) as client:
                assert client.request(client.headers(daemon.token("alice"))).status == 503
        finally:
            kafka.signal(signal.SIGCONT)
        daemon.wait_ready()
        assert set(numbers(records, 30, "alice")) == set(range(30))
