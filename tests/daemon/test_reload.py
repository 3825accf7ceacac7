"""A reload takes what the sections say it takes, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import config
from gateway.config import Settings
from gateway.config.settings import SECTIONS
from gateway.daemon.lifecycle import Lifecycle
from gateway.daemon.reload import Reload
from gateway.errors import ConfigError
from gateway.telemetry.metrics import Metrics
from tests.counted import counted

SECRET = "s" * 40


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.level = ""

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    error = warning = info

    def set_level(self, level: str) -> None:
        self.level = level


def settings(**flags: Any) -> Settings:
    return config.load(
        None, {"auth.secret": SECRET, **{name.replace("__", "."): value for name, value in flags.items()}}
    )


def make(load: Callable[[], Settings]) -> tuple[Reload, Log, Metrics, list[str]]:
    log, metrics, told = Log(), Metrics(), list[str]()

    async def look_at_tokens() -> None:
        """There are no sessions."""

    def use_tiers(tiers: object, now: float) -> list[Any]:
        told.append("tiers")
        return []

    daemon: Any = SimpleNamespace(
        log=log,
        metrics=metrics,
        settings=settings(),
        lifecycle=Lifecycle(),
        secured=False,
        kafka=SimpleNamespace(
            delivery=SimpleNamespace(use_routes=lambda routes: told.append("routes")),
            books=SimpleNamespace(tenants=SimpleNamespace(use_tiers=use_tiers)),
        ),
        ws=SimpleNamespace(
            gatekeeper=SimpleNamespace(use_rules=lambda rules, **_: told.append("auth")),
            listener=SimpleNamespace(use_tls=lambda context: told.append("tls")),
            memory=SimpleNamespace(use_budget=lambda budget: told.append("memory")),
            sessions=SimpleNamespace(
                look_at_tokens=look_at_tokens, inspection=SimpleNamespace(want=lambda wanted: told.append("monitoring"))
            ),
            admission=SimpleNamespace(protection=SimpleNamespace(use_rules=lambda *_: told.append("breaker"))),
        ),
    )
    reload = Reload(
        daemon, load, on_reloaded=lambda: told.append("reloaded"), routes_changed=lambda: told.append("topics")
    )
    return reload, log, metrics, told


def test_every_section_with_live_settings_has_somebody_who_takes_it() -> None:
    reload, _, _, _ = make(settings)
    assert reload.sections == {name for name, section in SECTIONS.items() if section.live_keys()}


async def test_what_is_live_is_taken_and_the_rest_named() -> None:
    reload, log, metrics, told = make(lambda: settings(log__level="debug", log__format="console", listen__port=1))
    await reload.reload()
    assert (log.level, told) == ("debug", ["auth", "tls", "tiers", "breaker", "memory", "monitoring", "reloaded"])
    assert log.lines == [("reloaded", {"needs_restart": ["listen.port", "log.format"]})]
    assert (reload.settings.log.level, reload.settings.log.format, reload.settings.listen.port) == (
        "debug",
        "json",
        8001,
    )
    assert counted(metrics, "gateway_reloads", outcome="ok") == 1


async def test_one_part_that_cannot_leaves_all_as_they_were() -> None:
    reload, log, metrics, told = make(lambda: settings(log__level="debug"))

    async def prepare(_: Settings) -> Callable[[], None]:
        raise ConfigError(["late: no"])

    reload.subscribe("late", prepare)
    await reload.reload()
    assert (log.level, told, reload.settings.log.level) == ("", [], "info")
    assert log.lines == [("reload failed, the old settings stay", {"faults": ["late: no"]})]
    assert counted(metrics, "gateway_reloads", outcome="failed") == 1


@pytest.mark.parametrize("error", [OSError("gone"), ZeroDivisionError("a bug")])
async def test_no_file_ends_a_daemon_that_runs(error: Exception) -> None:
    def load() -> Settings:
        raise error

    reload, log, metrics, told = make(load)
    await reload.reload()
    assert told == []
    assert log.lines[0][1] == {"exc_info": error}
    assert counted(metrics, "gateway_reloads", outcome="failed") == 1
