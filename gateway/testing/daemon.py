"""A real gateway process for benches, tests and the demo: configured, started, watched, stopped."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr

from gateway.config import AuthSettings
from gateway.daemon.announce import read_event
from gateway.errors import GatewayError
from gateway.ops.probe import fetch
from gateway.testing.devkeys import mint_with_secret
from gateway.testing.kafka import cpu_seconds, rss_bytes

NO_LIMITS: dict[str, Any] = {
    **{
        f"tiers.{tier}.{limit}": 0
        for tier in ("free", "pro", "enterprise")
        for limit in ("messages_per_second", "users", "accounts", "connections_per_account")
    },
    "breaker.share": 1,
}
"""Settings under which nobody meets a limit of its tenant, and nobody is shut out."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a server ended: messages its own account cannot place, and its exit status."""

    imbalance: int
    exit_status: int


class DaemonFailed(GatewayError, RuntimeError):
    """The daemon did not start; the message ends with its log."""


class Daemon:
    """``gateway serve`` as a child process, from entering to leaving the context.

    ``kafka`` is a bootstrap address, or ``embedded``. ``settings`` are dotted settings over those a test needs: free
    ports, a secret of its own, no limit on handshakes and none of tenants (`NO_LIMITS`). With ``cpus`` the process is
    pinned as ``taskset -c`` does. ``environment`` changes this process' own for it; None takes a variable out.
    ``prepare`` may put files into its directory.
    """

    def __init__(
        self,
        kafka: str = "embedded",
        *,
        settings: dict[str, Any] | None = None,
        cpus: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        wait_ready: bool = True,
        workers: int = 1,
        prepare: Callable[[Path], object] = lambda home: None,
    ) -> None:
        self.secret = secrets.token_urlsafe(48).encode()
        self._embedded = kafka == "embedded"
        self._settings: dict[str, Any] = {
            "listen.port": 0,
            "sidecar.port": 0,
            "spool.directory": "spool",
            "listen.handshakes_per_address_per_s": 0,
            "listen.max_pending_per_address": 0,
            **NO_LIMITS,
            **({} if self._embedded else {"kafka.bootstrap_servers": kafka}),
            **(settings or {}),
        }
        self._cpus = cpus
        self._environment = environment or {}
        self._wait_ready = wait_ready
        self._workers = workers
        self._prepare = prepare
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.sidecar = ""
        self.kafka = ""

    @property
    def home(self) -> Path:
        """The daemon's directory: ``gateway.toml``, ``log`` and whatever the caller puts there."""
        assert self._directory is not None
        return Path(self._directory.name)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="gateway-daemon-")
        (self.home / "secret").write_bytes(self.secret)
        self._settings.setdefault("auth.secret_file", "secret")
        self.write_config(self._settings)
        try:
            self._prepare(self.home)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        if self._directory is not None:
            self._directory.cleanup()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _release(self) -> None:
        self.kill()
        if self.process is not None:
            self._reader.join()

    def write_config(self, settings: dict[str, Any]) -> Path:
        """Write dotted settings as the daemon's TOML file."""
        sections: dict[str, list[str]] = {}
        for dotted, value in settings.items():
            section, _, key = dotted.partition(".")
            sections.setdefault(section, []).append(f"{key} = {_toml(value)}")
        text = "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items())
        path = self.home / "gateway.toml"
        path.write_text(text + "\n")
        return path

    def reconfigure(self, **settings: Any) -> None:
        """Change settings in the file (``routes__topics=...``); a SIGHUP makes the daemon read it."""
        self._settings.update({name.replace("__", "."): value for name, value in settings.items()})
        self.write_config(self._settings)

    def start(self) -> None:
        """Start the process, again if it has ended; wait for its addresses, and its readiness unless told not to."""
        self._release()
        self._events = queue.Queue()
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(self.home / "gateway.toml")]
        command += ["--announce-fd", str(writing)]
        if self._workers > 1:
            command += ["--workers", str(self._workers)]
        if self._embedded:
            command.append("--embedded-kafka")
        if self._cpus:
            command = ["taskset", "-c", self._cpus, *command]
        environment = {**os.environ, **self._environment}
        try:
            with (self.home / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env={name: value for name, value in environment.items() if value is not None},
                    pass_fds=(writing,),
                )
        finally:
            os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(reading, self._events), daemon=True)
        self._reader.start()
        listening = self._expect("listening")
        self.url, self.sidecar, self.kafka = listening["listen"], listening["sidecar"], listening["kafka"]
        if self._wait_ready:
            self.wait_ready()

    @staticmethod
    def _read(announced: int, events: queue.Queue[dict[str, Any] | None]) -> None:
        with os.fdopen(announced) as lines:
            for line in lines:
                events.put(read_event(line))
        events.put(None)

    def _expect(self, what: str) -> dict[str, Any]:
        """The next event of a kind; others before it are passed over."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DaemonFailed(f"the daemon did not announce {what!r}:\n{self.log()}") from None
            if event is None:
                raise DaemonFailed(f"the daemon ended before it announced {what!r}:\n{self.log()}")
            if event["event"] == what:
                return event

    def wait_ready(self) -> None:
        """Wait until the daemon says it is ready."""
        self._expect("ready")

    def log(self) -> str:
        """What the daemon has written to standard error so far."""
        return (self.home / "log").read_text(errors="replace")

    def wait_log(self, text: str, timeout_s: float = 30.0) -> str:
        """What the log says once it says ``text``: its writer is a thread of the daemon's own."""
        deadline = time.monotonic() + timeout_s
        while text not in (log := self.log()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the log does not say {text!r}:\n{log}")
            time.sleep(0.01)
        return log

    def token(self, user: str = "alice", company: str = "acme", tier: str = "pro", ttl_s: int = 3600) -> str:
        """A token this daemon accepts."""
        return mint_with_secret(
            AuthSettings(secret=SecretStr(self.secret.decode())),
            self.secret,
            user_id=user,
            company_id=company,
            tier=tier,
            ttl_s=ttl_s,
        )

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on the sidecar."""
        status, body = fetch(self.sidecar + path, 10.0)
        return status, body.decode()

    def books(self) -> dict[str, int]:
        """The totals of ``/health``."""
        totals: dict[str, int] = json.loads(self.get("/health")[1])["messages"]
        return totals

    def settled_books(self, timeout_s: float = 10.0) -> dict[str, int]:
        """The totals once nothing is in flight any more, or when that takes too long."""
        deadline = time.monotonic() + timeout_s
        while (books := self.books())["in_flight"] and time.monotonic() < deadline:
            time.sleep(0.02)
        return books

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal; return from SIGSTOP when all of its threads have stopped, which takes a while."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while not _stopped(self.pid):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process {self.pid} has not stopped")
                time.sleep(0.001)

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, then the exit status."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(timeout_s)

    def finish(self) -> Outcome:
        """The books' imbalance, then SIGTERM and the exit status."""
        return Outcome(self.books()["imbalance"], self.stop())

    def cpu_s(self) -> float:
        """CPU seconds of the process, Kafka threads included."""
        return cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        return rss_bytes(self.pid)


def _stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped (proc(5), the third field of stat)."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state == "T" for state in states)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)
