"""Who may come in: the cap, the doors, and the rate of an address."""

from __future__ import annotations

import pytest

from gateway.core import catalogue
from gateway.core.admission import MAX_ADDRESSES, AddressRate, Admission, network
from gateway.errors import Refused


def test_rate_refills_and_addresses_do_not_share() -> None:
    rate = AddressRate(2.0, 3)
    assert [rate.spend("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert rate.spend("a", 0.0) == pytest.approx(0.5)
    assert rate.spend("b", 0.0) == 0.0
    assert rate.spend("a", 0.5) == 0.0
    assert rate.spend("a", 0.5) > 0
    assert [bool(rate.spend("a", 1000.0)) for _ in range(4)] == [False, False, False, True]


def test_no_rate_is_no_limit() -> None:
    rate = AddressRate(0.0, 1)
    assert all(rate.spend("a", 0.0) == 0.0 for _ in range(100))


def test_memory_for_addresses_is_bounded() -> None:
    rate = AddressRate(0.001, 1)
    for number in range(MAX_ADDRESSES + 10):
        rate.spend(str(number), 0.0)
    assert rate.spend(str(MAX_ADDRESSES + 5), 0.0) > 0, "recent ones are remembered"
    assert rate.spend("0", 0.0) == 0.0, "the oldest are forgotten"


def test_doors_closed_cap_and_places() -> None:
    admission = Admission(1, AddressRate(0, 1))
    with pytest.raises(Refused) as refused:
        admission.check()
    assert refused.value.refusal is catalogue.STARTING
    admission.closed = None
    admission.check()
    admission.enter()
    with pytest.raises(Refused) as refused:
        admission.check()
    assert refused.value.refusal is catalogue.AT_CAPACITY
    with pytest.raises(Refused):
        admission.enter()
    admission.leave()
    admission.check()


def test_retry_after_is_at_least_a_second() -> None:
    admission = Admission(10, AddressRate(0.1, 1))
    admission.closed = None
    admission.knock("a", 0.0)
    with pytest.raises(Refused) as refused:
        admission.knock("a", 0.0)
    assert refused.value.retry_after_s == 10


def test_addresses_of_one_network_count_as_one() -> None:
    assert network("192.0.2.7") == "192.0.2.7"
    assert network("2001:db8:1:2::5") == network("2001:db8:1:2:ffff::1") != network("2001:db8:1:3::5")
    assert network("fe80::1%eth0") == network("fe80::2%eth1")
    assert network("::ffff:192.0.2.7") == "192.0.2.7"
