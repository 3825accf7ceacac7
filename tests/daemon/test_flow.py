"""Backpressure by name: reading runs while nobody holds."""

from __future__ import annotations

from typing import Any

import trio

from gateway.core.progress import Progress
from gateway.daemon.flow import DEGRADED_S, Flow
from gateway.ws.readiness import Readiness


class Told:
    """Sessions that note what they are told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def tell_degraded(self, *, unconfirmed_only: bool) -> None:
        self.said.append("degraded, unconfirmed only" if unconfirmed_only else "degraded")

    def tell_recovered(self) -> None:
        self.said.append("recovered")


def make() -> tuple[Flow, Readiness, Told, Progress]:
    readiness, told, progress = Readiness(), Told(), Progress()
    flow = Flow(readiness, progress)
    sessions: Any = told
    flow.attach(sessions)
    return flow, readiness, told, progress


async def test_reading_runs_again_when_the_last_hold_has_ended() -> None:
    flow, readiness, _, _ = make()
    flow.hold("producer_full")
    flow.hold("spool_blocked")
    flow.hold("producer_full")
    assert (flow.names, readiness.paused) == (("producer_full", "spool_blocked"), True)
    flow.release("producer_full")
    assert readiness.paused, "the spool still holds"
    flow.release("producer_full")
    flow.release("never_held")
    assert readiness.paused
    flow.release("spool_blocked")
    assert (flow.names, flow.held, readiness.paused) == ((), False, False)
    readiness.close()


async def test_hold_that_begins_while_what_stalled_is_handed_over_stays() -> None:
    flow, readiness, _, _ = make()

    class Stalled:
        backlog = 1

        def resume(self) -> None:
            flow.hold("producer_full")
            readiness.stall(self)

        def crash(self, error: Exception) -> None:
            raise error

    flow.hold("producer_full")
    readiness.stall(Stalled())
    flow.release("producer_full")
    assert (flow.names, readiness.paused, readiness.stalled) == (("producer_full",), True, 1)
    readiness.close()


async def test_clients_hear_of_a_long_hold_and_of_its_end_and_not_of_one_in_passing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    flow, readiness, told, _ = make()
    flow.hold("producer_full")
    flow.look()
    flow.release("producer_full")
    assert told.said == ["recovered"], "who had been told nothing hears nothing"
    flow.hold("producer_full")
    await trio.sleep(DEGRADED_S / 2)
    flow.hold("spool_blocked")
    await trio.sleep(DEGRADED_S / 2)
    flow.look()
    assert told.said[1:] == ["degraded"]
    flow.release("producer_full")
    assert told.said[1:] == ["degraded"]
    flow.release("spool_blocked")
    assert told.said[1:] == ["degraded", "recovered"]
    readiness.close()


async def test_kafka_that_confirms_nothing_is_told_to_those_who_wait_for_it() -> None:
    flow, readiness, told, progress = make()
    progress.stands_still = True
    flow.look()
    assert told.said == ["degraded, unconfirmed only"]
    flow.hold("producer_full")
    flow.release("producer_full")
    assert told.said == ["degraded, unconfirmed only"], "it still confirms nothing"
    progress.stands_still = False
    flow.look()
    assert told.said[1:] == ["recovered"]
    readiness.close()
