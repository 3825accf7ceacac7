"""Cumulative acks: the count never covers a message that is not settled, and reaches all in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.acks import Acks


@given(st.integers(0, 60).flatmap(lambda count: st.permutations(range(1, count + 1))))
def test_settled_is_the_longest_settled_beginning_in_any_order(order: list[int]) -> None:
    acks = Acks()
    seen: set[int] = set()
    for index in order:
        before = acks.settled
        acks.told = before if index % 3 else max(0, before - 1)
        news = acks.settle(index)
        seen.add(index)
        expected = next(n for n in range(len(order) + 1) if n + 1 not in seen)
        assert acks.settled == expected
        assert news == (acks.settled != before == acks.told), "once, until the client has been told"
    assert acks.settled == len(order)
    assert acks.runs == 0


def test_one_message_that_waits_costs_one_run_however_many_are_settled_behind_it() -> None:
    acks = Acks()
    for index in range(2, 10_000):
        acks.settle(index)
    assert (acks.settled, acks.runs) == (0, 1)
    acks.settle(1)
    assert (acks.settled, acks.runs) == (9_999, 0)
