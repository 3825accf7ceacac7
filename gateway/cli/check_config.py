"""``gateway check-config``: a TOML file and everything it names, checked without connecting to anything."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.cli.common import Set, flags_of, warn
from gateway.errors import ConfigError


def check_config(file: Path, /, *, sets: Set = ()) -> int:
    """Check a TOML file with everything it names: keys, certificate, Kafka properties. Connects to nothing.

    Where the file names systemd credentials and this is not the unit, they are named, and the rest is checked.

    Parameters
    ----------
    file
        The TOML file; environment variables count as they would for `serve`.
    sets
        Settings over it, as SECTION.KEY=VALUE.
    """
    from gateway import config
    from gateway.daemon.materials import check

    unseen: dict[str, str] = {}
    settings = config.load(file, flags_of(sets), unseen=unseen)
    warn(f"{setting}: {name} could not be looked at: this is not its unit" for setting, name in unseen.items())
    skipped: list[str] = []
    try:
        check(settings, skipped, unseen)
    except ConfigError as error:
        raise ConfigError([f"{file}: {fault}" for fault in error.faults]) from None
    warn(config.warnings(settings))
    warn(f"{reason}: left out" for reason in skipped)
    print(json.dumps(config.shown(settings), indent=2))
    print(f"{file}: ok")
    return 0
