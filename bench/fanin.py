"""Users and connections: the same load by many users, by few, and with one user who sends most of it.

The user is the Kafka key, so few users fill few partitions; the gateway's own work should not care. Each row is one run
of `bench.ingest` with another mapping of connections to users.
"""

from __future__ import annotations

import argparse
import json
import sys

from bench.ingest import COLD_BROKER, Cores, gateway, kafka_cluster, run_once, show
from gateway.testing.kafka import KafkaUnavailable

SKEWS = ((None, 0.0), (100, 0.0), (10, 0.0), (1, 0.0), (None, 0.5), (None, 0.9))
"""Distinct users (None is one a connection), and the share of connections that belong to the first of them."""


def main() -> None:
    """Measure every skew; exit status 1 when a message was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fanin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000, help="authenticated connections (1000)")
    parser.add_argument("--rate", type=float, default=25.0, help="messages a second of each (25)")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of a run (10)")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds before it, three times that at first (5)")
    parser.add_argument("--kafka", default="apache", help="apache (started from its jars), embedded, or HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    cores = Cores.of_machine()
    runs = []
    warmup_s = options.warmup * COLD_BROKER
    try:
        with kafka_cluster(options.kafka, cores) as kafka:
            for users, hot in SKEWS:
                chosen = {"users": users, "hot": hot, "saturated": False, "batch": 1}
                run = argparse.Namespace(**{**vars(options), **chosen})
                title = f"{options.clients:,} connections of {users or options.clients:,} users"
                title += f", {hot:.0%} of them the first user's" if hot else ""
                print(f"{title} ...", file=sys.stderr, flush=True)
                found = run_once(gateway(kafka, cores, run), cores, run, warmup_s)
                warmup_s = options.warmup
                runs.append({"title": title, **found})
                if not options.json:
                    show([found], title)
    except KafkaUnavailable as error:
        sys.exit(f"bench.fanin: {error}")
    if options.json:
        print(json.dumps(runs, indent=2))
    if any(run["lost"] or run["duplicated"] or run["out_of_order"] for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
