"""Settings: one TOML file, then the environment over it, then flags over both.

Each stage has its own frozen class. `load` reports every fault at once, each with its path, and refuses keys it does
not know, in the file and in the environment. Environment names are ``GATEWAY_<SECTION>__<KEY>``
(``GATEWAY_LISTEN__PORT=8001``); a table is given as JSON. Other names that begin with ``GATEWAY_`` are not settings: a
container platform injects them for a service called "gateway". Where a setting names a file, ``credential:NAME`` means
the systemd credential of that name (``$CREDENTIALS_DIRECTORY/NAME``, systemd.exec(5)), and a relative path is relative
to the TOML file.
"""

from __future__ import annotations

import os
import re
import resource
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gateway.core.credentials import ALGORITHMS
from gateway.core.origins import ANY_ORIGIN, check_allowed, check_public
from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES, Routes, check_topic
from gateway.errors import ConfigError
from gateway.kafka.producer import OWN_PROPERTIES, is_own

ENV_PREFIX: Final = "GATEWAY_"
OTHER_ENVIRONMENT: Final = frozenset({"GATEWAY_TOKEN"})
"""Names under the prefix that the product itself uses for something else than a setting."""
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # what some editors put before UTF-8
CREDENTIAL: Final = "credential:"
MIN_SECRET_BYTES: Final = 32  # RFC 7518 3.2: a key of at least the hash's size
COPIES: Final = 2
"""How often a value is held until Kafka has confirmed it: by librdkafka, and here, for what a failure makes of it."""
DESCRIPTOR_RESERVE: Final = 512
"""Descriptors kept free beside connections: overflow (256), sidecar, Kafka, epoll, files."""

SPOOL_RESERVE_S: Final = 10.0
"""Of a drain's time, what is kept for its last part: the spool, at some 20,000 records a second."""

MAX_PORT: Final = 65_535
_Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
_Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
_Topic = Annotated[str, AfterValidator(check_topic)]
_Property = str | int | float | bool
_Origin = Annotated[str, AfterValidator(check_allowed)]
_PublicOrigin = Annotated[str, AfterValidator(check_public)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


_PATH = re.compile(r"/[!-~]*\Z")


def _check_path(path: str) -> str:
    """A request's path, as RFC 9112 3.2 has it in a target: no query and no fragment can ever be part of it."""
    if not _PATH.match(path) or "?" in path or "#" in path:
        raise ValueError("wanted a path of ASCII that begins with / and has no query (?) and no fragment (#)")
    return path.rstrip("/") or "/"


class ListenSettings(_Section):
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
    max_pending_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    max_held_bytes: Annotated[int, Field(ge=65_536, le=1 << 36)] = 256 * 1024 * 1024
    """What all connections together may hold that was read while Kafka takes nothing, each an equal share of it."""


class TlsSettings(_Section):
    """TLS 1.2 and later on the listener; both files or none."""

    cert_file: str | None = None
    key_file: str | None = None

    @model_validator(mode="after")
    def _both(self) -> TlsSettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        return self


class PublicKeySettings(_Section):
    """One PEM public key; ``kid`` is what tokens name it by, if they name it."""

    file: str
    kid: str | None = None


class AuthSettings(_Section):
    """Which tokens are believed."""

    algorithms: tuple[Literal["HS256", "RS256", "ES256", "EdDSA"], ...] = ("HS256",)
    secret: SecretStr | None = None
    secret_file: str | None = None
    secret_kid: str | None = None
    public_keys: tuple[PublicKeySettings, ...] = ()
    jwks_file: str | None = None
    issuer: Annotated[str, Field(min_length=1)] = "api-gateway"
    audience: str | None = None
    leeway_s: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 5.0
    allow_query_token: bool = False

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


class SessionSettings(_Section):
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


class RouteSettings(_Section):
    """message_type to topic, and where dead letters go."""

    topics: Annotated[dict[str, _Topic], Field(min_length=1, max_length=256)] = dict(DEFAULT_ROUTES)
    dead_letter: _Topic = DEFAULT_DEAD_LETTER_TOPIC


class KafkaSettings(_Section):
    """The cluster; ``properties`` is handed to librdkafka (CONFIGURATION.md of librdkafka lists them).

    ``max_queued_messages`` and ``max_queued_bytes`` (of values) are what is held for Kafka while it does not answer;
    when either is reached, nothing more is handed over. A value is held twice, by librdkafka and by the gateway, and
    counts twice.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    max_queued_messages: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000
    max_queued_bytes: Annotated[int, Field(ge=65_536, le=1 << 36)] = 256 * 1024 * 1024
    properties: dict[str, _Property] = {}
    property_files: dict[str, str] = {}
    """Properties whose value is a file's content, for secrets: ``"sasl.password" = "credential:kafka"``."""

    @model_validator(mode="after")
    def _not_ours(self) -> KafkaSettings:
        given = {**dict.fromkeys(self.property_files), **self.properties}
        taken = sorted(name for name, value in given.items() if is_own(name, value))
        if taken:
            reasons = (f"properties may not set {name}: {OWN_PROPERTIES[name]}" for name in taken)
            raise ValueError("; ".join(reasons) + " (kafka.properties, kafka.property_files)")
        return self


class SidecarSettings(_Section):
    """The HTTP surface for health and metrics. Keep it on loopback."""

    host: str = "127.0.0.1"
    port: _Port = 8002


class LogSettings(_Section):
    """Lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class SpoolSettings(_Section):
    """The place on disk for what Kafka does not take; without a ``directory``, systemd's state directory, if any.

    An empty ``directory`` is none, under systemd too.
    """

    directory: str | None = None
    max_bytes: Annotated[int, Field(ge=65_536, le=1 << 40)] = 1024 * 1024 * 1024


class DrainSettings(_Section):
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
    routes: RouteSettings = RouteSettings()
    kafka: KafkaSettings = KafkaSettings()
    sidecar: SidecarSettings = SidecarSettings()
    log: LogSettings = LogSettings()
    drain: DrainSettings = DrainSettings()
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

    @property
    def table(self) -> Routes:
        """The routes as the core takes them."""
        return Routes(self.routes.topics, self.routes.dead_letter)


def _whole_number(properties: Mapping[str, _Property], name: str, default: _Property) -> int:
    """A property that the gateway reads itself. Raises ValueError naming it."""
    try:
        return int(properties.get(name, default))
    except (ValueError, OverflowError):
        raise ValueError(f"kafka.properties: {name} is no whole number") from None


class _Layer(PydanticBaseSettingsSource):
    """A source of values that were read before."""

    def __init__(self, settings_class: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_class)
        self._values = values

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Unused: `__call__` gives everything at once."""
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(self._values)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises ConfigError naming the file."""
    try:
        with path.open("rb") as file:
            return tomllib.loads(file.read().removeprefix(BYTE_ORDER_MARK).decode())
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: not TOML: nested too deeply"]) from error


def load(
    path: Path | None, flags: Mapping[str, Any] | None = None, *, unseen: dict[str, str] | None = None
) -> Settings:
    """Read the settings; raises ConfigError with every fault.

    ``flags`` maps dotted paths (``listen.port``) to values and wins over environment and file. Outside a unit, where
    systemd has put no credentials, a setting that names one is a fault; or it is added to ``unseen``, path and name,
    and keeps the name.
    """
    file_values = read_toml(path) if path is not None else {}
    faults = _unknown_environment()
    flag_values: dict[str, Any] = {}
    for dotted, value in (flags or {}).items():
        *sections, key = dotted.split(".", 1)
        table = flag_values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value

    class _Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (_Layer(settings_cls, flag_values), env_settings, _Layer(settings_cls, file_values))

    try:
        settings = _Loaded()
    except ValidationError as error:
        faults += [_fault(fault["loc"], fault["msg"], fault["type"]) for fault in error.errors(include_input=False)]
        raise ConfigError(sorted(faults)) from None
    except ValueError as error:  # an environment value that is no JSON where a table is wanted
        raise ConfigError([*faults, f"environment: {error}"]) from None
    if faults:
        raise ConfigError(sorted(faults))
    return _with_paths(settings, path.parent if path is not None else Path(), unseen)


def warnings(settings: Settings) -> list[str]:
    """What an operator should know and may have meant."""
    found = []
    other = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and _is_other(name))
    if other:
        found.append(f"environment: {', '.join(other)}: no settings, ignored (a setting is GATEWAY_<SECTION>__<KEY>)")
    if ANY_ORIGIN in settings.listen.allowed_origins:
        found.append('listen.allowed_origins: "*" lets the pages of every site connect')
    return found


def for_instance(settings: Settings, instance: int) -> Settings:
    """The settings of unit number ``instance`` of several on one host. Raises ConfigError."""
    port = settings.sidecar.port + instance if settings.sidecar.port else 0  # 0 is a free one for each
    if port > MAX_PORT:
        raise ConfigError([f"sidecar.port: {settings.sidecar.port} and --instance {instance} are over {MAX_PORT}"])
    return settings.model_copy(update={"sidecar": settings.sidecar.model_copy(update={"port": port})})


_SECRET_PROPERTIES: Final = re.compile(r"passw|passphrase|secret|\.pem\Z|jaas|oauthbearer\.config|_key\Z")
"""The properties that librdkafka marks as sensitive (_RK_SENSITIVE), by their words, but names of users and files."""
_PASSWORD_IN_URL: Final = re.compile(r"(?<=://)\S*@")
MASK: Final = "**********"


def shown(settings: Settings) -> dict[str, Any]:
    """The settings for people: secrets masked, and passwords in URLs."""
    found: dict[str, Any] = settings.model_dump(mode="json")
    properties = found["kafka"]["properties"]
    for name, value in properties.items():
        if _SECRET_PROPERTIES.search(name):
            properties[name] = MASK
        elif isinstance(value, str):
            properties[name] = _PASSWORD_IN_URL.sub(f"{MASK}@", value)
    return found


def dump(settings: Settings) -> dict[str, Any]:
    """The settings as JSON can hold them, secrets included, for `restore`."""
    found: dict[str, Any] = settings.model_dump(mode="json")
    if settings.auth.secret is not None:
        found["auth"]["secret"] = settings.auth.secret.get_secret_value()
    return found


def restore(dumped: Mapping[str, Any]) -> Settings:
    """The settings that `dump` was given; nothing else counts, neither the environment nor a file."""

    class _Restored(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (_Layer(settings_cls, dumped),)

    return _Restored()


def changed(old: Settings, new: Settings, *, but: Collection[str]) -> list[str]:
    """The settings that differ, as SECTION.KEY; those in ``but`` are left out, SECTION.* standing for all of one."""
    return [
        f"{section}.{key}"
        for section, model in _SECTIONS.items()
        for key in model.model_fields
        if not {f"{section}.*", f"{section}.{key}"} & set(but)
        and getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def copied_by_systemd(settings: Settings) -> list[str]:
    """The settings whose file is a systemd credential: a copy made when the unit started, which no reload renews."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None:
        return []
    files: dict[str, str | None] = {
        "tls.cert_file": settings.tls.cert_file,
        "tls.key_file": settings.tls.key_file,
        "auth.secret_file": settings.auth.secret_file,
        "auth.jwks_file": settings.auth.jwks_file,
        **{f"auth.public_keys.{index}.file": key.file for index, key in enumerate(settings.auth.public_keys)},
    }
    return [name for name, file in files.items() if file is not None and Path(file).parent == Path(directory)]


def _fault(location: tuple[int | str, ...], message: str, kind: str) -> str:
    where = ".".join(map(str, location)) or "settings"
    if kind == "missing":
        message = "is missing"
    elif kind == "extra_forbidden":
        message = "is not a setting"
    return f"{where}: {message.removeprefix('Value error, ')}"


def _unknown_environment() -> list[str]:
    """pydantic-settings ignores names it does not know; a typing error must not go unnoticed."""
    faults = []
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, _, key = name.partition("__")
            model = _ENVIRONMENT.get(section.upper())
            if model is None or key.partition("__")[0].lower() not in model.model_fields:
                faults.append(f"{name}: is not a setting (environment)")
    return faults


_SECTIONS: Final[dict[str, Any]] = {section: field.annotation for section, field in Settings.model_fields.items()}
_ENVIRONMENT: Final = {f"{ENV_PREFIX}{section}".upper(): model for section, model in _SECTIONS.items()}
"""The sections by their names in the environment, where each can be given whole, as JSON."""


def _is_other(name: str) -> bool:
    """Whether a name under the prefix neither is nor looks like a setting."""
    return "__" not in name and name.upper() not in _ENVIRONMENT and name not in OTHER_ENVIRONMENT


def _with_paths(settings: Settings, directory: Path, unseen: dict[str, str] | None) -> Settings:
    """The settings with every file name made whole. Raises ConfigError for a credential that is not there."""
    faults: list[str] = []

    def whole(where: str, name: str | None) -> str | None:
        if name is None:
            return None
        if not name.startswith(CREDENTIAL):
            return str(directory / name)
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials is None and unseen is not None:
            unseen[where] = name
            return name
        if credentials is None:
            faults.append(f"{where}: {name} needs systemd's LoadCredential= (CREDENTIALS_DIRECTORY is not set)")
            return name
        return str(Path(credentials) / name.removeprefix(CREDENTIAL))

    tls, auth, kafka, spool = settings.tls, settings.auth, settings.kafka, settings.spool
    state = os.environ.get("STATE_DIRECTORY")  # systemd.exec(5): StateDirectory=, more than one joined by colons
    default = f"{state.partition(':')[0]}/spool" if state else None
    spool_directory = (default if spool.directory is None else spool.directory) or None
    settings = settings.model_copy(
        update={
            "tls": tls.model_copy(
                update={
                    "cert_file": whole("tls.cert_file", tls.cert_file),
                    "key_file": whole("tls.key_file", tls.key_file),
                }
            ),
            "auth": auth.model_copy(
                update={
                    "secret_file": whole("auth.secret_file", auth.secret_file),
                    "jwks_file": whole("auth.jwks_file", auth.jwks_file),
                    "public_keys": tuple(
                        key.model_copy(update={"file": whole(f"auth.public_keys.{index}.file", key.file)})
                        for index, key in enumerate(auth.public_keys)
                    ),
                }
            ),
            "spool": spool.model_copy(update={"directory": whole("spool.directory", spool_directory)}),
            "kafka": kafka.model_copy(
                update={
                    "property_files": {
                        name: whole(f"kafka.property_files.{name}", file) for name, file in kafka.property_files.items()
                    }
                }
            ),
        }
    )
    if faults:
        raise ConfigError(faults)
    return settings


def kafka_properties(settings: KafkaSettings, unseen: Collection[str] = ()) -> dict[str, _Property]:
    """What librdkafka is given: properties, contents of ``property_files``, the queue's bounds. Raises ConfigError.

    Files whose settings are ``unseen`` are not read; something stands in for them.
    """
    properties = {
        **settings.properties,
        "queue.buffering.max.messages": settings.max_queued_messages,
        "queue.buffering.max.kbytes": settings.max_queued_bytes // COPIES // 1024,
    }
    for name, file in settings.property_files.items():
        if f"kafka.property_files.{name}" in unseen:
            if not name.endswith(".pem"):  # librdkafka would read it
                properties[name] = "unseen"
            continue
        try:
            value = without_line_ending(Path(file).read_bytes()).decode()
            if "\0" in value:
                raise ConfigError([f"kafka.property_files.{name}: {file}: holds a zero byte"])
            properties[name] = value
        except UnicodeDecodeError as error:
            raise ConfigError([f"kafka.property_files.{name}: {file}: not UTF-8, as Kafka wants it"]) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError([f"kafka.property_files.{name}: {file}: {reason}"]) from error
    return properties


def without_line_ending(content: bytes) -> bytes:
    """A secret file's content less the one line ending that an editor puts behind it."""
    return content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content


def check_descriptors(max_connections: int) -> None:
    """Raise the soft limit of open files for ``max_connections`` sockets; ConfigError when the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + DESCRIPTOR_RESERVE
    if hard != resource.RLIM_INFINITY and hard <= DESCRIPTOR_RESERVE:
        raise ConfigError(
            [
                f"listen.max_connections: {max_connections} needs {wanted} open files, the limit is {hard}:"
                f" raise LimitNOFILE, to {DESCRIPTOR_RESERVE + 1} at least"
            ]
        )
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ConfigError(
            [
                f"listen.max_connections: {max_connections} needs {wanted} open files, the limit is {hard}:"
                f" lower it to {hard - DESCRIPTOR_RESERVE} or raise LimitNOFILE"
            ]
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
