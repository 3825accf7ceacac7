"""The memory budget: who is refused, who is not read, and when that ends."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gateway.core import catalogue
from gateway.core.admission import AddressRate, Admission
from gateway.daemon.memory import PAUSED_AT_ONCE, MemoryGuard, resident_bytes
from gateway.errors import Refused
from gateway.telemetry.metrics import Metrics


class Holding:
    """A session that holds so many bytes."""

    connection = object()
    is_open = True

    def __init__(self, number: int) -> None:
        self.connection_id = f"c-{number}"
        self.held_bytes = number
        self.read = True

    @property
    def is_read(self) -> bool:
        return self.read

    def pause_reading(self) -> None:
        self.read = False

    def resume_reading(self) -> None:
        self.read = True


class Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append(event)

    error = warning = info


async def test_newcomers_are_refused_first_then_the_largest_are_not_read_and_all_of_it_ends() -> None:
    used = [500]
    sessions = [Holding(number) for number in range(3000)]
    random.Random(7).shuffle(sessions)
    admission, log = Admission(10, AddressRate(0, 1)), Log()
    admission.open()
    guard = MemoryGuard(1000, admission, sessions, log, metrics=Metrics(), measure=lambda: used[0])  # type: ignore[arg-type]  # stand-ins
    await guard.look()
    admission.check()
    used[0] = 900
    await guard.look()
    with pytest.raises(Refused) as refused:
        admission.check()
    assert refused.value.refusal is catalogue.OVERLOADED
    assert all(session.read for session in sessions)
    used[0] = 950
    for turn in range(1, 4):
        await guard.look()
        paused = {session.held_bytes for session in sessions if not session.read}
        assert paused == {*range(3000 - turn * PAUSED_AT_ONCE, 3000)}
    largest = max(sessions, key=lambda session: session.held_bytes)
    largest.resume_reading()  # what it held has been handed over meanwhile
    await guard.look()
    assert not largest.read
    used[0] = 870
    await guard.look()
    assert guard.short, "not calm yet"
    used[0] = 850
    await guard.look()
    admission.check()
    assert all(session.read for session in sessions)
    assert (log.events[0], log.events[-1]) == ("short of memory", "memory is enough again")


async def test_without_a_budget_nothing_is_done() -> None:
    admission, log = Admission(10, AddressRate(0, 1)), Log()
    admission.open()
    guard = MemoryGuard(1, admission, [], log, metrics=Metrics())  # type: ignore[arg-type]  # as above
    await guard.look()
    assert guard.short
    guard.use_budget(0)
    await guard.look()
    admission.check()
    assert resident_bytes() > 1_000_000
