"""What systemd hears, over a real datagram socket."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.daemon import Daemon
from gateway import systemd


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(15)
    return sock


def hear(manager: socket.socket, what: str) -> list[str]:
    """Messages up to the one that begins with ``what``."""
    heard: list[str] = []
    while not heard or not heard[-1].startswith(what):
        heard.append(manager.recv(4096).decode())
    return heard


def test_ready_reload_watchdog_and_stop_are_told(
    manager: socket.socket, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    with manager:
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        daemon = start_daemon(environment=environment)
        hear(manager, "READY=1")
        hear(manager, "WATCHDOG=1")
        hear(manager, "WATCHDOG=1")
        daemon.signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in hear(manager, "RELOADING=1")[-1]
        hear(manager, "READY=1")
        assert daemon.stop() == 0
        hear(manager, "STOPPING=1")


def test_not_ready_while_kafka_is_not_reached(
    manager: socket.socket, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    with manager:
        daemon = start_daemon("127.0.0.1:1", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}, wait_ready=False)
        heard = hear(manager, "STATUS=waiting for Kafka")
        assert not any(message.startswith("READY") for message in heard)
        assert daemon.stop() == 0


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    systemd.notify("READY=1")
    assert systemd.watchdog_interval_s() is None
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    systemd.notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert systemd.watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval_s() is None
