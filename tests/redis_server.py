"""A redis-server of the tests' own: started, stopped, killed, started again empty."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType


def why_not() -> str | None:
    """Why there can be no Redis here, None when there can."""
    return None if shutil.which("redis-server") else "no redis-server (Debian: redis-server)"


class RedisServer:
    """A Redis on a free port of loopback, without anything on disk."""

    def __init__(self, *options: str) -> None:
        self._options = options
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="gateway-redis-")

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Start it, empty."""
        log = (Path(self._directory.name) / "log").open("ab")
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with log:
            self._process = subprocess.Popen(
                [*command, "--dir", self._directory.name, *self._options], stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 10
        while True:
            try:
                assert self.command("PING") == "+PONG"
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    def stop_answering(self) -> None:
        """Let it stand still until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def lines(self, *words: str) -> str:
        """Send one command that is answered with a text; what of it comes at once."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall(" ".join(words).encode() + b"\r\n")
            time.sleep(0.05)
            return sock.recv(65_536).decode()

    def command(self, *words: str) -> str:
        """Send one command; the first line of its answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall(
                f"*{len(words)}\r\n".encode() + b"".join(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)
            )
            return sock.makefile("r").readline().strip()
