"""What follows from a ban: connections closed, one log line, metrics, and whoever else must know.

The decisions are `gateway.core.protection.Protection`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import Metric

    from gateway.core.protection import Ban, Protection
    from gateway.core.tenants import User
    from gateway.router.activity import Activity
    from gateway.router.sessions import Sessions
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

KINDS: Final = ("user", "address")
"""Label values: what is banned."""


class BanOffice:
    """Carries out the bans of one process."""

    def __init__(
        self, protection: Protection, sessions: Sessions, activity: Activity, metrics: Metrics, log: Log
    ) -> None:
        self._activity = activity
        self._share: Callable[[Ban], None] = lambda ban: None
        self._protection = protection
        self._sessions = sessions
        self._log = log
        self._bans = metrics.labelled("gateway_bans", "Bans pronounced here.", "kind", KINDS)
        metrics.families("bans_active", self._collect)
        protection.tell(self._pronounced)

    def _collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("gateway_bans_active", "Bans in force, as this process knows them.", labels=["kind"])
        for kind, count in self._protection.running().items():
            family.add_metric([kind], count)
        yield family

    def share(self, share: Callable[[Ban], None]) -> None:
        """Let other processes know of the bans of this one."""
        self._share = share

    def learn(self, ban: Ban) -> None:
        """Somebody was shut out elsewhere: it is here too."""
        self._protection.learn(ban, trio.current_time())
        if ban.kind == "user":
            self._sessions.close_user(*ban.subject)

    def ban_user(self, user: User) -> None:
        """Shut a user out because of what it sends, and close its connections."""
        self._protection.ban_user(user, trio.current_time())
        self._sessions.close_banned(user)

    def _pronounced(self, ban: Ban) -> None:
        self._bans.add(ban.kind)
        who = dict(zip(("company_id", "user_id") if ban.kind == "user" else ("address",), ban.subject, strict=True))
        self._activity.banned(ban)
        self._share(ban)
        self._log.warning("banned", kind=ban.kind, **who, seconds=round(ban.remaining_s))
