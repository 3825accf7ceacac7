"""Reads the settings: one TOML file, then the environment over it, then flags over both.

`load` reports every fault at once, each with its path, and refuses keys it does not know, in the file and in the
environment. Environment names are ``GATEWAY_<SECTION>__<KEY>`` (``GATEWAY_LISTEN__PORT=8001``); a table is given as
JSON. Other names that begin with ``GATEWAY_`` are not settings: a container platform injects them for a service called
"gateway".
"""

from __future__ import annotations

import os
import re
import resource
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from gateway.config.files import BYTE_ORDER_MARK, with_whole_names
from gateway.config.settings import ENV_PREFIX, MAX_PORT, SECTIONS, Settings
from gateway.core.origins import ANY_ORIGIN
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

OTHER_ENVIRONMENT: Final = frozenset({"GATEWAY_TOKEN"})
"""Names under the prefix that the product itself uses for something else than a setting."""
DESCRIPTOR_RESERVE: Final = 512
"""Descriptors kept free beside connections: overflow (256), sidecar, Kafka, epoll, files."""


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
        *sections, key = dotted.split(".")
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
    return with_whole_names(settings, path.parent if path is not None else Path(), unseen)


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
    if settings.registry.redis_url is not None:
        found["registry"]["redis_url"] = settings.registry.redis_url.get_secret_value()
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


_ENVIRONMENT: Final = {f"{ENV_PREFIX}{section}".upper(): model for section, model in SECTIONS.items()}
"""The sections by their names in the environment, where each can be given whole, as JSON."""


def _is_other(name: str) -> bool:
    """Whether a name under the prefix neither is nor looks like a setting."""
    return "__" not in name and name.upper() not in _ENVIRONMENT and name not in OTHER_ENVIRONMENT


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
