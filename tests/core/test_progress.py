"""Alarms out of the books: nothing is confirmed, or everything is refused."""

from __future__ import annotations

from gateway.core.progress import FORGET_S, REFUSED_MESSAGES, STALLED_S, Progress
from gateway.core.tally import Tally


def test_type_whose_messages_nobody_confirms_is_named_and_forgotten_when_they_are() -> None:
    progress, ticks, events = Progress(), Tally(), Tally()
    by_type = {"tick_data": ticks, "user_event": events}
    ticks.received = ticks.in_flight = 5
    assert progress.look(by_type, {}, 0.0) == []
    events.received = events.delivered = 1
    assert progress.look(by_type, {}, STALLED_S - 0.1) == []
    assert progress.look(by_type, {}, STALLED_S) == ["kafka_stalled: no tick_data confirmed for 5 s"]
    assert progress.look(by_type, {}, STALLED_S + 1) == [], "said once"
    assert list(progress.reasons) == ["kafka_stalled: no tick_data confirmed for 5 s"]
    ticks.in_flight, ticks.delivered = 4, 1
    progress.look(by_type, {}, STALLED_S + 2)
    assert not progress.reasons


def test_nothing_at_all_stands_still_while_another_type_moves() -> None:
    progress, ticks, events = Progress(), Tally(), Tally()
    ticks.received = ticks.in_flight = 5
    progress.look({"tick_data": ticks, "user_event": events}, {}, 0.0)
    events.received = events.delivered = 1
    progress.look({"tick_data": ticks, "user_event": events}, {}, STALLED_S)
    assert not progress.stands_still
    progress.look({"tick_data": ticks, "user_event": events}, {}, STALLED_S + 1)
    assert progress.stands_still


def test_quiet_gateway_has_no_alarm() -> None:
    progress, ticks = Progress(), Tally()
    for now in (0.0, 100.0, 200.0):
        assert progress.look({"tick_data": ticks}, {}, now) == []
    assert not progress.stands_still


def test_type_that_is_refused_again_and_again_is_named_until_one_is_taken() -> None:
    progress, ticks, unknown = Progress(), Tally(), Tally()
    by_type = {"tick_data": ticks, "unknown": unknown}
    progress.look(by_type, {}, 0.0)
    ticks.received = ticks.dead_lettered = REFUSED_MESSAGES - 1
    unknown.received = unknown.dead_lettered = 1000  # what clients send, and nobody's fault here
    assert progress.look(by_type, {}, 1.0) == []
    ticks.received = ticks.dead_lettered = REFUSED_MESSAGES
    assert progress.look(by_type, {}, 2.0) == ["all_records_refused: tick_data"]
    ticks.received, ticks.delivered = ticks.received + 1, 1
    progress.look(by_type, {}, 3.0)
    assert not progress.reasons


def test_refusals_are_forgotten_when_nobody_sends_any_more() -> None:
    progress, ticks = Progress(), Tally()
    progress.look({"tick_data": ticks}, {}, 0.0)
    ticks.received = ticks.dead_lettered = REFUSED_MESSAGES
    assert progress.look({"tick_data": ticks}, {}, 1.0) == ["all_records_refused: tick_data"]
    ticks.received = ticks.dead_lettered = REFUSED_MESSAGES + 1
    progress.look({"tick_data": ticks}, {}, FORGET_S)
    assert progress.reasons, "the last one is not that long ago"
    progress.look({"tick_data": ticks}, {}, 2 * FORGET_S)
    assert not progress.reasons


def test_what_is_parked_for_a_partition_is_not_waited_for() -> None:
    progress, ticks = Progress(), Tally(received=1000, delivered=997, in_flight=3)
    for now in range(20):
        assert progress.look({"tick_data": ticks}, {"tick_data": 3}, float(now)) == []
    assert not progress.stands_still
    ticks.received, ticks.in_flight = 1001, 4
    progress.look({"tick_data": ticks}, {"tick_data": 3}, 20.0 + STALLED_S)
    assert progress.reasons, "one more than is parked"
