"""The exposition: histograms add up, labels are fixed, the page is cached."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gateway.core import catalogue
from gateway.core.books import Books
from gateway.ops.status import declare_books
from gateway.router.sessions import OUTCOMES
from gateway.telemetry.metrics import Histogram, Metrics
from gateway.ws.listener import HANDSHAKE_OUTCOMES


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 5.0):
        histogram.observe(value)
    histogram.observe(0.5, 4)
    assert histogram.buckets() == [("0.1", 2.0), ("1.0", 7.0), ("+Inf", 8.0)]
    assert histogram.total == 0.05 + 0.1 + 0.5 + 5.0 + 2.0


def test_page_holds_the_books_by_outcome_and_type_and_is_cached() -> None:
    books = Books()
    tally = books.tally("acme", "tick_data")
    tally.received, tally.delivered, tally.received_bytes = 5, 5, 500
    page = Metrics()
    declare_books(page, books)
    families = {family.name: family for family in text_string_to_metric_families(page.page(0.0).decode())}
    found = {(s.labels["outcome"], s.labels["message_type"]): s.value for s in families["gateway_messages"].samples}
    assert found["delivered", "tick_data"] == 5
    first = page.page(0.0)
    tally.received = 6
    assert page.page(0.9) is first
    assert page.page(1.0) is not first
    assert b"gateway_books_imbalance 1.0" in page.page(1.0)


def test_every_refusal_and_close_has_its_series_from_the_start() -> None:
    refused = {value.code for value in vars(catalogue).values() if isinstance(value, catalogue.Refusal)}
    assert refused <= set(HANDSHAKE_OUTCOMES)
    closes = {value.name for value in vars(catalogue).values() if isinstance(value, catalogue.Close) and value.sent}
    assert closes <= set(OUTCOMES)


def test_label_that_was_forgotten_is_counted_all_the_same() -> None:
    metrics = Metrics()
    counts = metrics.labelled("gateway_some", "Some.", "reason", ("known",))
    counts.add("forgotten")
    page = metrics.page(0.0).decode()
    assert 'gateway_some_total{reason="known"} 0.0' in page
    assert 'gateway_some_total{reason="forgotten"} 1.0' in page


def test_name_that_is_declared_again_is_the_same_metric() -> None:
    metrics = Metrics()
    metrics.counter("gateway_some", "Some.").add(2)
    metrics.counter("gateway_some", "Some.").add(3)
    assert "gateway_some_total 5.0" in metrics.page(0.0).decode()
