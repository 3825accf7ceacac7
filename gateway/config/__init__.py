"""Settings: `settings` says what there is, `load` reads them, `files` and `keys` what the files that they name hold.

`promises` is what a librdkafka property may not change.
"""

from gateway.config.files import copied_by_systemd, kafka_properties
from gateway.config.load import check_descriptors, dump, for_instance, load, restore, shown, warnings
from gateway.config.settings import AuthSettings, Settings, needs_restart, with_live

__all__ = [
    "AuthSettings",
    "Settings",
    "check_descriptors",
    "copied_by_systemd",
    "dump",
    "for_instance",
    "kafka_properties",
    "load",
    "needs_restart",
    "restore",
    "shown",
    "warnings",
    "with_live",
]
