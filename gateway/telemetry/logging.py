"""Structured log lines that never block the event loop.

A line is built on the Trio thread and written by one thread of its own: a reader of standard error that stops
reading costs lines (counted), not ticks. Values are escaped to one line; exceptions carry a traceback without local
variables, since those may hold tokens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway.errors import NoThread

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from gateway.telemetry.metrics import Metrics

LEVELS: Final = ("debug", "info", "warning", "error")
MAX_LINES: Final = 10_000
"""Lines waiting for the writer, about 300 bytes each; further ones are counted and lost."""

_SECRET_WORDS: Final = ("token", "authorization", "secret", "password")


class LineWriter:
    """A bounded queue of lines and the daemon thread that writes them to a file descriptor."""

    def __init__(self, descriptor: int, metrics: Metrics) -> None:
        self._descriptor = descriptor
        self._lost = metrics.counter("gateway_log_lines_lost", "Log lines nobody read.")
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="log-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise NoThread(f"no thread can be had for the log: {error}; allow the process more of them") from error

    def msg(self, line: bytes) -> None:
        """Queue one line without its line feed; never blocks."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost.add()

    debug = info = warning = error = critical = exception = msg

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is queued, for at most ``timeout_s`` seconds."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            data = line + b"\n"
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self._lost.add()


def _redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The last line of defence: a field with a secret's name never gets out."""
    for name in event:
        if any(word in name.lower() for word in _SECRET_WORDS):
            event[name] = "[redacted]"
    return event


def _escape(_: Any, __: str, line: Any) -> bytes:
    return str(line).replace("\r", "\\r").replace("\n", "\\n").encode("utf-8", "backslashreplace")


class Log:
    """The process's logger: build one a process, pass it on. ``level`` may change while running."""

    def __init__(self, metrics: Metrics, *, level: str = "info", style: str = "json", descriptor: int = 2) -> None:
        self._writer = LineWriter(descriptor, metrics)
        self._style = style
        self.logger: structlog.typing.FilteringBoundLogger
        self.set_level(level)

    def set_level(self, level: str) -> None:
        """Change the level: one of `LEVELS`."""
        render: Any = (
            structlog.processors.JSONRenderer(ensure_ascii=False)
            if self._style == "json"
            else structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24, sort_keys=False)
        )
        traceback = (
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
            )
            if self._style == "json"
            else structlog.processors.format_exc_info
        )
        self.logger = structlog.wrap_logger(
            self._writer,
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                traceback,
                _redact,
                render,
                _escape,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
            cache_logger_on_first_use=False,
        )

    def debug(self, event: str, **fields: Any) -> None:
        """Log at debug level."""
        self.logger.debug(event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log at info level."""
        self.logger.info(event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log at warning level."""
        self.logger.warning(event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log at error level; ``exc_info=error`` adds a traceback."""
        self.logger.error(event, **fields)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()


class RateLimited:
    """Lets ``per_s`` lines of one kind through in a second; the next one says how many were held back.

    For lines that clients can cause: refusals, protocol errors, crashes of a session.
    """

    def __init__(self, write: Callable[..., None], clock: Callable[[], float], per_s: int = 5) -> None:
        self._write = write
        self._clock = clock
        self._per_s = per_s
        self._second = float("-inf")
        self._written = 0
        self._held = 0

    def __call__(self, event: str, **fields: Any) -> None:
        now = self._clock()
        if now - self._second >= 1.0:
            self._second = now
            self._written = 0
        if self._written >= self._per_s:
            self._held += 1
            return
        self._written += 1
        if self._held:
            fields["held_back"], self._held = self._held, 0
        self._write(event, **fields)


def stderr_descriptor() -> int:
    """Where log lines go: standard error's descriptor."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return 2
