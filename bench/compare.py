"""The same work in one run: the gateway and the baselines of `bench.baselines`, interleaved, each verified.

Every server gets the same clients, messages, topic and broker, one after the other in each repeat, pinned to the same
core. Three loads: paced with 1,000 and 2,000 clients, and saturated (100 clients, 16 messages a write). The two heavier
ones are consumed afterwards, so that the consumer takes no core from the load. What a server lost, doubled or
disordered stands in its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.baselines.server import BASELINES, Baseline, BaselineUnavailable
from bench.ingest import COLD_BROKER, Cores, Server, gateway, kafka_cluster, run_once
from gateway.testing.kafka import KafkaUnavailable

GATEWAY = "gateway"
LOADS = {
    "1000x50": {"clients": 1000, "rate": 50.0, "saturated": False, "batch": 1},
    "2000x50": {"clients": 2000, "rate": 50.0, "saturated": False, "batch": 1, "consume_afterwards": True},
    "saturated": {"clients": 100, "rate": 0.0, "saturated": True, "batch": 16},
}
COLUMNS = (
    ("sent_per_s", "sent/s", "{:,.0f}"),
    ("rate", "in Kafka/s", "{:,.0f}"),
    ("cpu_share", "CPU", "{:.0%}"),
    ("cpu_us_per_message", "µs/msg", "{:.1f}"),
    ("wait_p50_ms", "wait p50 ms", "{:.0f}"),
    ("wait_p99_ms", "wait p99 ms", "{:.0f}"),
    ("p50_ms", "p50 ms", "{:.0f}"),
    ("p99_ms", "p99 ms", "{:.0f}"),
    ("lost", "lost", "{:,.0f}"),
    ("duplicated", "dup", "{:,.0f}"),
    ("out_of_order", "disorder", "{:,.0f}"),
    ("load_cpu_share", "load CPU", "{:.0%}"),
    ("handshake_cpu_us", "handshake µs", "{:.0f}"),
    ("rss_per_connection_bytes", "B/conn", "{:,.0f}"),
)


def measure(name: str, load: str, kafka: str, cores: Cores, options: argparse.Namespace, warmup_s: float) -> Any:
    """One run of one server under one load, or why there is none."""
    run = argparse.Namespace(**{**vars(options), **LOADS[load], "users": None})
    server: Server = gateway(kafka, cores, run) if name == GATEWAY else Baseline(name, kafka, cpus=cores.gateway)
    try:
        return run_once(server, cores, run, warmup_s)
    except (RuntimeError, OSError, ValueError) as error:  # it fell over under the load: that is a result too
        return f"{type(error).__name__}: {error}"


def show(load: str, found: dict[str, list[Any]]) -> None:
    """Medians with their spread, a row a server."""
    table = Table(title=f"{load}: median (min-max)")
    table.add_column("server")
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for name, runs in found.items():
        good = [run for run in runs if isinstance(run, dict)]
        if not good:
            table.add_row(name, *(str(run)[:60] for run in runs[:1]))
            continue
        cells = []
        for column, _, form in COLUMNS:
            values = [run[column] for run in good]
            spread = f"\n({form.format(min(values))}-{form.format(max(values))})" if len(values) > 1 else ""
            cells.append(form.format(statistics.median(values)) + spread)
        table.add_row(name + ("" if len(good) == len(runs) else f" ({len(runs) - len(good)} fell over)"), *cells)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main() -> None:
    """Measure all, interleaved; exit status 1 when the gateway lost, doubled or disordered a message."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [GATEWAY, *BASELINES]
    parser.add_argument("--servers", default=",".join(names), help=f"which, of {','.join(names)} (all)")
    parser.add_argument("--loads", default=",".join(LOADS), help=f"which, of {','.join(LOADS)} (all)")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of a run (10)")
    parser.add_argument("--warmup", type=float, default=4.0, help="seconds before it (4)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each server under each load (3)")
    parser.add_argument("--kafka", default="apache", help="apache (started from its jars), or HOST:PORT (apache)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    cores = Cores.of_machine()
    chosen = []
    for name in options.servers.split(","):
        try:
            if name != GATEWAY:
                BASELINES[name]()  # builds it
            chosen.append(name)
        except BaselineUnavailable as error:
            print(f"left out: {name}: {error}", file=sys.stderr, flush=True)
    found: dict[str, dict[str, list[Any]]] = {load: {name: [] for name in chosen} for load in options.loads.split(",")}
    try:
        with kafka_cluster(options.kafka, cores) as kafka:
            for load in ("saturated", "1000x50"):  # warms the broker's JVM: whoever comes first pays for that
                measure(GATEWAY, load, kafka, cores, options, options.warmup * COLD_BROKER)
            for number in range(options.repeat):
                for load, servers in found.items():
                    turn = number % len(chosen)
                    for name in (*chosen[turn:], *chosen[:turn]):  # nobody is always first
                        print(f"repeat {number + 1}: {load}: {name} ...", file=sys.stderr, flush=True)
                        servers[name].append(measure(name, load, kafka, cores, options, options.warmup))
    except KafkaUnavailable as error:
        sys.exit(f"bench.compare: {error}")
    if options.json:
        print(json.dumps({"options": vars(options), "cores": [cores.gateway, cores.rest], "runs": found}, indent=2))
    else:
        for load, servers in found.items():
            show(load, servers)
    ours = [run for servers in found.values() for run in servers.get(GATEWAY, [])]
    if any(not isinstance(run, dict) or run["lost"] or run["duplicated"] or run["out_of_order"] for run in ours):
        sys.exit(1)


if __name__ == "__main__":
    main()
