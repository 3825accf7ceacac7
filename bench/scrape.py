"""What a scrape costs the event loop, by the number of companies: the sums of the books, and the page of ``/metrics``.

In this process, without sockets: books of so many connected companies with tallies of four types each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

from gateway.core.books import Books
from gateway.core.routes import DEFAULT_ROUTES
from gateway.ops.status import declare_books
from gateway.telemetry.metrics import Metrics

REPEAT = 20


def books_of(companies: int) -> Books:
    """Books of connected companies, each with messages of every type."""
    books = Books()
    for number in range(companies):
        company = f"company-{number}"
        books.tenants.company(company).count(connections=1)
        for message_type in DEFAULT_ROUTES:
            tally = books.tally(company, message_type)
            tally.received = tally.delivered = 3
            tally.received_bytes = tally.delivered_bytes = 390
    return books


def milliseconds(call: Callable[[], object]) -> list[float]:
    """How long each of some calls takes."""
    found = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1000)
    return found


def measure(companies: int) -> dict[str, float]:
    """Medians in milliseconds, but for the longest step, which is the longest of all."""
    books = books_of(companies)
    metrics = Metrics()
    declare_books(metrics, books)
    clock = itertools.count(step=10)  # seconds: a page is used again for one
    steps: list[float] = []

    def recount() -> None:
        began = time.perf_counter()
        for _ in books.recount():
            now = time.perf_counter()
            steps.append((now - began) * 1000)
            began = now
        steps.append((time.perf_counter() - began) * 1000)

    recounts = milliseconds(recount)
    return {
        "companies": companies,
        "metrics_ms": statistics.median(milliseconds(lambda: metrics.page(next(clock)))),
        "summary_ms": statistics.median(milliseconds(books.summary)),
        "recount_ms": statistics.median(recounts),
        "longest_step_ms": max(steps),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.scrape", description=__doc__)
    parser.add_argument("--companies", type=int, nargs="*", default=[10, 256, 1000, 10_000], help="how many")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = [measure(companies) for companies in options.companies]
    if options.json:
        print(json.dumps(rows))
        return
    print("companies  /metrics  sums of /health  recount, once a second  its longest step  (ms)")
    for row in rows:
        print(
            f"{row['companies']:9,.0f}  {row['metrics_ms']:8.2f}  {row['summary_ms']:15.3f}"
            f"  {row['recount_ms']:22.2f}  {row['longest_step_ms']:16.2f}"
        )


if __name__ == "__main__":
    main()
