"""Throughput and latency from WebSocket to Kafka consumer: clients x rate against a real daemon.

The gateway with its Kafka threads is pinned to one core, load, consumer and Kafka to another, where the machine has
two. Every message is consumed and accounted for. Latency runs from the moment a client makes a message to the moment
the consumer has it, waiting in either included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from confluent_kafka import Consumer, TopicPartition
from rich.console import Console
from rich.table import Table

from bench.load import user_of
from gateway.testing.daemon import Daemon, Outcome
from gateway.testing.kafka import ApacheKafka, KafkaUnavailable, create_topics

TOPIC = "tick-data"
COMPANY = "bench"
COLD_BROKER = 3
"""How many warm-ups a broker that has just been started needs."""


class Helper:
    """A ``bench.load`` process: orders go in as lines of JSON, answers come back the same way."""

    def __init__(self, role: str, task: dict[str, Any], cpus: str | None) -> None:
        pin = ["taskset", "-c", cpus] if cpus else []
        self._process = subprocess.Popen(
            [*pin, sys.executable, "-m", "bench.load", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.order(task)

    def order(self, message: dict[str, Any]) -> None:
        """Send an order without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError when the helper has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a load process ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        self.order(message)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores the gateway has, and which everybody else; None where the machine has only one."""

    gateway: str | None
    rest: str | None

    @staticmethod
    def of_machine() -> Cores:
        """The first core for the gateway, the others for the rest."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            return Cores(None, None)
        return Cores(str(cores[0]), ",".join(map(str, cores[1:])))


@contextlib.contextmanager
def kafka_cluster(which: str, cores: Cores) -> Iterator[str]:
    """The bootstrap address for ``--kafka``: ``embedded``, ``apache`` (started here), or an address."""
    if which != "apache":
        yield which
        return
    with ApacheKafka(cpus=cores.rest) as kafka:
        create_topics(kafka.bootstrap_servers)
        yield kafka.bootstrap_servers


class Server(Protocol):
    """What is measured: a child process that serves WebSocket clients and produces to Kafka."""

    url: str
    kafka: str

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def token(self, user: str, company: str) -> str:
        """A token it accepts."""

    def cpu_s(self) -> float:
        """CPU seconds it has used."""

    def rss_bytes(self) -> int:
        """Its resident memory."""

    def finish(self) -> Outcome:
        """Stop it."""


class Ends:
    """How many records a topic holds."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "bench", "log_level": 0})
        found = self._consumer.list_topics(topic, timeout=10).topics[topic].partitions
        self._partitions = [TopicPartition(topic, number) for number in found]

    def total(self) -> int:
        """The sum of the partitions' end offsets."""
        return sum(self._consumer.get_watermark_offsets(one, timeout=10)[1] for one in self._partitions)

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


def gateway(kafka: str, cores: Cores, options: argparse.Namespace) -> Daemon:
    """The daemon under test, not yet started."""
    settings = {"listen.max_connections": options.clients + 100, "log.level": "warning"}
    return Daemon(kafka, settings=settings, cpus=cores.gateway)


Disturb = Callable[[Server], contextlib.AbstractContextManager[object]]
"""Something that goes on beside the measured load."""


def run_once(
    server: Server, cores: Cores, options: argparse.Namespace, warmup_s: float, disturb: Disturb | None = None
) -> dict[str, Any]:
    """One measurement: a fresh server, fresh clients, everything drained and accounted for.

    Rates are counted by the records that Kafka has. A saturated load is consumed afterwards, so that the consumer takes
    nothing from it.
    """
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(server)
        bootstrap = daemon.kafka
        afterwards = options.saturated or getattr(options, "consume_afterwards", False)
        task = {"kafka": bootstrap, "topic": TOPIC, "size": options.size, "afterwards": afterwards}
        consumer = Helper("consume", task, cores.rest)
        stack.callback(consumer.close)
        consumer.answer()
        ends = Ends(bootstrap, TOPIC)
        stack.callback(ends.close)
        hot = int(options.clients * getattr(options, "hot", 0.0))
        clients = [
            (user_of(0 if index < hot else index, options.users or options.clients), "")
            for index in range(options.clients)
        ]
        tokens = {user: daemon.token(user, COMPANY) for user, _ in clients}
        rss_before = daemon.rss_bytes()
        cpu_before = daemon.cpu_s()
        sender = Helper(
            "send",
            {
                "url": daemon.url,
                "company": COMPANY,
                "size": options.size,
                "batch": options.batch,
                "clients": [(user, tokens[user]) for user, _ in clients],
            },
            cores.rest,
        )
        stack.callback(sender.close)
        connected = sender.answer()
        handshake_cpu_us = (daemon.cpu_s() - cpu_before) / options.clients * 1e6
        time.sleep(1.0)  # let what the handshakes left behind be freed before memory is read
        rss_per_connection = (daemon.rss_bytes() - rss_before) / options.clients
        order = {"do": "saturated"} if options.saturated else {"do": "paced", "rate": options.rate}
        warm = sender.ask({**order, "seconds": warmup_s})
        if disturb is not None:
            stack.enter_context(disturb(daemon))
        until = time.monotonic_ns() + int(options.seconds * 1e9)
        consumer.ask({"do": "mark", "until": until})
        stored_before, cpu_before, began = ends.total(), daemon.cpu_s(), time.monotonic()
        sender.order({**order, "seconds": options.seconds})
        time.sleep(max(0.0, began + options.seconds - time.monotonic()))
        cpu, elapsed = daemon.cpu_s() - cpu_before, time.monotonic() - began
        rate = (ends.total() - stored_before) / (time.monotonic() - began)
        measured = sender.answer()
        sent = warm["sent"] + measured["sent"]
        report = consumer.ask({"do": "report", "expected": sent, "timeout_s": 10.0})
        outcome = daemon.finish()
    return {
        "sent": sent,
        "sent_per_s": measured["sent_per_s"],
        "delivered": report["total"] - report["duplicated"],
        "lost": sent - (report["total"] - report["duplicated"]),
        "duplicated": report["duplicated"],
        "out_of_order": report["missing_or_out_of_order"],
        "rate": rate,
        "cpu_share": cpu / elapsed,
        "cpu_us_per_message": cpu / elapsed / rate * 1e6 if rate else float("nan"),
        "p50_ms": report["p50_ms"],
        "p99_ms": report["p99_ms"],
        "p999_ms": report["p999_ms"],
        "max_ms": report["max_ms"],
        "wait_p50_ms": report["wait_p50_ms"],
        "wait_p99_ms": report["wait_p99_ms"],
        "percentiles_ms": report["percentiles_ms"],
        "wait_percentiles_ms": report["wait_percentiles_ms"],
        "unsent_bytes_at_end": measured["waiting_bytes"],
        "connections_closed": measured["closed"],
        "load_cpu_share": measured["cpu_share"],
        "consumer_cpu_share": report["cpu_share"],
        "handshakes_per_s": options.clients / connected["seconds"],
        "handshake_cpu_us": handshake_cpu_us,
        "rss_per_connection_bytes": rss_per_connection,
        "imbalance": outcome.imbalance,
        "exit_status": outcome.exit_status,
    }


_COLUMNS = (
    ("sent_per_s", "sent/s", "{:,.0f}"),
    ("rate", "got/s", "{:,.0f}"),
    ("cpu_share", "CPU of the core", "{:.0%}"),
    ("cpu_us_per_message", "CPU µs/msg", "{:.1f}"),
    ("wait_p50_ms", "wait p50 ms", "{:.0f}"),
    ("wait_p99_ms", "wait p99 ms", "{:.0f}"),
    ("p50_ms", "p50 ms", "{:.1f}"),
    ("p99_ms", "p99 ms", "{:.1f}"),
    ("p999_ms", "p99.9 ms", "{:.1f}"),
    ("lost", "lost", "{:,.0f}"),
    ("duplicated", "dup", "{:,.0f}"),
    ("out_of_order", "disorder", "{:,.0f}"),
    ("load_cpu_share", "load CPU", "{:.0%}"),
    ("consumer_cpu_share", "consumer CPU", "{:.0%}"),
    ("rss_per_connection_bytes", "B/conn", "{:,.0f}"),
)


def show(runs: list[dict[str, Any]], title: str) -> None:
    """A table of all runs with their median and spread."""
    table = Table(title=title)
    table.add_column("run")
    for _, heading, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for number, run in enumerate(runs, 1):
        table.add_row(str(number), *(form.format(run[name]) for name, _, form in _COLUMNS))
    if len(runs) > 1:
        columns = [[run[name] for run in runs] for name, _, _ in _COLUMNS]
        table.add_section()
        for label, function in (("median", statistics.median), ("min", min), ("max", max)):
            values = (form.format(function(column)) for column, (_, _, form) in zip(columns, _COLUMNS, strict=True))
            table.add_row(label, *values)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> None:
    """Measure, repeat, report; exit status 1 when a message was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ingest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=1000, help="authenticated connections (1000)")
    parser.add_argument("--users", type=int, help="distinct users, i.e. Kafka keys (as many as clients)")
    parser.add_argument("--rate", type=float, default=50.0, help="messages a second of each client (50)")
    parser.add_argument("--saturated", action="store_true", help="as fast as the gateway takes them, --rate is ignored")
    parser.add_argument("--batch", type=int, default=1, help="messages in one write of a client (1)")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of a run (20)")
    parser.add_argument(
        "--warmup", type=float, default=5.0, help="seconds before it, three times that in the first run (5)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs, each with a fresh daemon (1)")
    parser.add_argument(
        "--kafka", default="apache", help="apache (started from its jars), embedded, or HOST:PORT (apache)"
    )
    parser.add_argument(
        "--consume-afterwards",
        action="store_true",
        help="verify when the load has ended, as --saturated does: leaves the load its core, but p50 and p99 of the "
        "whole way say nothing then; the wait in the gateway does",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    cores = Cores.of_machine()
    runs = []
    try:
        with kafka_cluster(options.kafka, cores) as kafka:
            for number in range(options.repeat):
                print(f"run {number + 1} of {options.repeat} ...", file=sys.stderr, flush=True)
                # The first run also warms the broker's JVM, which takes the load's core while it compiles itself.
                warmup_s = options.warmup * (1 if number else COLD_BROKER)
                runs.append(run_once(gateway(kafka, cores, options), cores, options, warmup_s))
    except KafkaUnavailable as error:
        sys.exit(f"bench.ingest: {error}")
    if options.json:
        print(json.dumps({"options": vars(options), "cores": [cores.gateway, cores.rest], "runs": runs}, indent=2))
    else:
        how = "saturated" if options.saturated else f"x {options.rate:g}/s"
        show(
            runs,
            f"{options.clients:,} clients {how}, {options.size} bytes, {options.batch} a write, Kafka: {options.kafka}",
        )
    if any(run["lost"] or run["duplicated"] or run["out_of_order"] or run["imbalance"] for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
