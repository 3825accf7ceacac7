"""The table of fates: what is in it, and what cannot be."""

from __future__ import annotations

import pytest

from gateway.router.fates import FATES, PLACES, WAITING, Event, ImpossibleFate, State, after


def test_every_state_is_reached_and_only_the_last_ones_are_never_left() -> None:
    assert {State.NEW, *FATES.values()} == set(State)
    assert {state for state, _ in FATES} == set(State) - set(PLACES)


def test_every_event_happens_to_some_message() -> None:
    assert {event for _, event in FATES} == set(Event)


@pytest.mark.parametrize("state", [state for state in State if state not in PLACES and state is not State.SPOOLING])
def test_what_is_under_way_can_always_be_given_up(state: State) -> None:
    """A drain ends, whatever it finds."""
    assert after(state, Event.ABANDONED) is State.SPOOLING


@pytest.mark.parametrize("state", [state for state in State if state in WAITING])
def test_what_waits_is_taken_or_refused(state: State) -> None:
    taken, refused = after(state, Event.TAKEN), after(state, Event.REFUSED)
    assert taken in (State.QUEUED, State.DEAD_LETTER_QUEUED)
    assert refused in (State.DEAD_LETTER_DUE, State.SPOOLING)


def test_every_message_ends_somewhere() -> None:
    """From each state the last ones can be reached, and refusals alone lead there in the end."""
    for state in State:
        steps = 0
        while state not in PLACES:
            event = Event.NO_SPOOL if state is State.SPOOLING else Event.REFUSED
            state, steps = after(state, event), steps + 1
            assert steps < len(State), "refused for ever"


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ImpossibleFate, match="CONFIRMED cannot happen to a message that is DELIVERED"):
        after(State.DELIVERED, Event.CONFIRMED)
