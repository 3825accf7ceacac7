"""Rates, budgets and places of tenants, on clocks of the tests' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import catalogue
from gateway.core.catalogue import Close
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.tenants import IDLE_S, Holder, Over, Tenants, User
from gateway.errors import Refused

NOON = datetime(2026, 2, 28, 12, tzinfo=UTC)


def principal(user: str = "alice", company: str = "acme", tier: str = "free", issued_at: float = 0.0) -> Principal:
    return Principal(user, company, tier, 4e9, issued_at)


def user_with(user: str = "alice", company: str = "acme", **limits: float) -> User:
    tenants = Tenants({"free": TierLimits(**limits)})  # type: ignore[arg-type]  # whole numbers where they must be
    tenants.learn_tier(principal(user, company))
    return tenants.user(principal(user, company), 0.0)


def send(user: User, count: int, now: float, utc: datetime = NOON, size: int = 10) -> tuple[int, Over | None]:
    """How many of so many messages may go, as a session asks: in the plain case it takes them itself."""
    messages = [bytes(size)] * count
    limits = user.company.limits
    full_at = max(user.full_at, now) + count * limits.pace * user.weight
    if full_at - now <= limits.allowance:
        user.full_at = full_at
        return count, None
    over = user.grant(messages, now, utc)
    return count - (over.dropped if over else 0), over


def test_who_keeps_to_the_rate_loses_nothing_in_an_hour() -> None:
    user = user_with(messages_per_second=50)
    assert all(send(user, 1, number / 50)[1] is None for number in range(50 * 3600))


def test_who_is_over_by_one_message_a_second_loses_one_a_second() -> None:
    user = user_with(messages_per_second=50)
    went = sum(send(user, 1, number / 51)[0] for number in range(51 * 3600))
    assert went == pytest.approx(50 * 3600 + 100, abs=2), "the burst of two seconds, then the rate"


def test_burst_is_two_seconds_worth_and_the_tail_of_a_read_is_over() -> None:
    user = user_with(messages_per_second=50)
    went, over = send(user, 130, 0.0, size=7)
    assert (went, over) == (100, Over(catalogue.DROPPED_RATE, 30, 210, 50, 20))
    assert user.share == 1
    assert send(user, 1, 0.01)[0] == 0
    assert send(user, 1, 0.02)[0] == 1


def test_slow_rate_lets_one_message_through_at_once() -> None:
    user = user_with(messages_per_second=0.1)
    assert [send(user, 1, now)[0] for now in (0.0, 9.9, 10.1, 19.0)] == [1, 0, 1, 0]


def test_without_a_rate_everything_goes() -> None:
    user = user_with()
    assert all(send(user, 100_000, 0.0)[1] is None for _ in range(10))


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 200)), min_size=1, max_size=60),
    st.sampled_from([0.5, 1, 7, 50, 1000]),
)
def test_no_more_goes_than_burst_and_rate_allow_and_no_less(reads: list[tuple[float, int]], rate: float) -> None:
    user = user_with(messages_per_second=rate)
    full = max(1.0, 2 * rate)
    now, level = 0.0, full
    for pause, count in reads:
        now += pause
        level = min(full, level + pause * rate)
        went, _ = send(user, count, now)
        assert abs(went - min(count, level)) < 1 + 1e-6
        assert went <= level + 1e-6
        level -= went


def test_clock_that_goes_back_neither_floods_nor_starves() -> None:
    user = user_with(messages_per_second=50)
    assert send(user, 200, 5000.0)[0] == 100
    assert send(user, 200, 1400.0)[0] == 0, "an hour back"
    assert send(user, 200, 1401.0)[0] == 50, "and on from there"


def test_one_user_id_in_two_companies_is_two_users() -> None:
    tenants = Tenants({"free": TierLimits(messages_per_second=50)})
    users = []
    for company in ("acme", "other"):
        tenants.learn_tier(principal(company=company))
        users.append(tenants.user(principal(company=company), 0.0))
    assert [send(user, 100, 0.0)[0] for user in users] == [100, 100]


# Budgets of a company


def test_companys_rate_is_shared_by_its_users() -> None:
    tenants = Tenants({"free": TierLimits(messages_per_second=50, company_messages_per_second=60)})
    users = [tenants.user(principal(name), 0.0) for name in ("alice", "bob")]
    tenants.learn_tier(principal())
    assert send(users[0], 100, 0.0)[0] == 100
    went, over = send(users[1], 100, 0.0)
    assert went == 20, "of the company's 120"
    assert over is not None
    assert (over.reason, over.messages_per_second) == (catalogue.DROPPED_COMPANY_RATE, 60)
    assert send(users[1], 100, 1.0)[0] == 60
    assert send(users[0], 100, 1.0)[0] == 0


def test_what_the_company_refuses_is_not_taken_from_the_user() -> None:
    user = user_with(messages_per_second=50, company_messages_per_second=10)
    assert send(user, 100, 0.0)[0] == 20
    user.company.use_limits(TierLimits(messages_per_second=50))
    assert send(user, 100, 0.0)[0] == 80


def test_bytes_a_second_let_a_big_message_through_in_advance() -> None:
    user = user_with(company_bytes_per_second=100)
    assert send(user, 3, 0.0, size=150)[0] == 2, "200 are there: the second is paid back"
    went, over = send(user, 1, 0.0, size=150)
    assert went == 0
    assert over is not None
    assert over.retry_after_ms == 1000
    assert send(user, 1, 1.1, size=150)[0] == 1


def test_bytes_of_a_day_are_exact_and_new_at_midnight() -> None:
    user = user_with(company_bytes_per_day=1000)
    went, over = send(user, 150, 0.0)
    assert went == 100
    assert over is not None
    assert over.reason is catalogue.DROPPED_COMPANY_BUDGET
    assert over.retry_after_ms == 12 * 3600 * 1000
    assert send(user, 1, 0.0, NOON + timedelta(hours=11, minutes=59))[0] == 0
    assert send(user, 150, 0.0, NOON + timedelta(hours=12))[0] == 100


def test_bytes_of_a_month_outlast_the_day() -> None:
    user = user_with(company_bytes_per_day=1000, company_bytes_per_month=1500)
    assert send(user, 150, 0.0, NOON - timedelta(days=1))[0] == 100
    went, over = send(user, 150, 0.0, NOON)
    assert went == 50
    assert over is not None
    assert over.retry_after_ms == 12 * 3600 * 1000, "the last day of February"
    assert send(user, 150, 0.0, NOON + timedelta(days=1))[0] == 100, "March"


def test_wall_clock_that_goes_back_over_midnight_gives_no_second_budget() -> None:
    user = user_with(company_bytes_per_day=1000)
    after_midnight = NOON + timedelta(hours=12, minutes=10)
    assert send(user, 100, 0.0, after_midnight)[0] == 100
    assert send(user, 100, 0.0, after_midnight - timedelta(hours=1))[0] == 0
    assert send(user, 100, 0.0, after_midnight + timedelta(hours=1))[0] == 0
    assert send(user, 100, 0.0, after_midnight - timedelta(days=30))[0] == 100, "a clock that was wrong by days"


def test_spent_budget_is_remembered_when_everybody_has_gone() -> None:
    tenants = Tenants({"free": TierLimits(company_bytes_per_month=1000)})
    user = tenants.user(principal(), 0.0)
    tenants.learn_tier(principal())
    send(user, 100, 0.0)
    tenants.sweep(IDLE_S + 1)
    assert not user.company.users
    assert not user.company.is_idle(NOON)
    assert user.company.is_idle(NOON + timedelta(days=1))


# Tiers


def test_newest_token_says_what_tier_a_company_has() -> None:
    tenants = Tenants({"free": TierLimits(users=1), "pro": TierLimits(users=5)})
    for tier, issued_at in (("free", 100.0), ("pro", 200.0), ("free", 150.0)):
        tenants.learn_tier(principal(tier=tier, issued_at=issued_at))
    company = tenants.company("acme")
    assert (company.tier, company.limits.users) == ("pro", 5)


def test_changed_tiers_hold_for_those_who_are_there() -> None:
    user = user_with(messages_per_second=50)
    tenants = Tenants({"free": TierLimits(messages_per_second=50)})
    tenants.learn_tier(principal())
    user = tenants.user(principal(), 0.0)
    assert send(user, 100, 0.0)[0] == 100
    tenants.use_tiers({"free": TierLimits(messages_per_second=10)})
    assert send(user, 100, 10.0)[0] == 20
    tenants.use_tiers({})
    assert send(user, 5000, 10.0)[0] == 5000, "a tier that is gone limits nobody"
    tenants.use_tiers({"free": TierLimits(messages_per_second=10)})
    assert send(user, 100, 10.0)[0] == 0, "what was spent is spent"
    assert send(user, 100, 12.0)[0] == 20


# Places


class Place:
    """A connection that notes when it loses its place."""

    def __init__(self, account: str = "a", connection_id: str = "c") -> None:
        self.account = account
        self.connection_id = connection_id
        self.revoked: list[Close] = []

    def revoke(self, close: Close, /) -> None:
        self.revoked.append(close)


def claim(tenants: Tenants, user: str, account: str = "", company: str = "acme") -> tuple[User, Place, list[Holder]]:
    who = principal(user, company)
    tenants.learn_tier(who)
    found, place = tenants.user(who, 0.0), Place(account or user)
    tenants.check(found, place.account)
    return found, place, tenants.enter(found, place)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        act()
    return caught.value.refusal.code


def test_users_of_a_company_are_counted_once_each() -> None:
    tenants = Tenants({"free": TierLimits(users=2)})
    alice, place, _ = claim(tenants, "alice")
    claim(tenants, "alice", "second")
    claim(tenants, "bob")
    assert refused(lambda: claim(tenants, "carol")) == "too_many_users"
    claim(tenants, "carol", company="other")
    tenants.leave(alice, place, 0.0)
    assert refused(lambda: claim(tenants, "carol")) == "too_many_users", "alice has another connection"
    tenants.leave(alice, alice.places[0], 0.0)
    claim(tenants, "carol")


def test_accounts_are_counted_by_user_and_by_company() -> None:
    tenants = Tenants({"free": TierLimits(accounts=3, accounts_per_user=2)})
    claim(tenants, "alice", "1")
    claim(tenants, "alice", "2")
    claim(tenants, "alice", "2")
    assert refused(lambda: claim(tenants, "alice", "3")) == "too_many_accounts"
    claim(tenants, "bob", "1")
    assert refused(lambda: claim(tenants, "bob", "4")) == "too_many_accounts"


def test_newer_connection_of_an_account_replaces_the_oldest_of_its_own_user_only() -> None:
    tenants = Tenants({"free": TierLimits(connections_per_account=2)})
    _, first, _ = claim(tenants, "alice", "1")
    claim(tenants, "alice", "1")
    _, _, replaced = claim(tenants, "alice", "1")
    assert replaced == [first]
    assert claim(tenants, "bob", "1")[2] == []
    assert tenants.company("acme").connections == 3


def test_lowered_limits_take_places_from_those_that_came_last() -> None:
    tenants = Tenants({"free": TierLimits()})
    first = claim(tenants, "alice", "1")[1]
    older = claim(tenants, "alice", "2")[1]
    newer = claim(tenants, "alice", "2")[1]
    bob = claim(tenants, "bob")[1]
    assert tenants.use_tiers({"free": TierLimits(connections_per_account=1)}) == [older]
    assert tenants.use_tiers({"free": TierLimits(users=1)}) == [bob]
    assert tenants.company("acme").connections == 2, "their places are gone at once"
    assert tenants.use_tiers({"free": TierLimits(accounts=1)}) == [newer]
    assert tenants.use_tiers({"free": TierLimits()}) == []
    assert first.revoked == [], "whoever asked revokes"


def test_user_that_has_left_keeps_its_spent_bucket_for_a_minute() -> None:
    tenants = Tenants({"free": TierLimits(messages_per_second=1)})
    alice, place, _ = claim(tenants, "alice")
    assert send(alice, 10, 0.0)[0] == 2
    tenants.leave(alice, place, 0.0)
    tenants.sweep(IDLE_S - 1)
    assert tenants.user(principal(), 0.0) is alice
    tenants.sweep(IDLE_S)
    assert tenants.user(principal(), 0.0) is not alice


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcd"), st.sampled_from("123"), st.integers(0, 9))))
def test_counts_follow_the_places_whatever_comes_and_goes(steps: list[tuple[bool, str, str, int]]) -> None:
    limits = TierLimits(users=3, accounts=5, accounts_per_user=2, connections_per_account=2)
    tenants = Tenants({"free": limits})
    held: list[tuple[User, Place]] = []
    for comes, name, account, which in steps:
        if comes:
            try:
                user, place, replaced = claim(tenants, name, account)
            except Refused:
                continue
            held = [(owner, one) for owner, one in held if one not in replaced]
            held.append((user, place))
        elif held:
            user, place = held.pop(which % len(held))
            assert tenants.leave(user, place, 0.0)
            assert not tenants.leave(user, place, 0.0), "it was gone"
        company = tenants.company("acme")
        accounts = {(user.user_id, place.account) for user, place in held}
        assert company.connections == len(held)
        assert company.live_users == len({user for user, _ in accounts}) <= 3
        assert company.accounts == len(accounts) <= 5
        assert not tenants.reduce(company, 0.0)
    for user, place in held:
        tenants.leave(user, place, 0.0)
    tenants.sweep(math.inf)
    company = tenants.company("acme")
    assert (company.connections, company.live_users, company.accounts, company.users) == (0, 0, 0, {})


def test_user_that_is_about_to_come_back_is_not_forgotten_meanwhile() -> None:
    tenants = Tenants({"free": TierLimits(messages_per_second=1)})
    alice, place, _ = claim(tenants, "alice")
    tenants.leave(alice, place, 0.0)
    coming = tenants.user(principal(), IDLE_S)  # it asks for a place, which takes a while
    tenants.sweep(IDLE_S)
    assert coming is alice
    tenants.enter(coming, Place("alice"))
    assert tenants.find("acme", "alice") is alice
    assert tenants.company("acme") is alice.company


def test_user_that_is_forgotten_takes_no_other_with_it() -> None:
    tenants = Tenants()
    old = tenants.user(principal(), 0.0)
    del tenants.companies["acme"]  # as the books do with a company that is idle
    alice, place, _ = claim(tenants, "alice")
    assert alice is not old
    tenants.sweep(IDLE_S)
    assert tenants.find("acme", "alice") is alice
    assert tenants.leave(alice, place, IDLE_S)
