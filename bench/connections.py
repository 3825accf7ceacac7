"""Idle authenticated connections: resident memory of each, CPU while idle with heartbeats, handshakes a second.

Memory is the growth of the daemon's resident set over the connections; the kernel's socket buffers are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.ingest import COMPANY, Cores, Helper
from bench.load import user_of
from gateway.testing import devkeys
from gateway.testing.daemon import Daemon

IDLE_S = 25.0


def run(connections: int, cores: Cores, *, tls: bool) -> dict[str, Any]:
    """Open, hold for `IDLE_S` (longer than a ping interval), count what is still there."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings: dict[str, Any] = {"listen.max_connections": connections + 100, "log.level": "warning"}
        ca = None
        if tls:
            ca, certificate, key = devkeys.write_certificate(home, "localhost", "127.0.0.1")
            settings |= {"tls.cert_file": str(certificate), "tls.key_file": str(key)}
        daemon = stack.enter_context(Daemon(settings=settings, cpus=cores.gateway))
        before, cpu = daemon.rss_bytes(), daemon.cpu_s()
        clients = [
            (user_of(index, connections), daemon.token(user_of(index, connections), COMPANY))
            for index in range(connections)
        ]
        task = {"url": daemon.url, "company": COMPANY, "size": 130, "batch": 1, "clients": clients}
        sender = Helper("send", {**task, "ca": str(ca) if ca else None}, cores.rest)
        stack.callback(sender.close)
        opened = sender.answer()
        handshake_cpu_us = (daemon.cpu_s() - cpu) / connections * 1e6
        cpu, began = daemon.cpu_s(), time.monotonic()
        held = sender.ask({"do": "idle", "seconds": IDLE_S})
        idle_cpu = (daemon.cpu_s() - cpu) / (time.monotonic() - began)
        return {
            "connections": connections,
            "tls": tls,
            "bytes_per_connection": (daemon.rss_bytes() - before) / connections,
            "handshakes_per_s": connections / opened["seconds"],
            "handshake_cpu_us": handshake_cpu_us,
            "idle_cpu_share": idle_cpu,
            "dropped": held["closed"],
        }


def main() -> None:
    """Measure plain and TLS; exit status 1 when a connection was dropped."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.connections", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=5000, help="connections (5000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    cores = Cores.of_machine()
    runs = [run(options.connections, cores, tls=tls) for tls in (False, True)]
    if options.json:
        print(json.dumps(runs, indent=2))
    else:
        for found in runs:
            print(
                f"{found['connections']:,} {'TLS' if found['tls'] else 'plain'}:"
                f" {found['bytes_per_connection']:,.0f} bytes each,"
                f" {found['handshakes_per_s']:,.0f} handshakes/s ({found['handshake_cpu_us']:.0f} µs CPU each),"
                f" idle CPU {found['idle_cpu_share']:.1%}, dropped {found['dropped']}"
            )
    if any(found["dropped"] for found in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
