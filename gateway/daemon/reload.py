"""A reload: the settings read again, and what may change taken, all or nothing.

The parts subscribe to the section of the settings that they live by. Each is asked to prepare for the new settings,
which may fail; only when all are prepared is anything applied. What no reload takes is named as wanting a restart; the
sections themselves say which is which (`gateway.config.settings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from gateway import config
from gateway.config.tls import tls_context
from gateway.core import catalogue
from gateway.daemon import systemd
from gateway.daemon.materials import token_rules
from gateway.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.config import Settings
    from gateway.daemon.assemble import Daemon
    from gateway.daemon.operations import Operations
    from gateway.telemetry.metrics import Labelled, Metrics

    Apply = Callable[[], None]
    Prepare = Callable[[Settings], Awaitable[Apply]]


class Reload:
    """Reloads, one after the other (`run`). ``settings`` are those in force."""

    def __init__(
        self,
        daemon: Daemon,
        load: Callable[[], Settings],
        *,
        on_reloaded: Callable[[], None],
        routes_changed: Callable[[], None],
    ) -> None:
        """``load`` reads the settings again; ``on_reloaded`` is told when they have been taken, ``routes_changed`` when
        there are other topics to look for."""
        self._daemon = daemon
        self._load = load
        self._on_reloaded = on_reloaded
        self._routes_changed = routes_changed
        self._log = daemon.log
        self._outcomes = _declare(daemon.metrics)
        self.settings = daemon.settings
        self._subscribers: dict[str, Prepare] = {}
        self.subscribe("routes", self._prepare_routes)
        self.subscribe("auth", self._prepare_auth)
        self.subscribe("tls", self._prepare_tls)
        self.subscribe("log", self._prepare_log)
        self.subscribe("tiers", self._prepare_tiers)
        self.subscribe("breaker", self._prepare_breaker)
        self.subscribe("memory", self._prepare_memory)
        self.subscribe("monitoring", self._prepare_monitoring)

    @property
    def sections(self) -> frozenset[str]:
        """The sections that somebody takes."""
        return frozenset(self._subscribers)

    def subscribe(self, section: str, prepare: Prepare) -> None:
        """Let a part take a section: ``prepare`` gets the new settings and returns what applies them.

        It raises GatewayError for what cannot be used, and changes nothing itself.
        """
        self._subscribers[section] = prepare

    async def run(self, operations: Operations) -> None:
        """Reload whenever that is asked for, until cancelled."""
        while True:
            await operations.wait_reload()
            ready = self._daemon.lifecycle.state.value == "ready"
            if ready:
                systemd.reloading()
            await self.reload()
            if ready:
                systemd.notify("READY=1")

    async def reload(self) -> None:
        """Read the settings again; a fault is logged and leaves everything as it was."""
        try:
            settings = self._load()
            applies = [await prepare(settings) for prepare in self._subscribers.values()]
        except GatewayError as error:
            self._outcomes.add("failed")
            self._log.error("reload failed, the old settings stay", faults=str(error).splitlines())
        except Exception as error:  # no file may end a daemon that runs
            self._outcomes.add("failed")
            self._log.error("reload failed, the old settings stay", exc_info=error)
        else:
            restart = config.needs_restart(self.settings, settings)
            self.settings = config.with_live(self.settings, settings)
            for apply in applies:
                apply()
            await self._daemon.ws.sessions.look_at_tokens()
            self._outcomes.add("ok")
            self._say_reloaded(restart, config.copied_by_systemd(settings))
            self._on_reloaded()

    def _say_reloaded(self, restart: list[str], copied: list[str]) -> None:
        notes: dict[str, object] = {}
        if restart:
            notes["needs_restart"] = restart
        if copied:
            notes["not_renewed"] = copied
            notes["remedy"] = "systemd copies credentials when the unit starts: restart it to renew them"
        self._log.info("reloaded", **notes)

    # The parts

    async def _prepare_routes(self, settings: Settings) -> Apply:
        """Topics that routes name anew must be there: Kafka is asked."""
        if settings.routes == self.settings.routes:
            return lambda: None
        new = sorted({*settings.table.all_topics()} - {*self.settings.table.all_topics()})
        if new and self._daemon.lifecycle.state.value != "starting":  # then they are waited for anyway
            await self._check_topics(new)

        def apply() -> None:
            self._daemon.kafka.delivery.use_routes(settings.table)
            self._routes_changed()
            for message_type in settings.routes.topics:
                self._daemon.kafka.books.tally("", message_type)

        return apply

    async def _check_topics(self, topics: list[str]) -> None:
        """Raise ConfigError unless every topic is there and may be written to."""
        missing, forbidden = await self._daemon.kafka.producer.cluster.unusable(topics)
        if missing is None:
            raise ConfigError([f"routes: Kafka does not answer, so {', '.join(topics)} cannot be looked for"])
        faults = [f"routes: topic {topic} does not exist in Kafka: create it first" for topic in missing]
        faults += [f"routes: not authorised for topic {topic}" for topic in forbidden]
        if faults:
            raise ConfigError(faults)

    async def _prepare_auth(self, settings: Settings) -> Apply:
        rules, gatekeeper = token_rules(settings, self._log), self._daemon.ws.gatekeeper
        return lambda: gatekeeper.use_rules(rules, allow_query_token=settings.auth.allow_query_token)

    async def _prepare_tls(self, settings: Settings) -> Apply:
        if self._daemon.secured != (settings.tls.cert_file is not None):
            raise ConfigError(["tls: cannot be switched on or off while running"])
        context = tls_context(settings.tls)
        return lambda: self._daemon.ws.listener.use_tls(context)

    async def _prepare_tiers(self, settings: Settings) -> Apply:
        def apply() -> None:
            for holder in self._daemon.kafka.books.tenants.use_tiers(settings.tiers.limits, trio.current_time()):
                holder.revoke(catalogue.CLOSE_REPLACED)

        return apply

    async def _prepare_breaker(self, settings: Settings) -> Apply:
        protection = self._daemon.ws.admission.protection
        return lambda: protection.use_rules(settings.breaker.rules, settings.breaker.exempt)

    async def _prepare_memory(self, settings: Settings) -> Apply:
        return lambda: self._daemon.ws.memory.use_budget(settings.memory.budget_bytes)

    async def _prepare_monitoring(self, settings: Settings) -> Apply:
        return lambda: self._daemon.ws.sessions.inspection.want(settings.monitoring.inspect_ticks)

    async def _prepare_log(self, settings: Settings) -> Apply:
        return lambda: self._log.set_level(settings.log.level)


def _declare(metrics: Metrics) -> Labelled:
    return metrics.labelled("gateway_reloads", "Reloads by SIGHUP.", "outcome", ("ok", "failed"))
