"""Everybody connects at once: how long until the last one is in, what was refused meanwhile, what a handshake costs.

First all clients connect to a gateway that has just become ready, all of them at the same time. Then the gateway is
killed, started again, and everybody comes back. A refused attempt is tried again 0.2 s later.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from typing import Any

from bench.ingest import COMPANY, Cores, Helper
from bench.load import user_of
from gateway.testing.daemon import Daemon
from gateway.testing.figures import percentile


def rush(daemon: Daemon, options: argparse.Namespace, cores: Cores, at_once: int) -> tuple[dict[str, Any], Helper]:
    """Connect all clients; the figures, and the process that holds them."""
    clients = [
        (user_of(index, options.clients), daemon.token(user_of(index, options.clients), COMPANY))
        for index in range(options.clients)
    ]
    task = {"url": daemon.url, "company": COMPANY, "size": 130, "batch": 1, "clients": clients, "at_once": at_once}
    cpu = daemon.cpu_s()
    helper = Helper("send", task, cores.rest)
    opened = helper.answer()
    after_ms = [int(seconds * 1000) for seconds in opened["admitted_after_s"]]
    return {
        "all_in_s": opened["seconds"],
        "handshakes_per_s": options.clients / opened["seconds"],
        "cpu_us_per_handshake": (daemon.cpu_s() - cpu) / options.clients * 1e6,
        "admitted_p50_ms": percentile(after_ms, 0.5),
        "admitted_p99_ms": percentile(after_ms, 0.99),
        "refused": sum(opened["refusals"].values()),
        "refusals": opened["refusals"],
    }, helper


def run_once(options: argparse.Namespace, cores: Cores) -> dict[str, dict[str, Any]]:
    """A first rush, a crash, and the rush back."""
    with contextlib.ExitStack() as stack:
        settings = {"listen.max_connections": options.clients + 100, "log.level": "warning"}
        daemon = stack.enter_context(Daemon(options.kafka, settings=settings, cpus=cores.gateway))
        at_once = options.at_once or options.clients
        first, helper = rush(daemon, options, cores, at_once)
        stack.callback(helper.close)
        daemon.kill()
        daemon.start()
        back, helper = rush(daemon, options, cores, at_once)
        stack.callback(helper.close)
        return {"connect": first, "reconnect": back}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=5000, help="clients (5000)")
    parser.add_argument("--at-once", type=int, help="handshakes under way at the same time (all)")
    parser.add_argument("--repeat", type=int, default=3, help="runs, each with a fresh daemon (3)")
    parser.add_argument("--kafka", default="embedded", help="embedded, or HOST:PORT (embedded)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    cores = Cores.of_machine()
    runs = []
    for number in range(options.repeat):
        print(f"storm {number + 1} of {options.repeat} ...", file=sys.stderr, flush=True)
        runs.append(run_once(options, cores))
    if options.json:
        print(json.dumps(runs, indent=2))
        return
    for phase in ("connect", "reconnect"):
        for name in runs[0][phase]:
            if name != "refusals":
                values = [run[phase][name] for run in runs]
                middle, low, high = statistics.median(values), min(values), max(values)
                print(f"{phase:10s} {name:22s} {middle:10,.1f}  [{low:,.1f}-{high:,.1f}]")
        for refusals in (run[phase]["refusals"] for run in runs):
            for said, count in refusals.items():
                print(f"{phase:10s} refused: {said} x {count}")


if __name__ == "__main__":
    main()
