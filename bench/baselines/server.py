"""Builds and runs the baselines, so that `bench.compare` can treat them like a gateway."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import SecretStr

from gateway.config import AuthSettings
from gateway.testing.daemon import Outcome
from gateway.testing.devkeys import mint_with_secret
from gateway.testing.kafka import cpu_seconds, free_ports, rss_bytes

HERE = Path(__file__).parent
PROTOS = HERE.parent.parent / "protos"
BUILD_TIMEOUT_S = 900.0


class BaselineUnavailable(Exception):
    """A baseline cannot be built here; the message says what is missing."""


def _built(name: str, tools: tuple[str, ...], commands: list[list[str]]) -> Path:
    """A build directory of ``bench/baselines/NAME``, made by ``commands`` unless its sources were built before."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise BaselineUnavailable(f"{', '.join(missing)} is not installed")
    source = HERE / name
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gateway"
    target = cache / f"baseline-{name}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        work = Path(directory) / name
        shutil.copytree(source, work)
        for command in commands:
            done = subprocess.run(
                command, cwd=work, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
            )
            if done.returncode:
                raise BaselineUnavailable(f"{' '.join(command)} failed: {(done.stderr or done.stdout)[-400:]}")
        work.rename(target)
    return target


def _python(module: str, needs: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", f"import {needs}"], capture_output=True, check=False)
    if done.returncode:
        raise BaselineUnavailable(f"{needs} is not installed (the bench extra has it)")
    return [sys.executable, "-m", f"bench.baselines.{module}"]


def _go() -> list[str]:
    return [str(_built("go", ("go",), [["go", "mod", "tidy"], ["go", "build", "-o", "baseline", "."]]) / "baseline")]


def _rust() -> list[str]:
    built = _built("rust", ("cargo", "cc", "make"), [["cargo", "build", "--release", "--quiet"]])
    return [str(built / "target" / "release" / "baseline")]


def _node() -> list[str]:
    built = _built("node", ("node", "npm"), [["npm", "install", "--silent", "--no-audit", "--no-fund"]])
    return ["node", str(built / "main.js")]


BASELINES: dict[str, Callable[[], list[str]]] = {
    "picows": lambda: _python("picows_uvloop", "picows, uvloop"),
    "go": _go,
    "rust": _rust,
    "node": _node,
    "websockets": lambda: _python("websockets_trio", "websockets.trio.server"),
    "trio-websocket": lambda: _python("trio_websocket_server", "trio_websocket"),
}
"""Name to what prepares it and gives its command."""


class Baseline:
    """One baseline as a child process, with what `bench.ingest` needs of a server. Raises BaselineUnavailable."""

    def __init__(self, name: str, kafka: str, *, cpus: str | None = None) -> None:
        self.kafka = kafka
        self._name = name
        self._cpus = cpus
        self._secret = secrets.token_urlsafe(48).encode()
        self._port = free_ports(1)[0]
        self.url = f"ws://127.0.0.1:{self._port}/ws/mt5"

    def __enter__(self) -> Self:
        pin = ["taskset", "-c", self._cpus] if self._cpus else []
        self._process = subprocess.Popen(
            [*pin, *BASELINES[self._name]()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "BASELINE_PORT": str(self._port),
                "BASELINE_KAFKA": self.kafka,
                "BASELINE_SECRET": self._secret.decode(),
                "BASELINE_PROTOS": str(PROTOS),
            },
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            self.__exit__(None, None, None)
            raise BaselineUnavailable(f"{self._name} did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def token(self, user: str, company: str) -> str:
        """A token this server accepts."""
        auth = AuthSettings(secret=SecretStr(self._secret.decode()))
        return mint_with_secret(auth, self._secret, user_id=user, company_id=company, tier="pro", ttl_s=3600)

    def cpu_s(self) -> float:
        """CPU seconds of the process with all its threads."""
        return cpu_seconds(self._process.pid)

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        return rss_bytes(self._process.pid)

    def finish(self) -> Outcome:
        """SIGTERM, and what it says at its end."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline() or '{"received": 0, "delivered": -1}')
        return Outcome(said["received"] - said["delivered"], self._process.wait(60))
