"""Throughput, queue and ack delay through an outage of Kafka, second by second, with a plot.

A steady load of plain clients runs all the time, beside it a few clients that are acked (`gateway.client`,
trio-websocket) and measure how long each ack takes. The broker is killed (or suspended), stays away, and comes back
with its log; then everything is consumed and accounted for: 0 lost, 0 doubled, 0 out of order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench.ingest import COLD_BROKER, COMPANY, TOPIC, Cores, Helper
from bench.load import user_of
from gateway.client import connect
from gateway.testing.daemon import Daemon
from gateway.testing.figures import percentile
from gateway.testing.kafka import ApacheKafka, KafkaUnavailable, create_topics

SAMPLE_S = 0.2
PROBE_S = 0.05
"""Between the messages of one acked client."""
PROBES = 5
FULL_RATE = 0.95
"""Recovered is when this share of what is offered has been delivered over a second."""


@dataclass
class Timeline:
    """What was seen; times in seconds since the measurement began."""

    began: float = 0.0
    samples: list[dict[str, float]] = field(default_factory=list)
    ack_delays: list[tuple[float, float]] = field(default_factory=list)
    """(when the message was sent, ms until its ack)"""
    down_at: float = 0.0
    back_at: float = 0.0

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began


async def sample(daemon: Daemon, timeline: Timeline) -> None:
    """Read the books until cancelled."""
    while True:
        at = timeline.now()
        health = json.loads((await trio.to_thread.run_sync(daemon.get, "/health"))[1])
        messages = health["messages"]
        timeline.samples.append(
            {
                "at": at,
                "received": messages["received"],
                "delivered": messages["delivered"],
                "queue": health["kafka"]["queue_messages"],
                "imbalance": messages["imbalance"],
            }
        )
        await trio.sleep(max(0.0, SAMPLE_S - (timeline.now() - at)))


class Delays:
    """Notes for each message of one client how long its ack took."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.sent_at: list[float] = []
        self.acked = 0

    def take_ack(self, count: int) -> None:
        """The first ``count`` messages are settled."""
        now = time.monotonic()
        delays = [(at - self._timeline.began, (now - at) * 1000) for at in self.sent_at[self.acked : count]]
        self._timeline.ack_delays += delays
        self.acked = count

    def take_rejected(self, count: int) -> None:
        """None is."""

    def take_recovered(self) -> None:
        """It sends on anyway."""

    def take_throttle(self, dropped: int, retry_after_s: float) -> None:
        """None is."""

    def take_renewed(self, expires_at: float) -> None:
        """It offers no newer token."""

    def take_not_renewed(self, code: str) -> None:
        """See `take_renewed`."""


async def probe(daemon: Daemon, number: int, timeline: Timeline, stop: trio.Event) -> None:
    """One acked client."""
    delays = Delays(timeline)
    async with connect(daemon.url, daemon.token(f"probe-{number}", COMPANY)) as client:
        client.tell(delays)
        while not stop.is_set():
            delays.sent_at.append(time.monotonic())
            await client.send(client.envelope("user_event", b"probe", 0))
            await trio.sleep(PROBE_S)
        with trio.move_on_after(30):
            while delays.acked < len(delays.sent_at):  # noqa: ASYNC110  # its acks are no events
                await trio.sleep(0.05)


async def go_through_it(
    kafka: ApacheKafka, daemon: Daemon, sender: Helper, options: argparse.Namespace
) -> tuple[Timeline, dict[str, Any]]:
    """Load before, during and after the outage; the timeline and what the load said."""
    timeline = Timeline(began=time.monotonic())
    seconds = options.before + options.outage + options.after
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sample, daemon, timeline)
        async with trio.open_nursery() as probes:
            for number in range(PROBES):
                probes.start_soon(probe, daemon, number, timeline, stop)
            sender.order({"do": "paced", "rate": options.rate, "seconds": seconds})
            await trio.sleep(options.before)
            timeline.down_at = timeline.now()
            if options.fault == "kill":
                await trio.to_thread.run_sync(kafka.kill)
                await trio.sleep(options.outage)
                await trio.to_thread.run_sync(kafka.start)
            else:
                await trio.to_thread.run_sync(kafka.suspend, options.outage)
            timeline.back_at = timeline.now()
            measured = await trio.to_thread.run_sync(sender.answer)
            stop.set()
        nursery.cancel_scope.cancel()
    return timeline, measured


def rates(timeline: Timeline, name: str, window_s: float = 1.0) -> list[tuple[float, float]]:
    """(time, count a second over the second before) of a running count."""
    found = []
    first = 0
    for sample in timeline.samples:
        while sample["at"] - timeline.samples[first]["at"] > window_s:
            first += 1
        begin = timeline.samples[first]
        if sample is not begin:
            found.append((sample["at"], (sample[name] - begin[name]) / (sample["at"] - begin["at"])))
    return found


def judge(timeline: Timeline, offered: float) -> dict[str, Any]:
    """The figures: recovery, queue, ack delays before and after."""
    full = [at for at, rate in rates(timeline, "delivered") if at > timeline.back_at and rate >= offered * FULL_RATE]
    normal = [delay for at, delay in timeline.ack_delays if 1.0 < at < timeline.down_at - 1.0]
    inside = [delay for at, delay in timeline.ack_delays if timeline.down_at <= at <= timeline.back_at]
    return {
        "down_s": timeline.back_at - timeline.down_at,
        "recovered_after_s": full[0] - timeline.back_at if full else float("nan"),
        "peak_rate_after": max((rate for at, rate in rates(timeline, "delivered") if at > timeline.back_at), default=0),
        "peak_queue": max(sample["queue"] for sample in timeline.samples),
        "ack_p50_ms": percentile(normal, 0.50),
        "ack_p99_ms": percentile(normal, 0.99),
        "ack_max_in_outage_ms": max(inside, default=float("nan")),
        "imbalance": max(abs(sample["imbalance"]) for sample in timeline.samples),
    }


def plot(timeline: Timeline, path: Path, title: str) -> None:
    """Received and delivered a second, the queue, and the ack delay, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (rate_axes, queue_axes, ack_axes) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 9))
    for name in ("received", "delivered"):
        points = rates(timeline, name)
        rate_axes.plot([at for at, _ in points], [rate for _, rate in points], label=f"{name} a second")
    rate_axes.set_ylabel("messages a second")
    rate_axes.legend()
    queue_axes.plot([s["at"] for s in timeline.samples], [s["queue"] for s in timeline.samples], color="tab:red")
    queue_axes.set_ylabel("producer queue, messages")
    ack_axes.plot(*zip(*sorted(timeline.ack_delays), strict=True), ".", markersize=2, color="tab:green")
    ack_axes.set_ylabel("ack delay, ms")
    ack_axes.set_yscale("log")
    ack_axes.set_xlabel("seconds")
    for axes in (rate_axes, queue_axes, ack_axes):
        axes.axvspan(timeline.down_at, timeline.back_at, alpha=0.15, color="grey")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def run_once(options: argparse.Namespace, cores: Cores, kafka: ApacheKafka, warmup_s: float) -> dict[str, Any]:
    """One outage; figures and account."""
    with contextlib.ExitStack() as stack:
        settings = {"listen.max_connections": options.clients + 100, "log.level": "warning"}
        if options.ack_interval_ms:
            settings["session.ack_interval_ms"] = options.ack_interval_ms
        daemon = stack.enter_context(Daemon(kafka.bootstrap_servers, settings=settings, cpus=cores.gateway))
        consumer = Helper("consume", {"kafka": daemon.kafka, "topic": TOPIC, "size": options.size}, cores.rest)
        stack.callback(consumer.close)
        consumer.answer()
        clients = [
            (user_of(index, options.clients), daemon.token(user_of(index, options.clients), COMPANY))
            for index in range(options.clients)
        ]
        task = {"url": daemon.url, "company": COMPANY, "size": options.size, "batch": 1, "clients": clients}
        sender = Helper("send", task, cores.rest)
        stack.callback(sender.close)
        sender.answer()
        warm = sender.ask({"do": "paced", "rate": options.rate, "seconds": warmup_s})
        timeline, measured = trio.run(partial(go_through_it, kafka, daemon, sender, options))
        sent = warm["sent"] + measured["sent"]
        report = consumer.ask({"do": "report", "expected": sent, "timeout_s": 15.0})
        books = daemon.books()
        status = daemon.stop()
    offered = options.clients * options.rate + PROBES / PROBE_S
    if options.plot:
        title = f"{offered:,.0f} messages a second, Kafka away for {timeline.back_at - timeline.down_at:.1f} s"
        plot(timeline, options.plot, f"{title} ({options.fault})")
    return {
        **judge(timeline, offered),
        "sent": sent,
        "lost": sent - (report["total"] - report["duplicated"]),
        "duplicated": report["duplicated"],
        "out_of_order": report["missing_or_out_of_order"],
        "unacked": int(books["in_flight"]),
        "exit_status": status,
        "timeline": timeline.samples,
    }


def main() -> None:
    """Measure, plot, report; exit status 1 when a message was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.outage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200, help="plain clients (200)")
    parser.add_argument("--rate", type=float, default=50.0, help="messages a second of each (50)")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument(
        "--fault", choices=("kill", "suspend"), default="kill", help="what happens to the broker (kill)"
    )
    parser.add_argument("--before", type=float, default=15.0, help="seconds before the outage (15)")
    parser.add_argument(
        "--outage", type=float, default=10.0, help="seconds the broker is away, its start not counted (10)"
    )
    parser.add_argument("--after", type=float, default=25.0, help="seconds after it, its start included (25)")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds before all, three times that at first (5)")
    parser.add_argument("--repeat", type=int, default=1, help="outages, each with a fresh daemon (1)")
    parser.add_argument("--ack-interval-ms", type=int, help="session.ack_interval_ms (the default, 200)")
    parser.add_argument("--plot", type=Path, help="write a PNG here (needs the bench extra); of the last repeat")
    parser.add_argument("--json", action="store_true", help="print JSON, the timeline included")
    options = parser.parse_args()
    cores = Cores.of_machine()
    if cores.rest is not None:
        os.sched_setaffinity(0, {int(core) for core in cores.rest.split(",")})  # the acked clients run in this process
    runs = []
    try:
        with ApacheKafka(cpus=cores.rest) as kafka:
            create_topics(kafka.bootstrap_servers)
            for number in range(options.repeat):
                print(f"outage {number + 1} of {options.repeat} ...", file=sys.stderr, flush=True)
                runs.append(run_once(options, cores, kafka, options.warmup * (1 if number else COLD_BROKER)))
    except KafkaUnavailable as error:
        sys.exit(f"bench.outage: {error}")
    if options.json:
        shown = {**vars(options), "plot": str(options.plot)}
        print(json.dumps({"options": shown, "runs": runs}, indent=2))
    else:
        for name in runs[0]:
            if name != "timeline":
                values = [run[name] for run in runs]
                spread = f"  [{min(values):,.1f}-{max(values):,.1f}]" if len(values) > 1 else ""
                print(f"{name:24s} {statistics.median(values):12,.1f}{spread}")
    if any(run["lost"] or run["duplicated"] or run["out_of_order"] or run["imbalance"] for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
