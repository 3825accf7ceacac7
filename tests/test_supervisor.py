"""The parent of several workers, when they or the system misbehave; stand-ins for workers are real processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway import config
from gateway.daemon import worker, workers
from gateway.daemon.announce import Announcer
from gateway.daemon.workers import Supervisor
from gateway.telemetry.logging import Log
from gateway.telemetry.metrics import Metrics

STAND_IN = """
import http.server, json, os, pathlib, signal, sys, threading, time

home = pathlib.Path({home!r})
number = len(list(home.glob("started-*")))
(home / f"started-{{number}}").write_text(str(os.getpid()))


class Sidecar(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        cut = {cut} and number == 0
        body = b'{{"ready": true}}' if self.path == "/health" else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 9 * cut))
        self.end_headers()
        self.wfile.write(body)
        (home / f"asked-{{number}}").touch()

    def log_message(self, *_):
        pass


while {waits} and not (home / "go").exists():
    time.sleep(0.01)
server = http.server.HTTPServer(("127.0.0.1", 0), Sidecar)
threading.Thread(target=server.serve_forever, daemon=True).start()
signal.signal(signal.SIGHUP, lambda *_: (home / f"reloaded-{{number}}").touch())
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
announce = int(sys.argv[sys.argv.index("--announce-fd") + 1])
for event in (
    {{"event": "listening", "sidecar": f"http://127.0.0.1:{{server.server_port}}", "across": {{}}}},
    {{"event": "ready"}},
):
    os.write(announce, json.dumps(event).encode() + b"\\n")
while True:
    signal.pause()
"""


class Parent:
    """A running supervisor and what is known of its stand-ins."""

    def __init__(self, supervisor: Supervisor, home: Path, said: list[str]) -> None:
        self.supervisor = supervisor
        self.home = home
        self.said = said
        self.ended = trio.Event()

    async def run(self) -> None:
        await self.supervisor.run()
        self.ended.set()

    def pid(self, number: int) -> int:
        return int((self.home / f"started-{number}").read_text())

    async def wait_for(self, name: str) -> None:
        with trio.fail_after(20):
            while not (self.home / name).exists() or (name.startswith("started") and not self._written(name)):
                await trio.sleep(0.02)

    def _written(self, name: str) -> bool:
        return bool((self.home / name).read_text())


class Said(Announcer):
    """Notes what is announced."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(people=False)
        self._said = said

    def tell(self, event: str, **facts: Any) -> None:
        self._said.append(event)


Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run a supervisor with stand-ins in this process; SIGTERM ends it, as it does the real one."""
    monkeypatch.setattr(worker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(workers, "SCRAPE_S", 0.05)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(32))

    @asynccontextmanager
    async def running(
        count: int = 1, *, cut: bool = False, waits: bool = False, command: list[str] | None = None
    ) -> AsyncIterator[Parent]:
        flags = {"auth.secret_file": str(secret), "listen.port": 0, "sidecar.port": 0}
        source = STAND_IN.format(home=str(tmp_path), cut=cut, waits=waits)
        said: list[str] = []
        log = Log(Metrics(), level="critical")
        supervisor = Supervisor(
            config.load(None, flags),
            count,
            command or [sys.executable, "-c", source],
            log,
            version="0",
            announcer=Said(said),
        )
        parent = Parent(supervisor, tmp_path, said)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.run)
            with trio.fail_after(20):
                while "listening" not in said:
                    await trio.sleep(0.01)
            yield parent
            if not parent.ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            with trio.fail_after(20):
                await parent.ended.wait()
        log.close()

    return running


async def test_sidecar_that_ends_in_the_middle_of_an_answer_ends_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with start(2, cut=True) as parent:
        await parent.wait_for("asked-1")
        (parent.home / "asked-0").unlink(missing_ok=True)
        await parent.wait_for("asked-0")
        assert not parent.ended.is_set()
        assert not (parent.home / "started-2").exists(), "nobody was started again"
    assert not parent.supervisor.failed


async def test_worker_that_cannot_be_started_is_tried_again(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "program"
    async with start(command=[str(program)]) as parent:
        with trio.fail_after(20):
            while parent.supervisor.host.restarts < 2:
                await trio.sleep(0.02)
        script = STAND_IN.format(home=str(tmp_path), cut=False, waits=False)
        written = tmp_path / "written"
        written.write_text(f"#!{sys.executable}\n{script}")
        written.chmod(0o755)
        written.rename(program)
        with trio.fail_after(20):
            while "ready" not in parent.said:
                await trio.sleep(0.02)
    assert not parent.supervisor.failed


async def test_worker_that_hangs_is_not_ready_then_killed_and_started_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SCRAPE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(workers, "SILENT_S", 0.5)
    monkeypatch.setattr(workers, "HUNG_S", 1.5)
    async with start() as parent:
        await parent.wait_for("asked-0")
        with trio.fail_after(20):
            while parent.supervisor.host.reasons():
                await trio.sleep(0.02)
        os.kill(parent.pid(0), signal.SIGSTOP)
        with trio.fail_after(20):
            while parent.supervisor.host.reasons() != ["worker 0: does not answer"]:
                await trio.sleep(0.02)
        await parent.wait_for("asked-1")
        assert parent.supervisor.host.restarts == 1
    assert not parent.supervisor.failed


async def test_reload_waits_for_a_worker_that_is_still_starting(start: Start) -> None:
    async with start(waits=True) as parent:
        await parent.wait_for("started-0")
        os.kill(os.getpid(), signal.SIGHUP)
        with trio.fail_after(20):
            while not parent.supervisor._workers[0].reload:
                await trio.sleep(0.02)
        (parent.home / "go").touch()
        await parent.wait_for("reloaded-0")
        assert parent.supervisor.host.restarts == 0


async def test_drain_while_workers_are_starting_is_no_failure(start: Start) -> None:
    async with start(2, waits=True) as parent:
        await parent.wait_for("started-0")
        await parent.wait_for("started-1")
    assert not parent.supervisor.failed
