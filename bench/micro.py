"""What one message costs in the gateway's own code, step by step, without Kafka's share of a real run.

Each line is the median over repeats of nanoseconds a message (spread in brackets). Records are produced to a broker
that is not there, so `produce` is the queueing alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import statistics
import time
from collections.abc import Callable

import trio

from bench.load import envelope, frame
from gateway.core.books import Books
from gateway.core.credentials import TokenRules, VerifyKey, mint
from gateway.core.limits import TierLimits
from gateway.core.notices import JSON
from gateway.core.principal import Principal
from gateway.core.protection import Protection
from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES, Routes
from gateway.core.tenants import Tenants
from gateway.kafka.producer import KafkaProducer
from gateway.router.delivery import Delivery
from gateway.router.endpoint import Gatekeeper
from gateway.router.inspection import Inspection
from gateway.router.session import Session, SessionContext
from gateway.telemetry.logging import Log, RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.ws import request
from gateway.ws.connection import Connection
from gateway.ws.frames import Decoder
from gateway.ws.handler import ConnectionLimits
from gateway.ws.readiness import Readiness

LIMITS = ConnectionLimits(65_536, 20, 65_536, 8.0, 20.0, 40.0, 5.0)
SECRET = b"s" * 48
HEAD = (
    "GET /ws/mt5?account=5012345 HTTP/1.1\r\nHost: gateway.example:8001\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    f"Authorization: Bearer {'x' * 300}\r\nUser-Agent: MetaTrader 5\r\n\r\n"
).encode()

Step = Callable[[int], None]


def steps(message: bytes, batch: int) -> dict[str, Step]:
    """Every measured step by name; each takes how many messages to do."""
    wire = frame(message) * batch
    decoder = Decoder(LIMITS.max_message_bytes)
    rules = TokenRules((VerifyKey("HS256", SECRET),), "api-gateway")
    now = int(time.time())
    token = mint(
        algorithm="HS256",
        key=SECRET,
        user_id="alice",
        company_id="acme",
        issuer="api-gateway",
        issued_at=now,
        expires_at=now + 9999,
    )

    def decode(count: int) -> None:
        for _ in range(count // batch):
            decoder.receive(wire)

    def parse(count: int) -> None:
        for _ in range(count):
            read = MessageEnvelope.FromString(message)
            _ = (read.message_type, read.user_id, read.company_id, read.enable_tracing)

    def handshake(count: int) -> None:
        for _ in range(count):
            request.parse(HEAD[: request.head_end(HEAD)])

    def authenticate(count: int) -> None:
        for _ in range(count):
            rules.authenticate(token, now)

    return {
        f"frames: decode, {batch} a read": decode,
        "envelope: parse and read four fields": parse,
        "handshake: parse the request": handshake,
        "handshake: verify an HS256 token": authenticate,
    }


class Nowhere:
    """Where the session is kept."""

    def leave(self, session: Session, outcome: str) -> None:
        """Nobody counts."""

    def renewed(self, session: Session) -> None:
        """Never called."""


def session_steps(
    message: bytes, batch: int, producer: KafkaProducer, metrics: Metrics, subprotocol: str | None
) -> dict[str, Step]:
    """A session fed through a socket pair, its records queued in a real producer that has no broker."""
    quiet = RateLimited(lambda *_, **__: None, trio.current_time)
    routes = Routes(DEFAULT_ROUTES, DEFAULT_DEAD_LETTER_TOPIC)
    delivery = Delivery(producer, routes, Books(), metrics, gateway="bench", log_failed=quiet)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readiness = Readiness()
    principal = Principal("user-000001", "bench", "pro", 4e9)
    tenants = Tenants({"pro": TierLimits(messages_per_second=1e9)})
    tenants.learn_tier(principal)
    session = Session(
        SessionContext(
            readiness=readiness,
            delivery=delivery,
            inspection=Inspection(Metrics()),
            throttled=lambda *_: None,
            ack_interval_ms=200,
            reconnect_window_ms=0,
            tokens=Gatekeeper(TokenRules((), ""), allow_query_token=False),
            trip=lambda _: None,
            protection=Protection(),
            notify=lambda _: None,
            log_rejected=quiet,
            log_crash=quiet,
        ),
        Nowhere(),
        connection_id="bench-1",
        principal=principal,
        user=tenants.user(principal, 0.0),
        account="1",
        path="/",
        subprotocol=subprotocol,
    )
    connection = Connection(ours, readiness, LIMITS, session)
    session.opened(connection)
    wire = frame(message) * batch
    decoder = Decoder(LIMITS.max_message_bytes)

    def produce(count: int) -> None:
        lane = delivery.open_lane(session, "tick-data", "tick_data", acked=False)
        for _ in range(count):
            producer.produce(lane.topic, message, b"user-000001", -1, lane)
            lane.waiting.append(message)

    def route(count: int) -> None:
        for _ in range(count // batch):
            session.received(decoder.receive(wire))  # type: ignore[arg-type]  # messages only

    def feed(count: int) -> None:
        for _ in range(count // batch):
            theirs.send(wire)
            connection.feed()

    def pair(count: int) -> None:
        for _ in range(count // batch):
            theirs.send(wire)
            ours.recv(16_384)

    if subprotocol is not None:
        return {f"session that is acked: decode and route, {batch} a read": route}
    return {
        "producer: queue one record with its callback": produce,
        f"session: decode and route, {batch} a read": route,
        f"session: send, feed, {batch} a read": feed,
        f"the same without a session: send, recv, {batch} a read": pair,
    }


def queue_without_a_broker(metrics: Metrics, log: Log) -> KafkaProducer:
    """A producer that keeps whatever it is given."""
    properties = {"queue.buffering.max.messages": 10_000_000, "queue.buffering.max.kbytes": 2_000_000, "log_level": 0}
    return KafkaProducer("127.0.0.1:1", properties, metrics, log)


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Nanoseconds a message of every step, a value for each repeat; the first one, which warms up, does not count."""
    metrics = Metrics()
    log = Log(metrics, level="error")
    message, _ = envelope("user-000001", "bench", options.size)
    found: dict[str, list[float]] = {}
    for repeat in range(options.repeat + 1):
        for batch in (1, 16):
            producers = [queue_without_a_broker(metrics, log) for _ in range(2)]
            plain = session_steps(message, batch, producers[0], metrics, None)
            acked = session_steps(message, batch, producers[1], metrics, JSON)
            for name, step in {**steps(message, batch), **plain, **acked}.items():
                gc.collect()
                began = time.perf_counter_ns()
                step(options.count)
                if repeat:
                    found.setdefault(name, []).append((time.perf_counter_ns() - began) / options.count)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40_000, help="messages a repeat (40000)")
    parser.add_argument("--repeat", type=int, default=5, help="repeats (5)")
    parser.add_argument("--size", type=int, default=130, help="bytes of an envelope (130)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = trio.run(measure, options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, values in found.items():
        print(f"{name:56s} {statistics.median(values):8.0f}  [{min(values):.0f}-{max(values):.0f}]")


if __name__ == "__main__":
    main()
