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
        moved = acks.settle(index)
        seen.add(index)
        expected = next(n for n in range(len(order) + 1) if n + 1 not in seen)
        assert acks.settled == expected
        assert moved == (acks.settled != before)
    assert acks.settled == len(order)
    assert not acks._ahead
