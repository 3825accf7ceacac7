"""The files that settings name: their names made whole, and what is in them.

A relative name is relative to the TOML file. ``credential:NAME`` means the systemd credential of that name
(``$CREDENTIALS_DIRECTORY/NAME``, systemd.exec(5)). One walk over the settings finds them all (`settings.FILE`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import BaseModel

from gateway.config.settings import COPIES, FILE
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gateway.config.promises import Property
    from gateway.config.settings import KafkaSettings, Settings

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # what some editors put before UTF-8
CREDENTIAL: Final = "credential:"


def _change(value: Any, where: str, change: Callable[[str, str], str], *, marked: bool = False) -> Any:
    """A copy of ``value`` in which every file name is what ``change`` makes of its place and itself."""
    if isinstance(value, BaseModel):
        found = {
            name: _change(getattr(value, name), f"{where}.{name}".lstrip("."), change, marked=FILE in field.metadata)
            for name, field in type(value).model_fields.items()
        }
        return value.model_copy(update=found)
    if isinstance(value, tuple):
        return tuple(_change(one, f"{where}.{at}", change, marked=marked) for at, one in enumerate(value))
    if isinstance(value, dict):
        return {name: _change(one, f"{where}.{name}", change, marked=marked) for name, one in value.items()}
    return change(where, value) if marked and isinstance(value, str) else value


def with_whole_names(settings: Settings, directory: Path, unseen: dict[str, str] | None) -> Settings:
    """The settings with every file name made whole, relative ones from ``directory``.

    Raises ConfigError for a credential that is not there; outside a unit it is added to ``unseen``, where that is
    given, path and name, and keeps the name.
    """
    faults: list[str] = []

    def whole(where: str, name: str) -> str:
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

    state = os.environ.get("STATE_DIRECTORY")  # systemd.exec(5): StateDirectory=, more than one joined by colons
    default = f"{state.partition(':')[0]}/spool" if state else None
    spool = settings.spool
    spool_directory = (default if spool.directory is None else spool.directory) or None
    settings = settings.model_copy(update={"spool": spool.model_copy(update={"directory": spool_directory})})
    found = cast("Settings", _change(settings, "", whole))
    if faults:
        raise ConfigError(faults)
    return found


def file_names(settings: Settings) -> dict[str, str]:
    """Every file that the settings name, by the path of its setting (``auth.public_keys.0.file``)."""
    found: dict[str, str] = {}

    def note(where: str, name: str) -> str:
        found[where] = name
        return name

    _change(settings, "", note)
    return found


def copied_by_systemd(settings: Settings) -> list[str]:
    """The settings whose file is a systemd credential: a copy made when the unit started, which no reload renews."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None:
        return []
    return [where for where, file in file_names(settings).items() if Path(file).parent == Path(directory)]


def read_file(where: str, path: str) -> bytes:
    """A file's content. Raises ConfigError that begins with ``where``."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError([f"{where}: {getattr(error, 'strerror', None) or error}"]) from error


def without_line_ending(content: bytes) -> bytes:
    """A secret file's content less the one line ending that an editor puts behind it."""
    return content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content


def kafka_properties(settings: KafkaSettings, unseen: Collection[str] = ()) -> dict[str, Property]:
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
        where = f"kafka.property_files.{name}: {file}"
        try:
            value = without_line_ending(read_file(where, file)).decode()
        except UnicodeDecodeError as error:
            raise ConfigError([f"{where}: not UTF-8, as Kafka wants it"]) from error
        if "\0" in value:
            raise ConfigError([f"{where}: holds a zero byte"])
        properties[name] = value
    return properties
