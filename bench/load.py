"""The load of the benches: many raw WebSocket clients in one process, and the consumer that checks what arrives.

Raw on purpose: frames are built once and patched, masked with a key of zeros (the server's work stays the same, the
client's does not count), sent with one system call. Each message carries its client, its number and the moment it was
made (CLOCK_MONOTONIC, shared by all processes), so the consumer can tell what was lost, doubled or out of order and how
long it took, waiting in the client included.

Runs as ``python -m bench.load send|consume``, told by one line of JSON on standard input; the benches start it.
"""

from __future__ import annotations

import array
import base64
import json
import select
import socket
import ssl
import struct
import sys
import time
from typing import Any, Final
from urllib.parse import urlsplit

from confluent_kafka import Consumer, TopicPartition

from gateway.v1.envelope_pb2 import MessageEnvelope

STAMP: Final = struct.Struct("<QII")  # made at (ns), client, number
MARK: Final = b"\x00stamp-goes-here"
_EMPTY_PONG: Final = b"\x8a\x80\x00\x00\x00\x00"
TICK_S: Final = 0.001
"""How often due messages are sent; at 50,000 a second 50 at a time."""


def envelope(user: str, company: str, size: int) -> tuple[bytes, int]:
    """A serialised envelope of about ``size`` bytes and where its stamp goes."""
    padding = 0
    while True:
        message = MessageEnvelope(
            message_type="tick_data",
            user_id=user,
            company_id=company,
            payload=MARK + bytes(padding),
            timestamp=1_700_000_000_000,
        ).SerializeToString()
        if len(message) >= size:
            return message, message.index(MARK)
        padding += size - len(message)


def frame(payload: bytes) -> bytes:
    """A masked binary client frame whose masking key is zero."""
    length = len(payload)
    if length < 126:
        head = bytes((0x82, 0x80 | length))
    elif length < 65536:
        head = struct.pack("!BBH", 0x82, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", 0x82, 0x80 | 127, length)
    return head + bytes(4) + payload


def user_of(client: int, users: int) -> str:
    """The user of a client: as many users as asked for, ids of one length."""
    return f"user-{client % users:06d}"


def open_client(url: str, token: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    """Connect and shake hands; raises ConnectionError with the answer when it is not 101."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    sock: socket.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        sock = tls.wrap_socket(sock, server_hostname=parts.hostname)
    key = base64.b64encode(b"0123456789abcdef").decode()
    sock.sendall(
        f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = sock.recv(4096)
        if not data:
            break
        answer += data
    if not answer.startswith(b"HTTP/1.1 101 "):
        raise ConnectionError(answer.partition(b"\r\n")[0].decode() or "closed")
    sock.setblocking(False)
    return sock


class Client:
    """One raw client: its socket, its patched frame, and what the socket has not taken yet."""

    __slots__ = ("buffer", "frame", "index", "number", "offsets", "sock", "waiting")

    def __init__(self, sock: socket.socket, index: int, user: str, company: str, size: int, batch: int) -> None:
        payload, at = envelope(user, company, size)
        one = frame(payload)
        first = len(one) - len(payload) + at
        self.sock = sock
        self.index = index
        self.number = 0
        self.frame = bytearray(one * batch)
        self.offsets = [first + len(one) * position for position in range(batch)]
        self.waiting = bytearray()

    def send(self, now: int) -> int:
        """Make the next messages at ``now`` (ns) and send them, or keep them behind those that wait; how many."""
        number = self.number
        for offset in self.offsets:
            STAMP.pack_into(self.frame, offset, now, self.index, number)
            number += 1
        self.number = number
        self.write(self.frame)
        return len(self.offsets)

    def write(self, data: bytes | bytearray) -> None:
        """Send, or keep behind what waits."""
        if self.waiting:
            self.waiting += data
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        if sent < len(data):
            self.waiting += data[sent:]

    def flush(self) -> None:
        """Send what waits."""
        try:
            del self.waiting[: self.sock.send(self.waiting)]
        except (BlockingIOError, ssl.SSLWantWriteError):
            return


class Load:
    """All clients of one process."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients = clients
        self._by_fd = {client.sock.fileno(): client for client in clients}
        self._epoll = select.epoll()
        for fd in self._by_fd:
            self._epoll.register(fd, select.EPOLLIN)
        self._blocked: set[Client] = set()
        self.closed = 0

    def _serve(self, timeout_s: float) -> None:
        """Answer pings; notice connections that the server ended."""
        for fd, _ in self._epoll.poll(max(0.0, timeout_s), 256):
            client = self._by_fd[fd]
            try:
                data = client.sock.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except OSError:
                data = b""
            if not data:
                self.closed += 1
                self._epoll.unregister(fd)
            elif data[0] == 0x89:
                client.write(_EMPTY_PONG)

    def paced(self, rate: float, seconds: float) -> int:
        """Send ``rate`` messages a second from each client, evenly spread; returns how many."""
        clients, count = self._clients, len(self._clients)
        batch = len(clients[0].offsets)
        writes_per_s = rate * count / batch
        start = time.monotonic()
        written = 0
        while (now := time.monotonic()) - start < seconds:
            due = int((now - start) * writes_per_s)
            now_ns = time.monotonic_ns()
            while written < due:
                client = clients[written % count]
                client.send(now_ns)
                if client.waiting:
                    self._blocked.add(client)
                written += 1
            self._flush_blocked()
            self._serve(now + TICK_S - time.monotonic())
        return written * batch

    def saturated(self, seconds: float) -> int:
        """Send as fast as the server takes it; returns how many."""
        start = time.monotonic()
        sent = 0
        while time.monotonic() - start < seconds:
            progress = 0
            for client in self._clients:
                if client.waiting:
                    client.flush()
                if not client.waiting:
                    progress += client.send(time.monotonic_ns())
            sent += progress
            self._serve(0.0 if progress else TICK_S)
        return sent

    def drain(self, timeout_s: float) -> bool:
        """Wait until every socket has taken what waits."""
        deadline = time.monotonic() + timeout_s
        self._blocked.update(client for client in self._clients if client.waiting)
        while self._blocked and time.monotonic() < deadline:
            self._flush_blocked()
            self._serve(TICK_S)
        return not self._blocked

    def waiting_bytes(self) -> int:
        """Bytes that sockets have not taken."""
        return sum(len(client.waiting) for client in self._clients)

    def _flush_blocked(self) -> None:
        for client in tuple(self._blocked):
            client.flush()
            if not client.waiting:
                self._blocked.discard(client)


def _tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _hear() -> dict[str, Any]:
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    message: dict[str, Any] = json.loads(line)
    return message


def send_main() -> None:
    """Connect, then obey: ``paced``, ``saturated``, ``idle``, until standard input ends."""
    task = _hear()
    tls = ssl.create_default_context(cafile=task["ca"]) if task.get("ca") else None
    began = time.monotonic()
    clients = [
        Client(
            open_client(task["url"], token, tls),
            task.get("first_client", 0) + position,
            user,
            task["company"],
            task["size"],
            task["batch"],
        )
        for position, (user, token) in enumerate(task["clients"])
    ]
    load = Load(clients)
    _tell(connected=len(clients), seconds=time.monotonic() - began)
    while True:
        order = _hear()
        cpu = time.process_time()
        began = time.monotonic()
        if order["do"] == "paced":
            sent = load.paced(order["rate"], order["seconds"])
        elif order["do"] == "saturated":
            sent = load.saturated(order["seconds"])
        else:
            load.paced(0.0, order["seconds"])
            sent = 0
        waiting = load.waiting_bytes()
        _tell(
            sent=sent,
            waiting_bytes=waiting,
            sent_per_s=sent / order["seconds"],
            drained=load.drain(30.0),
            closed=load.closed,
            cpu_share=(time.process_time() - cpu) / (time.monotonic() - began),
        )


def consume_main() -> None:
    """Consume a topic from its end; account for every message between ``mark`` and ``report`` orders."""
    task = _hear()
    consumer = Consumer(
        {
            "bootstrap.servers": task["kafka"],
            "group.id": "bench",
            "enable.auto.commit": False,
            # Fewer, larger fetches: broker and consumer share a core with the load; costs up to 20 ms of latency.
            "fetch.min.bytes": 131_072,
            "fetch.wait.max.ms": 20,
            "fetch.queue.backoff.ms": 1,
            "queued.min.messages": 200_000,
            "check.crcs": False,
            "log_level": 0,  # a broker that is away is the bench's own doing
        }
    )
    topic = task["topic"]
    partitions = [
        TopicPartition(topic, number) for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions
    ]
    for partition in partitions:
        partition.offset = consumer.get_watermark_offsets(partition, timeout=10)[1]
    consumer.assign(partitions)
    consumer.poll(1.0)
    _tell(assigned=len(partitions))
    account = Account(task["size"])
    cpu, began = 0.0, 0.0
    poller = select.poll()
    poller.register(sys.stdin.fileno(), select.POLLIN)
    while True:
        account.take(consumer.consume(20_000, timeout=0.01))
        if poller.poll(0):
            order = _hear()
            if order["do"] == "mark":
                account.mark(order["until"])
                cpu, began = time.process_time(), time.monotonic()
                _tell(marked=True)
            else:
                cpu_share = (time.process_time() - cpu) / (time.monotonic() - began)
                account.wait_for(consumer, order["expected"], order["timeout_s"])
                _tell(cpu_share=cpu_share, **account.report())


class Account:
    """What has been consumed: numbers by client, and the latencies since the mark."""

    def __init__(self, size: int) -> None:
        self._at = envelope("user-000000", "bench", size)[1]
        self._next: dict[int, int] = {}
        self.total = 0
        self.duplicated = 0
        self.out_of_order = 0
        self._latencies = array.array("q")
        self._window = (0, 0)
        self._in_window = 0

    def mark(self, until_ns: int) -> None:
        """Measure what is made from now until ``until_ns`` (CLOCK_MONOTONIC)."""
        self._window = (time.monotonic_ns(), until_ns)
        self._latencies = array.array("q")
        self._in_window = 0

    def take(self, messages: list[Any]) -> None:
        """Account for consumed messages."""
        now = time.monotonic_ns()
        unpack, at, following = STAMP.unpack_from, self._at, self._next
        begin, end = self._window
        for message in messages:
            if message.error() is not None:
                continue
            made, client, number = unpack(message.value(), at)
            expected = following.get(client, 0)
            if number == expected:
                following[client] = expected + 1
            elif number < expected:
                self.duplicated += 1
            else:
                self.out_of_order += number - expected
                following[client] = number + 1
            if made >= begin:
                self._latencies.append(now - made)
            if begin <= now < end:
                self._in_window += 1
        self.total += len(messages)

    def wait_for(self, consumer: Consumer, expected: int, timeout_s: float) -> None:
        """Consume until ``expected`` messages in all, or none for ``timeout_s`` seconds."""
        quiet_since = time.monotonic()
        while self.total - self.duplicated < expected and time.monotonic() - quiet_since < timeout_s:
            messages = consumer.consume(20_000, timeout=0.1)
            if messages:
                quiet_since = time.monotonic()
                self.take(messages)

    def report(self) -> dict[str, Any]:
        """Counts since the beginning, rate and percentiles (ms) since the mark."""
        ordered = sorted(self._latencies)
        seconds = (self._window[1] - self._window[0]) / 1e9

        def percentile(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6 if ordered else float("nan")

        return {
            "total": self.total,
            "duplicated": self.duplicated,
            "missing_or_out_of_order": self.out_of_order,
            "rate": self._in_window / seconds if seconds else 0.0,
            "p50_ms": percentile(0.50),
            "p99_ms": percentile(0.99),
            "p999_ms": percentile(0.999),
            "max_ms": percentile(1.0),
        }


if __name__ == "__main__":
    {"send": send_main, "consume": consume_main}[sys.argv[1]]()
