"""When the breaker trips, and how long a ban is."""

from __future__ import annotations

import ipaddress

import pytest

from gateway.core.breaker import MAX_BANS, SLICE_S, WINDOW_S, Bans, BreakerRules, Window
from gateway.core.principal import Principal
from gateway.core.protection import MAX_WINDOWS, Ban, Protection
from gateway.core.tenants import Tenants
from gateway.errors import Refused

RULES = BreakerRules()


@pytest.mark.parametrize(
    ("came", "failed", "trips"),
    [(19, 19, False), (20, 10, False), (20, 11, True), (20, 20, True), (1000, 500, False), (1000, 501, True)],
)
def test_more_than_half_of_at_least_twenty_trips(came: int, failed: int, trips: bool) -> None:
    assert RULES.trips(came, failed) is trips


def test_share_of_one_never_trips() -> None:
    assert not BreakerRules(share=1).trips(1000, 1000)


def test_window_forgets_what_is_older_than_a_minute() -> None:
    window = Window()
    window.count(100.0, came=30, failed=30)
    assert window.totals(100.0) == (30, 30)
    window.count(130.0, came=5)
    assert window.totals(130.0) == (35, 30)
    assert window.totals(100.0 + WINDOW_S) == (35, 30)
    assert window.totals(100.0 + WINDOW_S + 2 * SLICE_S) == (5, 0)


def test_window_of_a_steady_stream_is_a_minute_long() -> None:
    window = Window()
    for second in range(1000):
        window.count(float(second), came=10, failed=second % 2)
    came, failed = window.totals(999.0)
    assert WINDOW_S * 10 <= came <= (WINDOW_S + SLICE_S) * 10 + 10
    assert failed == pytest.approx(came / 20, abs=2)


def test_bans_double_up_to_a_quarter_of_an_hour_and_are_forgiven_after_a_clean_one() -> None:
    bans: Bans[str] = Bans(RULES)
    now, lengths = 0.0, []
    for _ in range(6):
        lengths.append(bans.pronounce("mallory", now))
        assert bans.remaining_s("mallory", now) == lengths[-1]
        now += lengths[-1] + 60
    assert lengths == [60, 120, 240, 480, 900, 900]
    assert bans.remaining_s("mallory", now) == 0
    now += 3600
    assert bans.pronounce("mallory", now) == 60


def test_a_ban_that_runs_is_not_pronounced_again() -> None:
    bans: Bans[str] = Bans(RULES)
    bans.pronounce("mallory", 0.0)
    assert bans.pronounce("mallory", 10.0) == 50
    assert bans.pronounce("mallory", 61.0) == 120


def test_a_million_bans_take_bounded_memory_and_are_forgotten_when_forgiven() -> None:
    bans: Bans[int] = Bans(RULES)
    for who in range(1_000_000):
        bans.pronounce(who, 0.0)
    assert len(bans) == MAX_BANS
    assert bans.remaining_s(999_999, 1.0) > 0
    while len(bans):
        before = len(bans)
        bans.forgive(RULES.ban_s + RULES.forgive_s)
        assert len(bans) < before


def test_longer_ban_of_two_counts() -> None:
    bans: Bans[str] = Bans(RULES)
    bans.pronounce("mallory", 0.0)
    bans.learn("mallory", 240.0, 240.0, 0.0)
    assert bans.remaining_s("mallory", 0.0) == 240
    bans.learn("mallory", 10.0, 60.0, 0.0)
    assert bans.remaining_s("mallory", 0.0) == 240


def code(protection: Protection, address: str, now: float) -> tuple[str, int | None]:
    with pytest.raises(Refused) as refused:
        protection.check_address(address, now)
    return refused.value.refusal.code, refused.value.retry_after_s


def test_address_whose_handshakes_fail_is_shut_out_and_told_for_how_long() -> None:
    protection = Protection()
    told: list[Ban] = []
    protection.tell(told.append)
    for _ in range(19):
        assert protection.note_handshake("192.0.2.1", 5.0, failed=True) is None
    protection.check_address("192.0.2.1", 5.0)
    assert protection.note_handshake("192.0.2.1", 5.0, failed=True) is not None
    for _ in range(100):  # that were under way
        assert protection.note_handshake("192.0.2.1", 5.0, failed=True) is None
    assert told == [Ban("address", ("192.0.2.1",), 60.0, 60.0)]
    assert code(protection, "192.0.2.1", 5.5) == ("banned", 60)
    protection.check_address("192.0.2.2", 5.5)
    protection.check_address("192.0.2.1", 65.0)


def test_address_with_as_many_good_handshakes_is_not() -> None:
    protection = Protection()
    for number in range(1000):
        assert protection.note_handshake("192.0.2.1", 5.0, failed=number % 2 == 1) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "2001:db8:1:2::/64"])
def test_exempt_address_never_is(address: str) -> None:
    exempt = [ipaddress.ip_network(text) for text in ("127.0.0.0/8", "10.0.0.0/8", "2001:db8::/32")]
    protection = Protection(exempt=exempt)
    for _ in range(1000):
        assert protection.note_handshake(address, 5.0, failed=True) is None


def test_windows_of_a_million_addresses_take_bounded_memory() -> None:
    protection = Protection()
    for number in range(MAX_WINDOWS + 1000):
        protection.note_handshake(f"a{number}", 5.0, failed=True)
    assert len(protection._windows) == MAX_WINDOWS


def test_user_that_is_banned_elsewhere_is_banned_here() -> None:
    protection, user = Protection(), Tenants().user(Principal("alice", "acme", "free", 0.0), 0.0)
    protection.check_user(user, 0.0)
    protection.learn(Ban("user", ("acme", "alice"), 100.0, 120.0), 0.0)
    with pytest.raises(Refused) as refused:
        protection.check_user(user, 1.0)
    assert refused.value.retry_after_s == 99
    protection.sweep(1.0)
    assert protection.running() == {"user": 1, "address": 0}
    assert protection.ban_user(user, 200.0).length_s == 240, "it goes on where that ended"
