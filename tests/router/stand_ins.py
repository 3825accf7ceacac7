"""Stand-ins for who sends messages, and for who holds."""

from __future__ import annotations

from collections.abc import Callable

from gateway.core import catalogue
from gateway.core.principal import Principal
from gateway.router.lanes import Lane


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
