"""Log lines: one line each, no secrets, no blocking, floods held back."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.telemetry.logging import MAX_LINES, Log, RateLimited
from gateway.telemetry.metrics import Metrics
from tests.counted import counted

HUSH = "eyJ-very-secret"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def lines_of(reader: int) -> list[dict[str, Any]]:
    os.set_blocking(reader, False)
    return [json.loads(line) for line in os.read(reader, 1_000_000).splitlines()]


def test_values_are_escaped_to_one_line(pipe: tuple[int, int]) -> None:
    log = Log(Metrics(), descriptor=pipe[1])
    log.info("hello\nworld", path="a\r\nb\x00\x1b[31m", odd="\ud800")
    log.close()
    (line,) = lines_of(pipe[0])
    assert line["event"] == "hello\nworld"
    assert line["level"] == "info"
    assert line["path"].startswith("a\r\nb")


@pytest.mark.parametrize("style", ["json", "console"])
def test_exceptions_never_show_local_variables_and_fields_with_secret_names_are_redacted(
    pipe: tuple[int, int], style: str
) -> None:
    log = Log(Metrics(), style=style, descriptor=pipe[1])

    def handle(token: str) -> None:
        raise ValueError("broken")

    try:
        handle(HUSH)
    except ValueError as error:
        log.error("failed", exc_info=error, access_token=HUSH, Authorization=f"Bearer {HUSH}")  # noqa: TRY400  # not the standard library's
    log.close()
    text = os.read(pipe[0], 1_000_000).decode()
    assert "broken" in text
    assert HUSH not in text
    assert text.count("\n") == 1


def test_levels_filter_and_may_change(pipe: tuple[int, int]) -> None:
    log = Log(Metrics(), level="warning", descriptor=pipe[1])
    log.info("unheard")
    log.set_level("debug")
    log.debug("heard")
    log.close()
    assert [line["event"] for line in lines_of(pipe[0])] == ["heard"]


def test_nobody_reading_costs_lines_not_time(pipe: tuple[int, int]) -> None:
    metrics = Metrics()
    log = Log(metrics, descriptor=pipe[1])
    began = time.monotonic()
    for number in range(MAX_LINES + 5000):
        log.info("a line that fills the pipe", number=number)
    assert time.monotonic() - began < 20
    assert counted(metrics, "gateway_log_lines_lost") > 0
    reader = threading.Thread(
        target=lambda: [None for _ in iter(lambda: os.read(pipe[0], 65_536).endswith(b'"end"}\n'), True)]
    )
    reader.start()
    log.close()
    os.write(pipe[1], b'{"event": "end"}\n')
    reader.join()


def test_a_flood_is_held_back_and_counted() -> None:
    now = 0.0
    written: list[tuple[str, dict[str, Any]]] = []
    limited = RateLimited(lambda event, **fields: written.append((event, fields)), lambda: now, per_s=2)
    for _ in range(10):
        limited("refused")
    assert len(written) == 2
    now = 1.0
    limited("refused", code="x")
    assert written[-1] == ("refused", {"code": "x", "held_back": 8})
