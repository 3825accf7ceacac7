"""What commands have in common: their flags, and what they say on standard error."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

ConfigFile = Annotated[Path | None, Parameter(name="--config")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]


def warn(warnings: Iterable[str]) -> None:
    """Print what may be meant otherwise."""
    for line in warnings:
        print(f"gateway: warning: {line}", file=sys.stderr)


def flags_of(sets: tuple[str, ...], **values: object) -> dict[str, Any]:
    """Flags that were given, as dotted settings; ``sets`` holds KEY=VALUE strings. Raises ConfigError."""
    flags: dict[str, Any] = {}
    for assignment in sets:
        name, equals, text = assignment.partition("=")
        if not equals or "." not in name:
            raise ConfigError([f"--set {name}: wanted SECTION.KEY=VALUE"])
        try:
            flags[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            flags[name] = text
    flags.update({name.replace("__", "."): value for name, value in values.items() if value is not None})
    return flags
