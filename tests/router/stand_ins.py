"""Stand-ins for who sends messages, and for who holds."""

from __future__ import annotations

from collections.abc import Callable

from gateway.core import catalogue
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.protection import Protection
from gateway.core.tenants import Tenants, User
from gateway.router.lanes import Lane

ALICE = Principal("alice", "acme", "pro", 4_000_000_000.0)


def user_of(principal: Principal = ALICE, limits: TierLimits = TierLimits()) -> User:  # noqa: B008  # frozen
    """A user of a company of its own that has these limits."""
    tenants = Tenants({principal.tier: limits})
    tenants.learn_tier(principal)
    return tenants.user(principal, 0.0)


def nobody_trips(user: User) -> None:
    """Nobody is shut out."""
    raise AssertionError(f"{user.user_id} was shut out")


PROTECTION = Protection()


class AnyToken:
    """Every token is Alice's, and none is revoked."""

    leeway_s = 0.0

    def verify(self, token: str) -> Principal:
        return ALICE

    def is_revoked(self, principal: Principal) -> bool:
        return False


class Sender:
    connection_id = "c-9"
    principal = Principal("alice", "acme", "pro", 0.0)
    path = "/ws/mt5"

    def __init__(self) -> None:
        self.settled: list[int] = []
        self.rejected: list[tuple[str, int]] = []
        self.lanes: dict[str, Lane] = {}
        self.waiting_alone = False
        self.backlog = 0

    def wait_alone(self) -> None:
        self.waiting_alone = True

    def go_on(self) -> None:
        self.waiting_alone = False

    def settle(self, index: int | None, /) -> None:
        self.settled.append(index or 0)

    def note_rejected(self, reason: catalogue.Reason, index: int | None, /) -> None:
        self.rejected.append((reason, index or 0))

    def keep(self) -> bool:
        return False


class Recorder:
    """Notes who holds; ``on_hold`` and ``on_release`` are called besides."""

    def __init__(self) -> None:
        self.on_hold: Callable[[], None] = lambda: None
        self.on_release: Callable[[], None] = lambda: None

    def hold(self, name: str) -> None:
        self.on_hold()

    def release(self, name: str) -> None:
        self.on_release()
