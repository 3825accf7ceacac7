"""Very many authenticated connections held over several processes, each sending a message now and then.

The gateway runs with ``--workers``, the clients in processes of their own with a loopback address each (an address has
some 28,000 ports for one target). Every process stays below the limit of open files. All cores are shared. What is
reported: how long it took to get everybody in, memory and CPU of the workers, connections dropped, messages delivered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from bench.ingest import COMPANY, Cores, Helper, kafka_cluster
from bench.load import user_of
from gateway.testing.daemon import Daemon
from gateway.testing.kafka import KafkaUnavailable, cpu_seconds, rss_bytes

PER_PROCESS = 10_000
"""Connections of one client process: it answers no pings before all of them are there, and idle ones are closed."""
MAX_CONNECTIONS = 19_400
"""Of one worker: 20,000 open files, less what it keeps free."""


def workers(daemon: Daemon) -> list[dict[str, Any]]:
    """What the parent's sidecar says of each worker."""
    found: list[dict[str, Any]] = json.loads(daemon.get("/health")[1])["workers"]
    return found


def cpu_of(daemon: Daemon) -> float:
    """CPU seconds of all workers."""
    return sum(cpu_seconds(worker["pid"]) for worker in workers(daemon))


def rss_of(daemon: Daemon) -> int:
    """Resident memory of all workers."""
    return sum(rss_bytes(worker["pid"]) for worker in workers(daemon))


def run(kafka: str, options: argparse.Namespace) -> dict[str, Any]:
    """Connect, hold, count."""
    with contextlib.ExitStack() as stack:
        settings = {"listen.max_connections": MAX_CONNECTIONS, "log.level": "warning"}
        daemon = stack.enter_context(Daemon(kafka, settings=settings, workers=options.workers))
        empty = rss_of(daemon)
        count = options.connections
        users = [user_of(number, count) for number in range(count)]
        clients = [(user, daemon.token(user, COMPANY)) for user in users]
        began, cpu = time.monotonic(), cpu_of(daemon)
        helpers: list[Helper] = []
        refused = 0
        rate = options.a_minute / 60
        until = None
        for number, first in enumerate(range(0, count, PER_PROCESS)):
            task = {
                "url": daemon.url,
                "company": COMPANY,
                "size": 130,
                "batch": 1,
                "clients": clients[first : first + PER_PROCESS],
                "first_client": first,
                "source": f"127.0.0.{2 + number}",
                "at_once": 256,
            }
            helper = Helper("send", task, None)
            stack.callback(helper.close)
            opened = helper.answer()
            refused += sum(opened["refusals"].values())
            helpers.append(helper)
            print(f"{first + opened['connected']:,} connected after {time.monotonic() - began:.0f} s", file=sys.stderr)
            # They send, and answer pings, while the others connect.
            until = until or time.monotonic() + options.seconds + count / options.expected_rate
            helper.order({"do": "paced", "rate": rate, "seconds": until - time.monotonic()})
        connected_s, connect_cpu = time.monotonic() - began, cpu_of(daemon) - cpu
        time.sleep(3)
        open_at_first = json.loads(daemon.get("/health")[1])["connections"]
        held_from, cpu, rss = time.monotonic(), cpu_of(daemon), rss_of(daemon)
        while time.monotonic() < (until or 0.0) - 5:
            time.sleep(min(30.0, max(0.1, (until or 0.0) - 5 - time.monotonic())))
            now = json.loads(daemon.get("/health")[1])
            held = time.monotonic() - held_from
            print(f"{held:.0f} s: {now['connections']:,} open, {now['messages']}", file=sys.stderr, flush=True)
        held_s, held_cpu = time.monotonic() - held_from, cpu_of(daemon) - cpu
        rss_at_end = rss_of(daemon)
        reports = [helper.answer() for helper in helpers]
        time.sleep(2)
        last = json.loads(daemon.get("/health")[1])
        books = last["messages"]
        return {
            "connections": count,
            "workers": options.workers,
            "connected_after_s": connected_s,
            "handshakes_per_s": count / connected_s,
            "cpu_us_per_handshake": connect_cpu / count * 1e6,
            "refused_and_tried_again": refused,
            "held_s": held_s,
            "open_at_first": open_at_first,
            "open_at_end": last["connections"],
            "dropped": sum(report["closed"] for report in reports),
            "bytes_per_connection": (rss - empty) / count,
            "bytes_per_connection_at_end": (rss_at_end - empty) / count,
            "cpu_share_while_held": held_cpu / held_s,
            "sent": sum(report["sent"] for report in reports),
            "delivered": books["delivered"],
            "lost": sum(report["sent"] for report in reports) - books["delivered"],
            "imbalance": books["imbalance"],
        }


def main() -> None:
    """Measure and print; exit status 1 when a connection was dropped or a message lost."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.hold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=100_000, help="clients (100000)")
    parser.add_argument("--workers", type=int, default=6, help="gateway processes (6)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long all are held (600)")
    parser.add_argument("--a-minute", type=float, default=1.0, help="messages a minute of each client (1)")
    parser.add_argument("--expected-rate", type=float, default=800.0, help="handshakes a second to plan for (800)")
    parser.add_argument("--kafka", default="apache", help="apache (started from its jars), embedded, or HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    try:
        with kafka_cluster(options.kafka, Cores(None, None)) as kafka:
            found = run(kafka, options)
    except KafkaUnavailable as error:
        sys.exit(f"bench.hold: {error}")
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:28s} {value:14,.1f}")
    if found["dropped"] or found["lost"] or found["imbalance"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
