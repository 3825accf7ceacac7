"""What a place costs: admission by limits in memory, and through a registry in Redis.

In memory: check the limits, take a place, give it back. In Redis: so many connections ask at the same time; each asks
again when it has been answered.
"""

from __future__ import annotations

import argparse
import sys
import time

import trio

from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.tenants import Tenants
from gateway.registry.port import Place
from gateway.registry.redis import connected
from gateway.testing.figures import percentile

LIMITS = TierLimits(messages_per_second=50, users=1000, accounts=1000, connections_per_account=1)


class Holder:
    """A connection."""

    def __init__(self, number: int) -> None:
        self.connection_id = f"c-{number}"
        self.account = f"a-{number}"

    def revoke(self, close: object, /) -> None:
        """Nobody is replaced."""


def in_memory(count: int) -> list[float]:
    """Microseconds of each admission, beside 500 users of the same company."""
    tenants = Tenants({"pro": LIMITS})
    users = [Principal(f"user-{number}", "bench", "pro", 4e9) for number in range(1000)]
    for number in range(500):
        tenants.learn_tier(users[number])
        tenants.enter(tenants.user(users[number], 0.0), Holder(number))
    took = []
    for number in range(count):
        who, holder = users[500 + number % 500], Holder(number)
        began = time.perf_counter_ns()
        tenants.learn_tier(who)
        user = tenants.user(who, 0.0)
        tenants.check(user, holder.account)
        tenants.enter(user, holder)
        tenants.leave(user, holder, 0.0)
        took.append((time.perf_counter_ns() - began) / 1000)
    return took


async def in_redis(url: str, count: int, at_once: int) -> list[float]:
    """Milliseconds of each claim; releases are not in it."""
    took: list[float] = []
    async with connected(url, "bench", lease_s=30, timeout_s=5) as backend:

        async def ask(first: int) -> None:
            for number in range(first, count, at_once):
                place = Place(f"company-{number % 100}", f"user-{first}", "1", f"c-{number}")
                began = time.perf_counter_ns()
                await backend.claim(place, LIMITS)
                took.append((time.perf_counter_ns() - began) / 1e6)
                await backend.release(place)

        async with trio.open_nursery() as nursery:
            for first in range(at_once):
                nursery.start_soon(ask, first)
    return took


def show(name: str, unit: str, values: list[float]) -> None:
    """One line."""
    values.sort()
    print(f"{name:34s} p50 {percentile(values, 0.5):8.2f}  p99 {percentile(values, 0.99):8.2f} {unit}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.places", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="admissions (20000)")
    parser.add_argument("--redis", metavar="URL", help="measure this Redis too; its keys gateway:* are written")
    parser.add_argument("--at-once", type=int, default=8, help="claims under way in Redis (8)")
    options = parser.parse_args()
    if not options.count:
        sys.exit("bench.places: --count must be positive")
    show("in memory", "us", in_memory(options.count))
    if options.redis:
        show(
            f"in Redis, {options.at_once} at once",
            "ms",
            trio.run(in_redis, options.redis, options.count, options.at_once),
        )


if __name__ == "__main__":
    main()
