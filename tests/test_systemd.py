"""What systemd hears, over a real datagram socket."""

from __future__ import annotations

import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.daemon import systemd
from gateway.testing.daemon import Daemon


class Manager:
    """What systemd hears; always listening, since a datagram socket of nobody who reads is full after ten messages."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._heard: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._sock.recv(4096).decode():
            self._heard.put(message)

    def hear(self, what: str) -> list[str]:
        """Messages up to the one that begins with ``what``."""
        heard: list[str] = []
        while not heard or not heard[-1].startswith(what):
            heard.append(self._heard.get(timeout=30))
        return heard

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._sock.getsockname())
        self._thread.join()
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_ready_reload_watchdog_and_stop_are_told(
    manager: Manager, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    daemon = start_daemon(environment=environment)
    manager.hear("READY=1")
    manager.hear("WATCHDOG=1")
    manager.hear("WATCHDOG=1")
    daemon.signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in manager.hear("RELOADING=1")[-1]
    manager.hear("READY=1")
    assert daemon.stop() == 0
    assert "EXTEND_TIMEOUT_USEC=60000000" in manager.hear("STOPPING=1")[-1]


def test_not_ready_while_kafka_is_not_reached(
    manager: Manager, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon("127.0.0.1:1", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}, wait_ready=False)
    heard = manager.hear("STATUS=waiting for Kafka")
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
