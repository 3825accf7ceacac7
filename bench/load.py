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
import errno
import json
import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from confluent_kafka import Consumer, TopicPartition

from gateway.testing.figures import percentile
from gateway.testing.rawclient import frame as client_frame
from gateway.v1.envelope_pb2 import MessageEnvelope

STAMP: Final = struct.Struct("<QII")  # made at (ns), client, number
MARK: Final = b"\x00stamp-goes-here"
_EMPTY_PONG: Final = b"\x8a\x80\x00\x00\x00\x00"
SHARES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0)
WAIT_SAMPLE_MASK: Final = 7
"""One message in eight tells how long it waited before it was produced."""
TICK_S: Final = 0.001
"""How often due messages are sent; at 50,000 a second 50 at a time."""
SLOW_TICK_S: Final = 0.02
"""The same below `SLOW_PER_S` messages a second."""
SLOW_PER_S: Final = 1000


def envelope(user: str, company: str, size: int, message_type: str = "tick_data") -> tuple[bytes, int]:
    """A serialised envelope of about ``size`` bytes and where its stamp goes."""
    padding = 0
    while True:
        message = MessageEnvelope(
            message_type=message_type,
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
    return client_frame(0x2, payload, mask=bytes(4))


def user_of(client: int, users: int) -> str:
    """The user of a client: as many users as asked for, ids of one length."""
    return f"user-{client % users:06d}"


class _Attempt:
    """One handshake under way, non-blocking."""

    __slots__ = ("answer", "began", "index", "request", "sock")

    def __init__(self, address: tuple[str, int], source: str | None, request: bytes, index: int) -> None:
        self.index = index
        self.began = time.monotonic()
        self.request = request
        self.answer = b""
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if source is not None:
            # Ports are chosen when connecting, so that one address serves as many as it has ports for each target.
            self.sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            self.sock.bind((source, 0))
        self.sock.connect_ex(address)

    def step(self) -> bool | None:
        """Go on when the socket is ready: true when admitted, None while under way. Raises ConnectionError."""
        if self.request:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise ConnectionError(f"connect: {errno.errorcode.get(error, error)}")
            self.request = self.request[self.sock.send(self.request) :]
            return None
        data = self.sock.recv(4096)
        if not data:
            raise ConnectionError(self.answer.partition(b"\r\n")[0].decode() or "closed")
        self.answer += data
        if b"\r\n\r\n" not in self.answer:
            return None
        if not self.answer.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(self.answer.partition(b"\r\n")[0].decode())
        return True


IP_BIND_ADDRESS_NO_PORT: Final = 24  # ip(7); the socket module does not have it
SEND_BUFFER_BYTES: Final = 65_536
"""A client's socket buffer. Left to itself Linux lets it grow to 4 MiB: half a minute of a saturated load."""
ATTEMPT_TIMEOUT_S: Final = 30.0
RETRY_S: Final = 0.2


def upgrade_request(url: str, token: str) -> bytes:
    """The handshake a client sends."""
    parts = urlsplit(url)
    key = base64.b64encode(b"0123456789abcdef").decode()
    return (
        f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


@dataclass
class Opened:
    """What `open_all` found: sockets in the clients' order, seconds to each admission, refusals by what they said."""

    sockets: list[socket.socket]
    admitted_after_s: list[float]
    refusals: dict[str, int]


def open_all(url: str, tokens: list[str], *, at_once: int, source: str | None = None) -> Opened:
    """Connect and shake hands for every token, up to ``at_once`` at the same time; a refused one is tried again.

    Raises TimeoutError when one is not admitted for `ATTEMPT_TIMEOUT_S`.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    address = (parts.hostname, parts.port or 80)
    began = time.monotonic()
    sockets: list[socket.socket | None] = [None] * len(tokens)
    opened = Opened([], [0.0] * len(tokens), {})
    due = deque((began, index) for index in range(len(tokens)))
    under_way: dict[int, _Attempt] = {}
    epoll = select.epoll()
    admitted = 0
    while admitted < len(tokens):
        now = time.monotonic()
        if now - began > ATTEMPT_TIMEOUT_S + len(tokens) / 500:
            raise TimeoutError(f"{admitted} of {len(tokens)} admitted; refusals: {opened.refusals}")
        while due and len(under_way) < at_once and due[0][0] <= now:
            _, index = due.popleft()
            attempt = _Attempt(address, source, upgrade_request(url, tokens[index]), index)
            under_way[attempt.sock.fileno()] = attempt
            epoll.register(attempt.sock, select.EPOLLOUT)
        for fd, _ in epoll.poll(0.05, 1024):
            attempt = under_way[fd]
            try:
                done = attempt.step()
                if not attempt.request:
                    epoll.modify(fd, select.EPOLLIN)
            except BlockingIOError:
                continue
            except (ConnectionError, OSError) as error:
                said = str(error)
                opened.refusals[said] = opened.refusals.get(said, 0) + 1
                epoll.unregister(fd)
                del under_way[fd]
                attempt.sock.close()
                due.append((time.monotonic() + RETRY_S, attempt.index))
                continue
            if done:
                epoll.unregister(fd)
                del under_way[fd]
                sockets[attempt.index] = attempt.sock
                opened.admitted_after_s[attempt.index] = time.monotonic() - began
                admitted += 1
    epoll.close()
    opened.sockets = [sock for sock in sockets if sock is not None]
    return opened


def open_tls(url: str, token: str, tls: ssl.SSLContext) -> socket.socket:
    """Connect and shake hands over TLS, blocking; raises ConnectionError with the answer when it is not 101."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    plain = socket.create_connection((parts.hostname, parts.port or 443), timeout=30)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock = tls.wrap_socket(plain, server_hostname=parts.hostname)
    sock.sendall(upgrade_request(url, token))
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

    def __init__(self, sock: socket.socket, index: int, user: str, task: dict[str, Any]) -> None:
        batch = task["batch"]
        payload, at = envelope(user, task["company"], task["size"], task.get("message_type", "tick_data"))
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
        except OSError:  # the server has ended it: `Load` will notice and count it
            return
        if sent < len(data):
            self.waiting += data[sent:]

    def flush(self) -> None:
        """Send what waits."""
        try:
            del self.waiting[: self.sock.send(self.waiting)]
        except (BlockingIOError, ssl.SSLWantWriteError):
            return
        except OSError:
            self.waiting.clear()


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
        tick_s = TICK_S if writes_per_s >= SLOW_PER_S else SLOW_TICK_S
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
            self._serve(now + tick_s - time.monotonic())
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
    began = time.monotonic()
    tokens = [token for _, token in task["clients"]]
    if task.get("ca"):
        tls = ssl.create_default_context(cafile=task["ca"])
        opened = Opened([open_tls(task["url"], token, tls) for token in tokens], [], {})
    else:
        opened = open_all(task["url"], tokens, at_once=task.get("at_once", 64), source=task.get("source"))
    clients = [
        Client(sock, task.get("first_client", 0) + position, user, task)
        for position, (sock, (user, _)) in enumerate(zip(opened.sockets, task["clients"], strict=True))
    ]
    load = Load(clients)
    _tell(
        connected=len(clients),
        seconds=time.monotonic() - began,
        admitted_after_s=sorted(opened.admitted_after_s),
        refusals=opened.refusals,
    )
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
    """Consume a topic from its end; account for every message between ``mark`` and ``report`` orders.

    With ``afterwards`` nothing is consumed before the report is asked for: the consumer takes no core from the load.
    """
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
        if not task.get("afterwards"):
            account.take(consumer.consume(20_000, timeout=0.01))
        if poller.poll(0 if not task.get("afterwards") else None):
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
        self._waits_ms = array.array("q")
        self._wall_ms = (time.time_ns() - time.monotonic_ns()) // 1_000_000
        self._window = (0, 0)
        self._in_window = 0

    def mark(self, until_ns: int) -> None:
        """Measure what is made from now until ``until_ns`` (CLOCK_MONOTONIC)."""
        self._window = (time.monotonic_ns(), until_ns)
        self._latencies = array.array("q")
        self._waits_ms = array.array("q")
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
                if not number & WAIT_SAMPLE_MASK:
                    # CreateTime is when the server handed the record to its producer, in whole milliseconds.
                    self._waits_ms.append(message.timestamp()[1] - self._wall_ms - made // 1_000_000)
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
        waits = sorted(self._waits_ms)
        seconds = (self._window[1] - self._window[0]) / 1e9

        def delay_ms(share: float) -> float:
            return percentile(ordered, share) / 1e6

        return {
            "total": self.total,
            "duplicated": self.duplicated,
            "missing_or_out_of_order": self.out_of_order,
            "rate": self._in_window / seconds if seconds else 0.0,
            "p50_ms": delay_ms(0.50),
            "p99_ms": delay_ms(0.99),
            "p999_ms": delay_ms(0.999),
            "max_ms": delay_ms(1.0),
            "percentiles_ms": [[share, delay_ms(share)] for share in SHARES],
            "wait_percentiles_ms": [[share, percentile(waits, share)] for share in SHARES],
            "wait_p50_ms": percentile(waits, 0.50),
            "wait_p99_ms": percentile(waits, 0.99),
        }


if __name__ == "__main__":
    {"send": send_main, "consume": consume_main}[sys.argv[1]]()
