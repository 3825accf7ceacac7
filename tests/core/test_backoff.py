"""Delays that grow while attempts fail."""

from __future__ import annotations

from gateway.core.backoff import Doubling


def test_delays_double_up_to_the_bound_and_begin_anew() -> None:
    delays = Doubling(0.5, 3.0)
    assert [delays.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    delays.reset()
    assert delays.next_s() == 0.5
