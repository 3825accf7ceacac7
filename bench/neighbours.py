"""What neighbours do to each other: the wait in the gateway of steady clients, quiet, in a storm, and beside a glutton.

Steady clients stream at their pace. In a storm thousands of others connect at once; a glutton is one connection that
sends as fast as it is taken, without a limit of its rate. Each in a run of its own, in turns. The wait is from the
moment a client makes a message to the moment it is handed to the producer, in whole milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench.ingest import COMPANY, Cores, Disturb, Helper, Server, kafka_cluster, run_once
from gateway.testing.daemon import Daemon
from gateway.testing.figures import percentile
from gateway.testing.kafka import KafkaUnavailable


def task(daemon: Server, names: list[str]) -> dict[str, Any]:
    """What a load process of neighbours is told."""
    clients = [(name, daemon.token(name, COMPANY)) for name in names]
    return {"url": daemon.url, "company": COMPANY, "size": 130, "clients": clients, "message_type": "notification"}


def storm(cores: Cores, connects: int, admitted: list[float]) -> Disturb:
    """So many connect at once when the measured time begins."""

    @contextlib.contextmanager
    def disturb(daemon: Server) -> Iterator[None]:
        names = [f"storm-{index}" for index in range(connects)]
        helper = Helper("send", {**task(daemon, names), "batch": 1, "at_once": connects}, cores.rest)
        try:
            yield
            admitted.append(helper.answer()["seconds"])
        finally:
            helper.close()

    return disturb


def glutton(cores: Cores, seconds: float, sent: list[float]) -> Disturb:
    """One sends as fast as it is taken."""

    @contextlib.contextmanager
    def disturb(daemon: Server) -> Iterator[None]:
        helper = Helper("send", {**task(daemon, ["glutton"]), "batch": 64}, cores.rest)
        try:
            helper.answer()
            helper.order({"do": "saturated", "seconds": seconds})
            yield
            sent.append(helper.answer()["sent_per_s"])
        finally:
            helper.close()

    return disturb


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.neighbours", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=500, help="steady clients (500)")
    parser.add_argument("--rate", type=float, default=20.0, help="messages a second of each (20)")
    parser.add_argument("--connects", type=int, default=5000, help="connections of the storm (5000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of a run (10)")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds before it (3)")
    parser.add_argument("--repeat", type=int, default=3, help="turns (3)")
    parser.add_argument("--kafka", default="apache", help="apache (started from its jars), embedded, or HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    run = argparse.Namespace(**vars(options), size=130, batch=1, users=None, saturated=False)
    cores = Cores.of_machine()
    admitted: list[float] = []
    sent: list[float] = []
    kinds: dict[str, Callable[[], Disturb | None]] = {
        "quiet": lambda: None,
        "storm": lambda: storm(cores, options.connects, admitted),
        "glutton": lambda: glutton(cores, options.seconds, sent),
    }
    settings = {"listen.max_connections": options.clients + options.connects + 100, "log.level": "warning"}
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    try:
        with kafka_cluster(options.kafka, cores) as kafka:
            for turn in range(options.repeat):
                for kind, disturb in kinds.items():
                    print(f"{kind}, turn {turn + 1} ...", file=sys.stderr, flush=True)
                    daemon = Daemon(kafka, settings=settings, cpus=cores.gateway)
                    runs[kind].append(run_once(daemon, cores, run, options.warmup, disturb()))
    except KafkaUnavailable as error:
        sys.exit(f"bench.neighbours: {error}")
    if options.json:
        print(json.dumps({"runs": runs, "storm_admitted_s": admitted, "glutton_per_s": sent}, indent=2))
        return
    for kind, found in runs.items():
        for name in ("wait_p50_ms", "wait_p99_ms", "p99_ms", "cpu_share", "lost"):
            values = sorted(one[name] for one in found)
            print(f"{kind:8s} {name:12s} {percentile(values, 0.5):8.2f}  [{values[0]:.2f}-{values[-1]:.2f}]")
    print(f"storm: all {options.connects} admitted after {', '.join(f'{one:.1f}' for one in admitted)} s")
    print(f"glutton: {', '.join(f'{one:,.0f}' for one in sent)} messages a second")


if __name__ == "__main__":
    main()
