"""Which pairs a user streams, and when that are too many for too long."""

from __future__ import annotations

from gateway.core.pairs import FORGET_S, MAX_PAIRS, PATIENCE_S, Pairs


def test_pairs_are_counted_over_the_last_minute() -> None:
    pairs = Pairs()
    assert not pairs.note(["a", "b", "a"], 2, 0.0)
    assert pairs.note(["c"], 2, 1.0)
    assert not pairs.note(["a"], 0, 2.0), "no limit"
    assert pairs.note(["a"], 2, 2.0)
    assert not pairs.note(["a"], 2, 1.0 + FORGET_S), "b and c are streamed no longer"
    assert len(pairs) == 1


def test_patience_ends_after_a_minute_over_the_limit_without_a_break() -> None:
    pairs = Pairs()
    for second in range(int(PATIENCE_S)):
        assert pairs.note(["a", "b"], 1, float(second))
        assert not pairs.is_out_of_patience(float(second))
    pairs.note(["a", "b"], 1, PATIENCE_S)
    assert pairs.is_out_of_patience(PATIENCE_S)
    assert not pairs.note(["a"], 1, PATIENCE_S + FORGET_S)
    assert not pairs.is_out_of_patience(PATIENCE_S + FORGET_S)


def test_pairs_of_a_user_take_bounded_memory() -> None:
    pairs = Pairs()
    pairs.note([f"p{number}" for number in range(2 * MAX_PAIRS)], 5, 0.0)
    assert len(pairs) == MAX_PAIRS


def test_silence_is_no_time_over_the_limit() -> None:
    pairs = Pairs()
    assert pairs.note(["a", "b"], 1, 0.0)
    assert pairs.note(["a", "b"], 1, 600.0)
    assert not pairs.is_out_of_patience(600.0)
