"""The settings of one daemon: what there is, its defaults and its bounds. Each section has its own frozen class.

Nothing lists settings a second time: a setting that names a file is marked where it stands (`FILE`), and a section says
which of its settings a reload takes (``live``).
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from gateway.config.promises import PROMISES, Property, breaks_promise
from gateway.core.breaker import BreakerRules
from gateway.core.credentials import ALGORITHMS
from gateway.core.limits import TierLimits
from gateway.core.origins import check_allowed, check_public
from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES, Routes, check_topic

if TYPE_CHECKING:
    from collections.abc import Mapping

# long: every setting there is, with its bounds

ENV_PREFIX: Final = "GATEWAY_"
COPIES: Final = 2
"""How often a value is held until Kafka has confirmed it: by librdkafka, and here, for what a failure makes of it."""
SPOOL_RESERVE_S: Final = 10.0
"""Of a drain's time, what is kept for its last part: the spool, at some 20,000 records a second."""

MAX_PORT: Final = 65_535
_Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
_Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
_Topic = Annotated[str, AfterValidator(check_topic)]
_Origin = Annotated[str, AfterValidator(check_allowed)]
_PublicOrigin = Annotated[str, AfterValidator(check_public)]


class File:
    """Marks a setting that names a file, or files: `gateway.config.files` makes their names whole."""


FILE: Final = File()


class Live:
    """Marks a setting that a reload takes."""


LIVE: Final = Live()


class Section(BaseModel):
    """A table of the file. A reload takes all of it if it is ``live``, else what is marked (`LIVE`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    live: ClassVar[bool] = False

    @classmethod
    def live_keys(cls) -> frozenset[str]:
        """What a reload takes; anything else wants a restart."""
        return frozenset(key for key, field in cls.model_fields.items() if cls.live or LIVE in field.metadata)


_PATH = re.compile(r"/[!-~]*\Z")


def _check_path(path: str) -> str:
    """A request's path, as RFC 9112 3.2 has it in a target: no query and no fragment can ever be part of it."""
    if not _PATH.match(path) or set(path) & set("?#{}"):
        raise ValueError("wanted a path of ASCII that begins with / and has no query (?), no fragment (#), no braces")
    return path.rstrip("/") or "/"


class ListenSettings(Section):
    """The WebSocket listener."""

    host: str = "127.0.0.1"
    port: _Port = 8001
    path: Annotated[str, AfterValidator(_check_path), Field(max_length=256)] = "/ws/mt5"
    backlog: Annotated[int, Field(ge=1, le=65535)] = 4096
    reuse_port: bool = False
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    handshake_timeout_s: _Seconds = 10.0
    max_message_bytes: Annotated[int, Field(ge=1024, le=8 * 1024 * 1024)] = 65_536
    allowed_origins: tuple[_Origin, ...] = ()
    public_origin: _PublicOrigin | None = None
    """What browsers call this gateway behind a proxy that rewrites Host: such an Origin passes as its own."""
    handshakes_per_address_per_s: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 50.0
    handshakes_per_address_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    max_connections_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    max_pending_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    max_held_bytes: Annotated[int, Field(ge=65_536, le=1 << 36)] = 256 * 1024 * 1024
    """What all connections together may hold that was read while Kafka takes nothing, each an equal share of it."""


class TlsSettings(Section):
    """TLS 1.2 and later on the listener; both files or none."""

    live: ClassVar = True

    cert_file: Annotated[str | None, FILE] = None
    key_file: Annotated[str | None, FILE] = None

    @model_validator(mode="after")
    def _both(self) -> TlsSettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        return self


class PublicKeySettings(Section):
    """One PEM public key; ``kid`` is what tokens name it by, if they name it."""

    file: Annotated[str, FILE]
    kid: str | None = None


class AuthSettings(Section):
    """Which tokens are believed."""

    live: ClassVar = True

    algorithms: tuple[Literal["HS256", "RS256", "ES256", "EdDSA"], ...] = ("HS256",)
    secret: SecretStr | None = None
    secret_file: Annotated[str | None, FILE] = None
    secret_kid: str | None = None
    public_keys: tuple[PublicKeySettings, ...] = ()
    jwks_file: Annotated[str | None, FILE] = None
    issuer: Annotated[str, Field(min_length=1)] = "api-gateway"
    audience: str | None = None
    leeway_s: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 5.0
    allow_query_token: bool = False
    not_before: AwareDatetime | None = None
    """Tokens issued before this have ended; open connections too."""
    revoked_file: Annotated[str | None, FILE] = None
    """The ``jti`` of tokens that have ended, one a line; open connections too."""

    @model_validator(mode="after")
    def _consistent(self) -> AuthSettings:
        if not self.algorithms:
            raise ValueError(f"algorithms must name at least one of {', '.join(ALGORITHMS)}")
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("give secret or secret_file, not both")
        if not (self.secret or self.secret_file or self.public_keys or self.jwks_file):
            raise ValueError("no key: give secret_file, public_keys or jwks_file")
        if "HS256" not in self.algorithms and (self.secret or self.secret_file):
            raise ValueError("a secret is for HS256, which algorithms does not name")
        return self


class SessionSettings(Section):
    """What an open connection may do, and how it is looked after."""

    ping_interval_s: _Seconds = 20.0
    idle_timeout_s: _Seconds = 40.0
    close_timeout_s: _Seconds = 5.0
    max_controls_per_s: Annotated[int, Field(ge=1, le=10_000)] = 20
    max_unsent_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 65_536
    unsent_timeout_s: _Seconds = 8.0
    ack_interval_ms: Annotated[int, Field(ge=10, le=60_000)] = 200

    @model_validator(mode="after")
    def _pings_fit(self) -> SessionSettings:
        if self.idle_timeout_s <= self.ping_interval_s:
            raise ValueError("idle_timeout_s must be longer than ping_interval_s")
        return self


_Rate = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Limit = Annotated[int, Field(ge=0, le=1_000_000_000)]
_Bytes = Annotated[int, Field(ge=0, le=1 << 60)]


class TierSettings(Section):
    """What a tier allows; 0 is no limit. `gateway.core.limits.TierLimits` says what each number is."""

    live: ClassVar = True

    messages_per_second: _Rate = 50.0
    burst_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 2.0
    company_messages_per_second: _Rate = 0.0
    company_bytes_per_second: _Rate = 0.0
    company_bytes_per_day: _Bytes = 0
    company_bytes_per_month: _Bytes = 0
    users: _Limit = 1
    accounts: _Limit = 5
    accounts_per_user: _Limit = 0
    connections_per_account: _Limit = 1
    pairs: _Limit = 0

    @property
    def limits(self) -> TierLimits:
        """The same as the core takes it."""
        return TierLimits(**self.model_dump())


class ProSettings(TierSettings):
    """Defaults of the tier ``pro``."""

    messages_per_second: _Rate = 75.0
    users: _Limit = 5
    accounts: _Limit = 20


class EnterpriseSettings(TierSettings):
    """Defaults of the tier ``enterprise``."""

    messages_per_second: _Rate = 100.0
    users: _Limit = 10
    accounts: _Limit = 50


class TiersSettings(Section):
    """The limits of tenants, by the tier that their tokens name."""

    live: ClassVar = True

    free: TierSettings = TierSettings()
    pro: ProSettings = ProSettings()
    enterprise: EnterpriseSettings = EnterpriseSettings()

    @property
    def limits(self) -> dict[str, TierLimits]:
        """The same as the core takes it."""
        return {name: getattr(self, name).limits for name in type(self).model_fields}


def _check_network(text: str) -> str:
    """An address or a network, as `ipaddress` reads it."""
    return str(ipaddress.ip_network(text))


class BreakerSettings(Section):
    """Who is shut out, and for how long: users whose messages, addresses whose handshakes mostly fail within a minute.

    A ``share`` of 1 shuts nobody out.
    """

    live: ClassVar = True

    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    least: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    ban_s: _Seconds = 60.0
    max_ban_s: _Seconds = 900.0
    forgive_s: _Seconds = 3600.0
    exempt_addresses: tuple[Annotated[str, AfterValidator(_check_network)], ...] = ("127.0.0.0/8", "::1/128")
    """Addresses and networks that are never shut out: those of balancers, behind which everybody has one address."""

    @model_validator(mode="after")
    def _grows(self) -> BreakerSettings:
        if self.max_ban_s < self.ban_s:
            raise ValueError("max_ban_s is shorter than ban_s")
        return self

    @property
    def rules(self) -> BreakerRules:
        """The same as the core takes it."""
        return BreakerRules(**self.model_dump(exclude={"exempt_addresses"}))

    @property
    def exempt(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """``exempt_addresses`` as networks."""
        return [ipaddress.ip_network(text) for text in self.exempt_addresses]


class RouteSettings(Section):
    """message_type to topic, and where dead letters go."""

    live: ClassVar = True

    topics: Annotated[dict[str, _Topic], Field(min_length=1, max_length=256)] = dict(DEFAULT_ROUTES)
    dead_letter: _Topic = DEFAULT_DEAD_LETTER_TOPIC


class KafkaSettings(Section):
    """The cluster; ``properties`` is handed to librdkafka (CONFIGURATION.md of librdkafka lists them).

    ``max_queued_messages`` and ``max_queued_bytes`` (of values) are what is held for Kafka while it does not answer;
    when either is reached, nothing more is handed over. A value is held twice, by librdkafka and by the gateway, and
    counts twice.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    max_queued_messages: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000
    max_queued_bytes: Annotated[int, Field(ge=65_536, le=1 << 36)] = 256 * 1024 * 1024
    properties: dict[str, Property] = {}
    property_files: Annotated[dict[str, str], FILE] = {}
    """Properties whose value is a file's content, for secrets: ``"sasl.password" = "credential:kafka"``."""

    @model_validator(mode="after")
    def _not_ours(self) -> KafkaSettings:
        given = {**dict.fromkeys(self.property_files), **self.properties}
        taken = sorted(name for name, value in given.items() if breaks_promise(name, value))
        if taken:
            reasons = (f"properties may not set {name}: {PROMISES[name].text}" for name in taken)
            raise ValueError("; ".join(reasons) + " (kafka.properties, kafka.property_files)")
        return self


class SidecarSettings(Section):
    """The HTTP surface for health and metrics. Keep it on loopback."""

    host: str = "127.0.0.1"
    port: _Port = 8002


class LogSettings(Section):
    """Lines on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], LIVE] = "info"
    format: Literal["json", "console"] = "json"


class SpoolSettings(Section):
    """The place on disk for what Kafka does not take; without a ``directory``, systemd's state directory, if any.

    An empty ``directory`` is none, under systemd too.
    """

    directory: Annotated[str | None, FILE] = None
    max_bytes: Annotated[int, Field(ge=65_536, le=1 << 40)] = 1024 * 1024 * 1024


class ActivitySettings(Section):
    """Where records go that tell what becomes of users' connections; an empty ``topic`` is nowhere."""

    topic: Literal[""] | _Topic = "user-activity"


def _check_redis(url: SecretStr) -> SecretStr:
    """The URL of a Redis; never quoted, for it may hold a password."""
    if not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("wanted redis://, rediss:// or unix://")
    return url


class RegistrySettings(Section):
    """Where several gateways keep the places of tenants together: ``redis_url``, or nowhere."""

    redis_url: Annotated[SecretStr, AfterValidator(_check_redis)] | None = None
    """``redis://``, ``rediss://`` or ``unix://``; it may hold a password."""
    redis_cluster: bool = False
    """It is a node of a Redis Cluster."""
    on_failure: Literal["admit", "refuse"] = "admit"
    """While Redis does not answer: give places by what this process knows, or refuse everybody."""
    lease_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 15.0
    """So long after its end are the places of a gateway that was killed free again."""
    timeout_s: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] = 1.0


class MonitoringSettings(Section):
    """What the gateway looks into beside headers. ``inspect_ticks``: one ``tick_data`` message a second of each
    connection, for the limit of pairs; a connection that is open already is not looked into before its next one."""

    live: ClassVar = True

    inspect_ticks: bool = False


class MemorySettings(Section):
    """How much memory the process may use, about; 0 is no budget."""

    live: ClassVar = True

    budget_bytes: Annotated[int, Field(ge=0, le=1 << 44)] = 0


class DrainSettings(Section):
    """How long a shutdown takes at most: ``timeout_s`` for all of it, and for each part within that.

    For ``grace_s`` the gateway is not ready and still serves newcomers, so that a balancer finds out first. Then
    connections are closed over ``close_window_s``, so that their clients do not all come back at once, or faster
    when there are few; then Kafka's answers are waited for, and what is left is spooled.
    """

    timeout_s: _Seconds = 50.0
    grace_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.5
    close_window_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 3.0
    close_timeout_s: _Seconds = 10.0
    flush_timeout_s: _Seconds = 20.0
    reconnect_window_ms: Annotated[int, Field(ge=0, le=600_000)] = 5_000

    @model_validator(mode="after")
    def _fits(self) -> DrainSettings:
        first, rest = self.grace_s + self.close_window_s, self.timeout_s - self.spool_reserve_s
        if first >= rest:
            raise ValueError(
                f"drain.timeout_s {self.timeout_s:g}, less {self.spool_reserve_s:g} for the spool, leaves nothing after"
                f" drain.grace_s and drain.close_window_s, {first:g} together"
            )
        return self

    @property
    def spool_reserve_s(self) -> float:
        """What of ``timeout_s`` is kept for writing the spool: `SPOOL_RESERVE_S`, or a quarter of a short one."""
        return min(SPOOL_RESERVE_S, self.timeout_s / 4)


class Settings(BaseSettings):
    """All settings of one daemon; read them with `load`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        nested_model_default_partial_update=False,
    )

    listen: ListenSettings = ListenSettings()
    tls: TlsSettings = TlsSettings()
    auth: AuthSettings
    session: SessionSettings = SessionSettings()
    tiers: TiersSettings = TiersSettings()
    breaker: BreakerSettings = BreakerSettings()
    routes: RouteSettings = RouteSettings()
    kafka: KafkaSettings = KafkaSettings()
    sidecar: SidecarSettings = SidecarSettings()
    log: LogSettings = LogSettings()
    drain: DrainSettings = DrainSettings()
    registry: RegistrySettings = RegistrySettings()
    activity: ActivitySettings = ActivitySettings()
    memory: MemorySettings = MemorySettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    spool: SpoolSettings = SpoolSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        limit = _whole_number(self.kafka.properties, "message.max.bytes", 1_000_000)
        # Room for the key, the stamp and a dead letter's headers.
        if self.listen.max_message_bytes + 4096 > limit:
            raise ValueError(
                f"listen.max_message_bytes {self.listen.max_message_bytes}"
                f" does not fit into Kafka's message.max.bytes {limit}"
            )
        if self.kafka.max_queued_bytes < 4 * COPIES * self.listen.max_message_bytes:
            raise ValueError("kafka.max_queued_bytes holds fewer than four messages of listen.max_message_bytes")
        return self

    def with_kafka(self, bootstrap_servers: str) -> Settings:
        """These settings with another Kafka."""
        return self.model_copy(update={"kafka": self.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})})

    @property
    def table(self) -> Routes:
        """The routes as the core takes them."""
        return Routes(self.routes.topics, self.routes.dead_letter)


def _whole_number(properties: Mapping[str, Property], name: str, default: Property) -> int:
    """A property that the gateway reads itself. Raises ValueError naming it."""
    try:
        return int(properties.get(name, default))
    except (ValueError, OverflowError):
        raise ValueError(f"kafka.properties: {name} is no whole number") from None


SECTIONS: Final[dict[str, type[Section]]] = {
    name: field.annotation  # type: ignore[misc]  # every setting is in a section
    for name, field in Settings.model_fields.items()
}
"""The sections by their names."""


def needs_restart(old: Settings, new: Settings) -> list[str]:
    """The settings that differ and that a reload does not take, as SECTION.KEY."""
    return [
        f"{name}.{key}"
        for name, section in SECTIONS.items()
        for key in section.model_fields
        if key not in section.live_keys() and getattr(getattr(old, name), key) != getattr(getattr(new, name), key)
    ]


def with_live(old: Settings, new: Settings) -> Settings:
    """The ``old`` settings with what a reload takes of the ``new`` ones."""
    return old.model_copy(
        update={
            name: getattr(old, name).model_copy(
                update={key: getattr(getattr(new, name), key) for key in section.live_keys()}
            )
            for name, section in SECTIONS.items()
            if section.live_keys()
        }
    )
