"""What the settings name, read and checked: keys, certificate, Kafka properties. Everything here may block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway import config
from gateway.config import keys
from gateway.config.tls import check_tls, tls_context
from gateway.errors import ConfigError, GatewayError
from gateway.kafka.properties import check_properties

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection

    from gateway.config import Settings
    from gateway.config.promises import Property
    from gateway.core.credentials import TokenRules
    from gateway.telemetry.logging import Log


@dataclass(frozen=True, slots=True)
class Materials:
    """What the settings name, read and checked."""

    rules: TokenRules
    tls: ssl.SSLContext | None
    properties: dict[str, Property]
    """librdkafka's, secrets included."""


def read(settings: Settings, log: Log) -> Materials:
    """Read everything that the settings name; keys that are of no use are logged. Raises ConfigError.

    Blocks as long as the files do.
    """
    config.check_descriptors(settings.listen.max_connections)
    return Materials(token_rules(settings, log), tls_context(settings.tls), config.kafka_properties(settings.kafka))


def token_rules(settings: Settings, log: Log) -> TokenRules:
    """Read the keys; those that are of no use are logged. Raises ConfigError."""
    skipped: list[str] = []
    rules = keys.token_rules(settings.auth, skipped)
    for reason in skipped:
        log.warning("key left out", reason=reason)
    return rules


def check(settings: Settings, skipped: list[str], unseen: Collection[str] = ()) -> None:
    """Raise ConfigError with every fault that `read` and the start would meet one by one.

    Files of ``unseen`` settings are left out. Keys that are of no use are added to ``skipped``. Connects to nothing.
    """
    checks: list[Callable[[], object]] = [
        lambda: keys.token_rules(settings.auth, skipped, unseen),
        lambda: check_tls(settings.tls, unseen),
        lambda: config.check_descriptors(settings.listen.max_connections),
        lambda: check_properties(config.kafka_properties(settings.kafka, unseen)),
    ]
    faults: list[str] = []
    for one in checks:
        try:
            one()
        except GatewayError as error:
            faults += str(error).splitlines()
    if faults:
        raise ConfigError(faults)
