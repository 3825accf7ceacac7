"""What a program that starts a daemon is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gateway.daemon.announce import Addresses, Announcer, read_event
from gateway.testing.daemon import Daemon


def test_events_are_one_json_object_a_line() -> None:
    reading, writing = os.pipe()
    announcer = Announcer(writing, people=False)
    announcer.listening(Addresses("ws://a", "http://b", "c:9092"), {"gateway_ready": "highest"})
    announcer.ready()
    announcer.tell("fault", fault="two\nlines")
    os.close(writing)
    with os.fdopen(reading) as lines:
        events = [read_event(line) for line in lines]
    assert [event["event"] for event in events] == ["listening", "ready", "fault"]
    assert (events[0]["kafka"], events[0]["across"], events[2]["fault"]) == (
        "c:9092",
        {"gateway_ready": "highest"},
        "two\nlines",
    )


def test_reader_that_has_gone_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    announcer = Announcer(writing, people=False)
    announcer.ready()
    announcer.ready()
    os.close(writing)


@pytest.mark.parametrize("line", ["", "gateway: ready", "[]", "{}", '{"event": 1}', "null"])
def test_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_event(line)


def test_fault_that_stops_a_start_is_announced_too() -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "gateway", "serve", "--announce-fd", str(writing), "--set", "listen.port=-1"]
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=(writing,), check=False, timeout=60)
    os.close(writing)
    with os.fdopen(reading) as lines:
        faults = [event["fault"] for event in map(json.loads, lines)]
    assert done.returncode == 1
    assert any(fault.startswith("listen.port") for fault in faults)
    assert [f"gateway: {fault}" for fault in faults] == done.stderr.splitlines()


def test_people_are_told_in_sentences_as_before(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(daemon.home / "gateway.toml")]
    process = subprocess.Popen(
        [*command, "--embedded-kafka", "--set", "spool.directory="],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(4)]
    process.terminate()
    process.communicate(timeout=30)
    assert [line.rpartition(" ")[0] for line in said[:2]] == ["gateway: listening on", "gateway: sidecar on"]
    assert said[2].startswith("gateway: kafka at 127.0.0.1:")
    assert said[2].endswith(" (embedded)\n")
    assert said[3] == "gateway: ready\n"
