"""Latency over load: percentiles at each rate, and a plot.

Two latencies of every message: the wait in the gateway (from the moment the client makes the message to the moment it
is handed to the producer, in whole milliseconds, the way through the client's socket included), and the whole way to
the Kafka consumer (which asks for fetches of 128 KiB or 20 ms).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ingest import COLD_BROKER, Cores, gateway, kafka_cluster, run_once
from gateway.testing.kafka import KafkaUnavailable


def show(runs: dict[int, list[dict[str, Any]]]) -> None:
    """A row a run: rate, CPU, percentiles."""
    table = Table(title="latency over load, ms")
    names = ["offered/s", "in Kafka/s", "CPU", "wait p50", "wait p99", "wait p99.9", "whole p50", "whole p99", "p99.9"]
    for name in (*names, "p99.99", "max", "lost"):
        table.add_column(name, justify="right")
    for offered, repeats in runs.items():
        for run in repeats:
            whole, wait = dict(run["percentiles_ms"]), dict(run["wait_percentiles_ms"])
            figures = (
                wait[0.5],
                wait[0.99],
                wait[0.999],
                whole[0.5],
                whole[0.99],
                whole[0.999],
                whole[0.9999],
                whole[1],
            )
            table.add_row(
                f"{offered:,}",
                f"{run['rate']:,.0f}",
                f"{run['cpu_share']:.0%}",
                *(f"{figure:.0f}" for figure in figures),
                str(run["lost"]),
            )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def plot(runs: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Percentiles over load, and the distribution at each load on HDR's axis (the nines)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (over_load, nines) = pyplot.subplots(1, 2, figsize=(13, 5))
    loads = sorted(runs)
    for kind, style in (("wait_percentiles_ms", "--"), ("percentiles_ms", "-")):
        for share, colour in ((0.5, "tab:blue"), (0.99, "tab:orange"), (0.999, "tab:red")):
            values = [max(1.0, min(dict(run[kind])[share] for run in runs[load])) for load in loads]
            label = f"{'wait in the gateway' if kind.startswith('wait') else 'to the consumer'} p{share * 100:g}"
            over_load.plot(loads, values, style, color=colour, marker="o", markersize=3, label=label)
    over_load.set_xlabel("messages a second")
    over_load.set_ylabel("ms")
    over_load.set_yscale("log")
    over_load.legend(fontsize=8)
    over_load.grid(alpha=0.3)
    for load in loads:
        points = [(share, value) for share, value in runs[load][-1]["percentiles_ms"] if share < 1]
        nines.plot([1 / (1 - share) for share, _ in points], [value for _, value in points], label=f"{load:,}/s")
    nines.set_xscale("log")
    nines.set_yscale("log")
    nines.set_xticks([1, 10, 100, 1000, 10000, 100000], ["0", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"])
    nines.set_xlabel("percentile")
    nines.set_ylabel("ms to the consumer")
    nines.legend(fontsize=8)
    nines.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure at every rate; exit status 1 when a message was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000, help="authenticated connections (1000)")
    parser.add_argument("--rates", default="1000,5000,10000,25000,50000", help="messages a second in all, by commas")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured time of a run (15)")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds before it, three times that at first (5)")
    parser.add_argument("--repeat", type=int, default=1, help="runs at each rate (1)")
    parser.add_argument("--kafka", default="apache", help="apache (started from its jars), embedded, or HOST:PORT")
    parser.add_argument("--plot", type=Path, help="write a PNG here (needs the bench extra)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    cores = Cores.of_machine()
    runs: dict[int, list[dict[str, Any]]] = {}
    warmup_s = options.warmup * COLD_BROKER
    try:
        with kafka_cluster(options.kafka, cores) as kafka:
            for offered in map(int, options.rates.split(",")):
                rate = {"rate": offered / options.clients, "saturated": False, "batch": 1, "users": None}
                run = argparse.Namespace(**{**vars(options), **rate})
                for _ in range(options.repeat):
                    print(f"{offered:,} a second ...", file=sys.stderr, flush=True)
                    runs.setdefault(offered, []).append(run_once(gateway(kafka, cores, run), cores, run, warmup_s))
                    warmup_s = options.warmup
    except KafkaUnavailable as error:
        sys.exit(f"bench.latency: {error}")
    if options.plot:
        plot(runs, options.plot)
    if options.json:
        print(json.dumps({"options": {**vars(options), "plot": str(options.plot)}, "runs": runs}, indent=2))
    else:
        show(runs)
    if any(run["lost"] or run["duplicated"] or run["out_of_order"] for repeats in runs.values() for run in repeats):
        sys.exit(1)


if __name__ == "__main__":
    main()
