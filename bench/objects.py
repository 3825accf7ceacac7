"""What one idle connection holds in Python's memory, line by line of what allocated it.

A gateway inside this process, plain connections from a thread beside it; tracemalloc compares before and after. Kernel
buffers, and what the allocator wastes between objects, are not in it: `bench.connections` measures the resident set.
"""

from __future__ import annotations

import argparse
import gc
import json
import secrets
import sys
import tempfile
import tracemalloc
from contextlib import closing
from pathlib import Path

import trio

from bench.ingest import COMPANY
from bench.load import open_all, user_of
from gateway import config
from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES
from gateway.daemon.announce import Addresses
from gateway.daemon.assemble import Daemon, assemble
from gateway.daemon.materials import read
from gateway.daemon.run import run
from gateway.kafka.embedded import EmbeddedKafka
from gateway.telemetry.logging import Log
from gateway.telemetry.metrics import Metrics
from gateway.testing.daemon import NO_LIMITS
from gateway.testing.devkeys import mint_with_secret

OURS = ("bench/", "tracemalloc")
SHOWN = 25
TOPICS = (*DEFAULT_ROUTES.values(), DEFAULT_DEAD_LETTER_TOPIC)


async def measure(connections: int) -> list[tuple[str, float, float]]:
    """(where, bytes a connection, blocks a connection), the largest first."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedKafka(TOPICS) as kafka:
        secret = secrets.token_urlsafe(48).encode()
        path = Path(directory) / "secret"
        path.write_bytes(secret)
        settings = config.load(
            None,
            {
                "auth.secret_file": str(path),
                "listen.port": 0,
                "sidecar.port": 0,
                "listen.max_connections": connections + 200,
                "listen.handshakes_per_address_per_s": 0,
                "listen.max_pending_per_address": 0,
                "kafka.bootstrap_servers": kafka.bootstrap_servers,
                "spool.directory": "",
                **NO_LIMITS,
            },
        )
        metrics = Metrics()
        users = [user_of(number, connections + 100) for number in range(connections + 100)]
        tokens = [
            mint_with_secret(settings.auth, secret, user_id=user, company_id=COMPANY, tier="pro", ttl_s=3600)
            for user in users
        ]
        with closing(Log(metrics, level="error")) as log:
            materials = read(settings, log)
            with assemble(settings, materials, metrics, log, embedded=True) as daemon:
                before, after = await snapshots(daemon, tokens)
    found = []
    for difference in after.compare_to(before, "lineno"):
        frame = difference.traceback[0]
        where = f"{frame.filename.partition('site-packages/')[2] or frame.filename}:{frame.lineno}"
        where = where.removeprefix(f"{Path(__file__).parent.parent}/")
        if difference.size_diff > connections and not where.startswith(OURS) and "tracemalloc" not in where:
            found.append((where, difference.size_diff / connections, difference.count_diff / connections))
    return found


async def snapshots(daemon: Daemon, tokens: list[str]) -> tuple[tracemalloc.Snapshot, tracemalloc.Snapshot]:
    """The memory of a running daemon before and after all but the first hundred clients have connected."""
    async with trio.open_nursery() as nursery:
        addresses: Addresses = await nursery.start(run, daemon, lambda: daemon.settings)
        await daemon.lifecycle.state.wait_value("ready")

        async def connect(some: list[str]) -> list[object]:
            opened = await trio.to_thread.run_sync(lambda: open_all(addresses.listen, some, at_once=32))
            await trio.sleep(0.5)
            gc.collect()
            return list(opened.sockets)

        kept = await connect(tokens[:100])  # whatever is made once is made by these
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        kept += await connect(tokens[100:])
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        nursery.cancel_scope.cancel()
    del kept
    return before, after


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.objects", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=2000, help="connections (2000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = trio.run(measure, options.connections)
    if options.json:
        json.dump([dict(zip(("where", "bytes", "blocks"), line, strict=True)) for line in found], sys.stdout, indent=2)
        return
    for where, size, blocks in found[:SHOWN]:
        print(f"{size:8.0f} B {blocks:6.2f} blocks  {where}")
    print(f"{sum(size for _, size, _ in found):8.0f} B in all")


if __name__ == "__main__":
    main()
