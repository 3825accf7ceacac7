"""The books: sums, folding, and an equation that can fail."""

from __future__ import annotations

from gateway.core.books import FEW_COMPANIES, SLICE_COMPANIES, Books
from gateway.core.tally import Tally


def test_sums_are_over_companies_and_types() -> None:
    books = Books()
    books.tally("acme", "tick_data").received = 5
    books.tally("acme", "tick_data").delivered = 3
    books.tally("acme", "tick_data").in_flight = 2
    books.tally("other", "tick_data").received = 1
    books.tally("other", "tick_data").dropped = 1
    books.tally("other", "unknown").received = 1
    books.tally("other", "unknown").dead_lettered = 1
    assert books.totals().received == 7
    assert books.totals().imbalance == 0
    assert books.by_type()["tick_data"].received == 6
    assert books.company("acme").in_flight == 2
    assert books.company("nobody") == Tally()


def test_a_message_that_is_nowhere_shows() -> None:
    books = Books()
    books.tally("acme", "tick_data").received = 1
    assert books.totals().imbalance == 1
    assert books.unbalanced_companies() == ["acme"]


def test_companies_that_are_gone_are_folded_and_still_counted() -> None:
    books = Books()
    books.tenants.company("acme").count(connections=1)
    tally = books.tally("acme", "tick_data")
    tally.received, tally.in_flight = 2, 2
    books.fold()
    assert books.companies == 1
    books.tenants.company("acme").count(connections=-1)
    books.fold()
    assert books.companies == 1, "messages are in flight"
    tally.in_flight, tally.delivered = 0, 2
    books.fold()
    assert books.companies == 0
    assert books.totals().delivered == 2
    books.tenants.company("acme").count(connections=1)
    books.tally("acme", "tick_data").received += 1
    books.tally("acme", "tick_data").delivered += 1
    assert books.by_type()["tick_data"].received == 3
    assert books.totals().imbalance == 0


def test_summary_of_many_companies_is_the_last_recounts_which_goes_on_slice_by_slice() -> None:
    books = Books()
    companies = FEW_COMPANIES + SLICE_COMPANIES
    for number in range(companies):
        books.tenants.company(f"company-{number}").count(connections=1)
        tally = books.tally(f"company-{number}", "tick_data")
        tally.received = tally.delivered = 2
    assert len([*books.recount()]) > companies // SLICE_COMPANIES - 1
    assert (books.summary().totals.received, books.summary().unbalanced_companies) == (2 * companies, 0)
    books.tally("company-0", "tick_data").received += 1
    assert books.summary().totals.received == 2 * companies, "nothing is summed up for who asks"
    for _ in books.recount():
        pass
    assert books.summary().totals.received == 2 * companies + 1
    assert books.summary().unbalanced_companies == 1
    for number in range(SLICE_COMPANIES):
        books.tenants.company(f"company-{number + 1}").count(connections=-1)
    books.tally("company-0", "tick_data").delivered += 1
    for _ in books.recount():
        pass
    assert books.companies == FEW_COMPANIES
    assert books.summary().totals.received == 2 * companies + 1, "the gone are in it, and so few are summed up at once"
    assert books.summary().unbalanced_companies == 0


def test_a_message_is_received_once_and_moves_from_place_to_place() -> None:
    tally = Tally()
    tally.receive(100)
    tally.receive(50)
    assert (tally.received, tally.received_bytes, tally.in_flight, tally.in_flight_bytes) == (2, 150, 2, 150)
    tally.move("in_flight", "spooled", 100)
    tally.move("in_flight", "delivered", 50)
    assert (tally.in_flight, tally.in_flight_bytes, tally.spooled_bytes, tally.delivered_bytes) == (0, 0, 100, 50)
    assert (tally.imbalance, tally.imbalance_bytes) == (0, 0)
