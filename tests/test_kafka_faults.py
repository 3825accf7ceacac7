"""What Kafka refuses, forgets, forbids and loses while the gateway runs: nobody else's messages pay for it."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclBinding, AclBindingFilter, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from confluent_kafka.cimpl import OFFSET_BEGINNING, NewTopic

from gateway.client import GatewayClient, open_client
from gateway.testing import kafka as apache
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient, frame
from gateway.testing.records import headers_of
from gateway.v1.envelope_pb2 import MessageEnvelope

pytestmark = pytest.mark.apache

StartDaemon = Callable[..., Daemon]

TICK_BYTES = 520
NARROW_BYTES = 20_000
"""Far more than one message, far less than a batch of them."""
FORGETS = {"drain.flush_timeout_s": 1, "drain.close_timeout_s": 1, "session.close_timeout_s": 1}
"""A drain that soon spools what Kafka does not take."""


class GuardedKafka(apache.ApacheKafka):
    """A broker with access control, which also creates whatever topic it is asked for.

    Its usual address is for the test, which may do everything; at ``gateway_address`` a login is wanted.
    """

    user, password = "gateway", "sesame"

    def __init__(self) -> None:
        (port,) = apache.free_ports(1)
        super().__init__(heap="512m")
        self.gateway_address = f"127.0.0.1:{port}"

    def format(self, cluster_id: str, properties: dict[str, str | int] | None = None) -> None:
        """Write server.properties with the second listener and the authorizer."""
        login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        clients = f"PLAINTEXT://{self.bootstrap_servers},SASL_PLAINTEXT://{self.gateway_address}"
        super().format(
            cluster_id,
            {
                "listeners": f"{clients},CONTROLLER://{self.voter}",
                "advertised.listeners": clients,
                "listener.security.protocol.map": (
                    "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT"
                ),
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.sasl_plaintext.plain.sasl.jaas.config": (f'{login} user_{self.user}="{self.password}";'),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
                "allow.everyone.if.no.acl.found": "true",
                "auto.create.topics.enable": "true",
                **(properties or {}),
            },
        )

    def settings(self, route: str, dead_letter: str) -> dict[str, Any]:
        """Settings of a daemon that logs in."""
        return {
            **routes(route, dead_letter),
            "kafka.properties": {
                "security.protocol": "SASL_PLAINTEXT",
                "sasl.mechanisms": "PLAIN",
                "sasl.username": self.user,
                "sasl.password": self.password,
            },
        }

    def forbid(self, topic: str, operation: AclOperation) -> None:
        """Take an operation on a topic away from the gateway."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        for future in admin.create_acls([self._rule(AclBinding, topic, operation)]).values():
            future.result(timeout=30)

    def allow(self, topic: str, operation: AclOperation) -> None:
        """Give it back."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        for future in admin.delete_acls([self._rule(AclBindingFilter, topic, operation)]).values():
            future.result(timeout=30)

    def _rule(self, kind: Any, topic: str, operation: AclOperation) -> Any:
        return kind(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            f"User:{self.user}",
            "*",
            operation,
            AclPermissionType.DENY,
        )


class Kafkas:
    """One Kafka at a time, kept for the tests that follow and want the same: the machine holds no more."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._name = ""
        self._running: Any = None

    def close(self) -> None:
        """Stop what runs."""
        self._name = ""
        self._stack.close()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The Kafka of a name, made unless it is the one that runs."""
        if self._name != name:
            self.close()
            self._running = self._stack.enter_context(make())
            self._name = name
        return self._running


@pytest.fixture(scope="module")
def kafkas() -> Iterator[Kafkas]:
    missing = apache.why_not()
    if missing is not None:
        pytest.skip(f"Apache Kafka cannot be started here: {missing}")
    running = Kafkas()
    yield running
    running.close()


@pytest.fixture
def kafka(kafkas: Kafkas) -> apache.ApacheKafka:
    """A broker like most."""
    found: apache.ApacheKafka = kafkas.get("usual", lambda: apache.ApacheKafka(heap="512m"))
    return found


@pytest.fixture
def guarded(kafkas: Kafkas) -> GuardedKafka:
    found: GuardedKafka = kafkas.get("guarded", GuardedKafka)
    return found


@pytest.fixture
def hasty(kafkas: Kafkas) -> apache.ApacheKafka:
    """A broker that closes connections as soon as nobody uses them: nine minutes of silence in two seconds."""
    properties: dict[str, str | int] = {"connections.max.idle.ms": 2000}
    found: apache.ApacheKafka = kafkas.get("hasty", lambda: apache.ApacheKafka(heap="512m", properties=properties))
    return found


@pytest.fixture
def cluster(kafkas: Kafkas) -> Iterator[apache.ApacheCluster]:
    """Three brokers, all of them there again when the test ends."""
    found: apache.ApacheCluster = kafkas.get("cluster", lambda: apache.ApacheCluster(3))
    yield found
    for node in found.nodes:
        if node.process is None:
            node.start()


# What the tests send and look at


def routes(route: str, dead_letter: str) -> dict[str, Any]:
    return {"routes.topics": {"tick_data": route}, "routes.dead_letter": dead_letter}


def tick(user: str, number: int, size: int = TICK_BYTES, message_type: str = "tick_data") -> bytes:
    """A message of exactly ``size`` bytes that says its number."""
    message = MessageEnvelope(message_type=message_type, user_id=user, company_id="acme", timestamp=number + 1)
    message.payload = b"\x00"
    while (short := size - len(message.SerializeToString())) > 0:
        message.payload += bytes(short if short < 64 else short - 8)
    assert len(message.SerializeToString()) == size
    return message.SerializeToString()


def number_in(value: bytes | None) -> int:
    return MessageEnvelope.FromString(value or b"").timestamp - 1


def numbers(records: Iterable[Message]) -> dict[str, list[int]]:
    """The numbers in the records of each user, in the order of the topic."""
    found: dict[str, list[int]] = defaultdict(list)
    for record in records:
        found[(record.key() or b"").decode()].append(number_in(record.value()))
    return dict(found)


def once(found: list[int]) -> list[int]:
    """What was sent again because nobody knew whether it had arrived counts once."""
    return list(dict.fromkeys(found))


def send_burst(client: RawClient, messages: Iterable[bytes]) -> None:
    client.sock.sendall(b"".join(frame(0x2, message) for message in messages))


def until_acked(client: RawClient, count: int) -> None:
    """Everything sent so far has found its place."""
    client.sock.settimeout(40)
    while client.read_control("ack")["count"] < count:
        pass


def until(condition: Callable[[], bool], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def reasons(daemon: Daemon) -> list[str]:
    """Why the daemon is not ready; none when it is."""
    status, body = daemon.get("/health/ready")
    found: list[str] = json.loads(body)["reasons"]
    assert (status == 200) == (not found), body
    return found


def is_ready(daemon: Daemon) -> bool:
    return not reasons(daemon)


def says(daemon: Daemon, *words: str) -> bool:
    """One of the reasons for not being ready has all of these words."""
    return any(all(word in reason for word in words) for reason in reasons(daemon))


def until_says(daemon: Daemon, *words: str, timeout_s: float = 40.0) -> None:
    """Wait until one of the reasons has all of these words."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = reasons(daemon)
        if any(all(word in reason for word in words) for reason in found):
            return
        assert time.monotonic() < deadline, f"no {words} in {found}; the books: {daemon.books()}"
        time.sleep(0.05)


def read_all(bootstrap_servers: str, topic: str) -> list[Message]:
    """Everything in a topic, from its beginning to its present end."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "tests", "enable.auto.commit": False})
    try:
        partitions = consumer.list_topics(topic, timeout=15).topics[topic].partitions
        ends = {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=15) for number in partitions
        }
        left = {number for number, (low, high) in ends.items() if high > low}
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in left])
        found: list[Message] = []
        deadline = time.monotonic() + 40
        while left:
            assert time.monotonic() < deadline, f"{topic}: partitions {left} not read to their ends"
            for message in consumer.consume(1000, timeout=0.2):
                assert message.error() is None, message.error()
                found.append(message)
                number, offset = message.partition(), message.offset()
                assert number is not None
                assert offset is not None
                if offset + 1 >= ends[number][1]:
                    left.discard(number)
        return found
    finally:
        consumer.close()


def delete_topic(bootstrap_servers: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    for future in admin.delete_topics([topic]).values():
        future.result(timeout=30)
    until(lambda: topic not in all_topics(bootstrap_servers), f"{topic} is gone")


def all_topics(bootstrap_servers: str) -> set[str]:
    return set(AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=10).topics)


def place_topic(bootstrap_servers: str, topic: str, replicas: list[list[int]], **config: str) -> None:
    """Create a topic whose partitions have their replicas where the test wants them."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    named = {name.replace("_", "."): value for name, value in config.items()}
    new = NewTopic(topic, num_partitions=len(replicas), replica_assignment=replicas, config=named)
    for future in admin.create_topics([new]).values():
        future.result(timeout=30)
    apache.create_topics(bootstrap_servers, [topic])  # exists: waits for its leaders


def assert_balanced(daemon: Daemon, **expected: int) -> None:
    books = daemon.settled_books(30)
    wanted = dict.fromkeys(("delivered", "dead_lettered", "dropped", "spooled", "in_flight", "imbalance"), 0) | expected
    assert {name: books[name] for name in wanted} == wanted


def spooled(
    start_daemon: StartDaemon, bootstrap_servers: str, messages: dict[str, list[bytes]], **settings: Any
) -> Daemon:
    """A daemon that has ended with these messages of each user in its spool, and starts with this Kafka next.

    The Kafka it had was another one, without the topics' limits: none of the messages has ever reached this one.
    """
    settings = {**FORGETS, **{name.replace("__", "."): value for name, value in settings.items()}}
    own = {name: value for name, value in settings.items() if name.startswith("routes.")}
    with Daemon(settings={"log.level": "warning", **own}) as other:
        daemon = start_daemon(other.kafka, settings=settings)
        with ExitStack() as stack:
            clients = {user: stack.enter_context(RawClient(daemon.url)) for user in messages}
            for user, client in clients.items():
                client.upgrade(daemon.token(user))
            other.signal(signal.SIGSTOP)
            try:
                for user, client in clients.items():
                    send_burst(client, messages[user])
                    client.ping()
                assert daemon.stop() == 0
            finally:
                other.signal(signal.SIGCONT)
    daemon.reconfigure(kafka__bootstrap_servers=bootstrap_servers)
    return daemon


def spool_is_empty(daemon: Daemon) -> bool:
    return not list((daemon.home / "spool").glob("*.spool"))


# Limits on sizes

UNCOMPRESSED = {"compression.type": "none", "linger.ms": 50}
"""Batches as large as they can get."""


def test_burst_larger_than_the_topics_limit_arrives_whole_and_in_order(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["narrow"], partitions=2, config={"max.message.bytes": str(NARROW_BYTES)})
    apache.create_topics(bootstrap, ["narrow-dead"], partitions=1)
    daemon = start_daemon(bootstrap, settings={**routes("narrow", "narrow-dead"), "kafka.properties": UNCOMPRESSED})
    users = ["ann", "bob", "cid"]
    with ExitStack() as stack:
        clients = {user: stack.enter_context(RawClient(daemon.url)) for user in users}
        for user, client in clients.items():
            client.upgrade(daemon.token(user), protocols="gateway.v1.json")
            send_burst(client, (tick(user, number) for number in range(2000)))
        for client in clients.values():
            until_acked(client, 2000)
    assert_balanced(daemon, received=6000, delivered=6000)
    found = numbers(read_all(bootstrap, "narrow"))
    assert {user: found[user] == list(range(2000)) for user in users} == dict.fromkeys(users, True)
    assert read_all(bootstrap, "narrow-dead") == []


def test_burst_of_dead_letters_larger_than_their_topics_limit_arrives_whole_and_in_order(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    """The README's promise: a dead-letter topic of ``listen.max_message_bytes`` is large enough."""
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["letters-dead"], partitions=1, config={"max.message.bytes": "70000"})
    apache.create_topics(bootstrap, ["letters"], partitions=1)
    daemon = start_daemon(bootstrap, settings={**routes("letters", "letters-dead"), "kafka.properties": UNCOMPRESSED})
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, (tick("ann", number, message_type="nonsense") for number in range(2000)))
        until_acked(client, 2000)
    assert_balanced(daemon, received=2000, dead_lettered=2000)
    assert numbers(read_all(bootstrap, "letters-dead")) == {"ann": list(range(2000))}


@pytest.mark.parametrize("message_type", ["tick_data", "nonsense"])
def test_limit_lowered_while_the_gateway_runs_costs_no_message_that_fits(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka, message_type: str
) -> None:
    """In order but for what librdkafka sends in the milliseconds before the gateway sees the failure (README)."""
    bootstrap = kafka.bootstrap_servers
    route, dead = f"lowered-{message_type}", f"lowered-{message_type}-dead"
    apache.create_topics(bootstrap, [route, dead], partitions=1)
    daemon = start_daemon(bootstrap, settings={**routes(route, dead), "kafka.properties": UNCOMPRESSED})
    good = message_type == "tick_data"
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        for burst in range(2):
            first = burst * 1000
            messages = (tick("ann", number, message_type=message_type) for number in range(first, first + 1000))
            send_burst(client, messages)
            until_acked(client, first + 1000)
            apache.alter_topic(bootstrap, route if good else dead, {"max.message.bytes": str(NARROW_BYTES)})
    assert_balanced(daemon, received=2000, **{"delivered" if good else "dead_lettered": 2000})
    found = numbers(read_all(bootstrap, route if good else dead))["ann"]
    assert found[:1000] == list(range(1000))
    assert sorted(found) == list(range(2000))


def test_message_that_does_not_fit_alone_is_the_only_dead_letter_of_its_burst(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["giant"], partitions=1, config={"max.message.bytes": str(NARROW_BYTES)})
    apache.create_topics(bootstrap, ["giant-dead"], partitions=1)
    daemon = start_daemon(bootstrap, settings={**routes("giant", "giant-dead"), "kafka.properties": UNCOMPRESSED})
    giants = {0, 250, 251, 499}
    sizes = {number: 30_000 if number in giants else TICK_BYTES for number in range(500)}
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, (tick("ann", number, size) for number, size in sizes.items()))
        until_acked(client, 500)
    assert_balanced(daemon, received=500, delivered=500 - len(giants), dead_lettered=len(giants))
    assert numbers(read_all(bootstrap, "giant")) == {"ann": sorted(sizes.keys() - giants)}
    letters = read_all(bootstrap, "giant-dead")
    assert numbers(letters) == {"ann": sorted(giants)}
    assert {headers_of(letter)["reason"] for letter in letters} == {"kafka_refused"}


def test_spool_larger_than_its_topics_limits_is_sent_whole_and_in_order(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    bootstrap = kafka.bootstrap_servers
    narrow = {"max.message.bytes": str(NARROW_BYTES)}
    apache.create_topics(bootstrap, ["kept", "kept-dead"], partitions=1, config=narrow)
    good = [tick("ann", number) for number in range(500)]
    bad = [tick("ann", number, message_type="nonsense") for number in range(500)]
    mixed = [message for pair in zip(good, bad, strict=True) for message in pair]
    daemon = spooled(
        start_daemon,
        bootstrap,
        {"ann": mixed},
        routes__topics={"tick_data": "kept"},
        routes__dead_letter="kept-dead",
        kafka__properties=UNCOMPRESSED,
    )
    daemon.start()
    until(lambda: spool_is_empty(daemon), "what Kafka has is deleted")
    assert_balanced(daemon, received=1000, delivered=500, dead_lettered=500)
    assert numbers(read_all(bootstrap, "kept")) == {"ann": list(range(500))}
    assert numbers(read_all(bootstrap, "kept-dead")) == {"ann": list(range(500))}


# Limits on timestamps

AGE_MS = 6000
"""The oldest record a strict topic takes: more than any step here takes, less than a test wants to wait."""


def wait_until_older(began: float) -> None:
    """What was received at ``began`` is too old for a strict topic now, whatever the next step takes."""
    until(lambda: time.time() - began > AGE_MS / 1000 + 0.5, "the clock goes on")


def test_record_too_old_for_its_topic_takes_no_neighbour_along(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    bootstrap = kafka.bootstrap_servers
    strict = {"message.timestamp.before.max.ms": str(AGE_MS)}
    apache.create_topics(bootstrap, ["aged"], partitions=1, config=strict)
    apache.create_topics(bootstrap, ["aged-dead"], partitions=1)
    daemon = spooled(
        start_daemon,
        bootstrap,
        {"old": [tick("old", number) for number in range(3)]},
        routes__topics={"tick_data": "aged"},
        routes__dead_letter="aged-dead",
        # so long that clients who come after the start are in time for the spool's batch
        kafka__properties={"linger.ms": 1500},
    )
    wait_until_older(time.time())
    daemon.start()
    with RawClient(daemon.url) as ann, RawClient(daemon.url) as bob:
        for user, client in (("ann", ann), ("bob", bob)):
            client.upgrade(daemon.token(user), protocols="gateway.v1.json")
            send_burst(client, (tick(user, number) for number in range(20)))
        until_acked(ann, 20)
        until_acked(bob, 20)
    assert_balanced(daemon, received=43, delivered=40, dead_lettered=3)
    assert numbers(read_all(bootstrap, "aged")) == {"ann": list(range(20)), "bob": list(range(20))}
    assert numbers(read_all(bootstrap, "aged-dead")) == {"old": [0, 1, 2]}


def test_only_what_an_outage_made_too_old_becomes_a_dead_letter(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    """The batches that wait for the broker hold records on both sides of the limit."""
    bootstrap = kafka.bootstrap_servers
    limit_ms = 2000
    apache.create_topics(bootstrap, ["waited"], partitions=1, config={"message.timestamp.before.max.ms": str(limit_ms)})
    apache.create_topics(bootstrap, ["waited-dead"], partitions=1)
    daemon = start_daemon(bootstrap, settings=routes("waited", "waited-dead"))
    assert kafka.process is not None
    count = 0
    with RawClient(daemon.url) as ann, RawClient(daemon.url) as bob:
        for user, client in (("ann", ann), ("bob", bob)):
            client.upgrade(daemon.token(user), protocols="gateway.v1.json")
            send_burst(client, [tick(user, 0)])
            until_acked(client, 1)
        kafka.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            while time.monotonic() - began < 2 * limit_ms / 1000:
                count += 1
                ann.send_binary(tick("ann", count))
                bob.send_binary(tick("bob", count))
                time.sleep(0.02)
        finally:
            kafka.process.send_signal(signal.SIGCONT)
        until_acked(ann, count + 1)
        until_acked(bob, count + 1)
    letters = read_all(bootstrap, "waited-dead")
    arrived, dead = numbers(read_all(bootstrap, "waited")), numbers(letters)
    assert_balanced(
        daemon,
        received=2 * (count + 1),
        delivered=sum(map(len, arrived.values())),
        dead_lettered=len(letters),
    )
    for user in ("ann", "bob"):
        assert arrived[user] == sorted(arrived[user])
        assert sorted(arrived[user] + dead.get(user, [])) == list(range(count + 1))
    ages_ms = [letter.timestamp()[1] - int(headers_of(letter)["received_at"]) for letter in letters]
    assert all(age_ms > limit_ms - 100 for age_ms in ages_ms), "the young ones were taken along"


def test_spool_too_old_for_every_topic_empties_into_dead_letters_of_the_present(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    bootstrap = kafka.bootstrap_servers
    strict = {"message.timestamp.before.max.ms": str(AGE_MS)}
    apache.create_topics(bootstrap, ["strict", "strict-dead"], partitions=1, config=strict)
    before_ms = time.time() * 1000
    daemon = spooled(
        start_daemon,
        bootstrap,
        {
            "ann": [tick("ann", number) for number in range(30)],
            "bad": [tick("bad", number, message_type="nonsense") for number in range(30)],
        },
        routes__topics={"tick_data": "strict"},
        routes__dead_letter="strict-dead",
    )
    after_ms = time.time() * 1000
    wait_until_older(time.time())
    started_ms = time.time() * 1000
    daemon.start()
    until(lambda: spool_is_empty(daemon), "the spool is empty")
    assert is_ready(daemon)
    assert_balanced(daemon, received=60, dead_lettered=60)
    assert read_all(bootstrap, "strict") == []
    letters = read_all(bootstrap, "strict-dead")
    assert numbers(letters) == {"ann": list(range(30)), "bad": list(range(30))}
    for letter in letters:
        assert letter.timestamp()[1] >= started_ms - 1
        headers = headers_of(letter)
        assert before_ms - 1 <= int(headers["received_at"]) <= after_ms + 1
        assert headers["reason"] == ("kafka_refused" if letter.key() == b"ann" else "unknown_message_type")
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.books()["received"] == 0, "nothing is sent again at the start that follows"


# Topics that are not there


async def feed(client: GatewayClient, stop: trio.Event) -> int:
    """Send numbered ticks until told to stop; returns how many."""
    count = 0
    while not stop.is_set():
        await client.send("tick_data", bytes(100), timestamp_ms=count + 1)
        count += 1
        await trio.sleep(0.01)
    return count


async def acked_more(client: GatewayClient, messages: int) -> None:
    """Wait until the client has been acked for ``messages`` more."""
    acked = client.acked
    while client.acked < acked + messages:
        await trio.sleep(0.02)


async def under_load(daemon: Daemon, user: str, fault: Callable[[GatewayClient], Awaitable[None]]) -> int:
    """Send ticks before, while and after ``fault`` runs, until all are acked; how many there were."""
    stop = trio.Event()
    with trio.fail_after(150):
        async with open_client(daemon.url, daemon.token(user)) as client:

            async def go_through_it() -> None:
                await acked_more(client, 50)
                await fault(client)
                await acked_more(client, 50)
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_through_it)
                count = await feed(client, stop)
            await client.flush()
            assert client.rejected == 0, "became dead letters"
            assert client.reconnects == 0
    return count


async def lose_the_topic_under_load(daemon: Daemon, bootstrap_servers: str, route: str, *, until_noticed: bool) -> None:
    """Delete the route's topic and make it again: whatever was not in the old one arrives in the new one, in order."""
    acked = 0

    async def lose_it(client: GatewayClient) -> None:
        nonlocal acked
        await trio.to_thread.run_sync(delete_topic, bootstrap_servers, route)
        if until_noticed:
            await trio.to_thread.run_sync(until_says, daemon, "topics_missing", route)
            await trio.sleep(3)  # nothing may happen to what waits: a real wait, since absence cannot be awaited
            assert says(daemon, "topics_missing", route)
            assert route not in await trio.to_thread.run_sync(all_topics, bootstrap_servers), "asking made it"
            acked = client.acked
        await trio.to_thread.run_sync(partial(apache.create_topics, bootstrap_servers, [route], partitions=1))
        await trio.to_thread.run_sync(until, lambda: is_ready(daemon), "ready again")
        if not until_noticed:
            await trio.sleep(1)  # several ack intervals: what went to the old topic has been acked
            acked = client.acked

    count = await under_load(daemon, "ann", lose_it)
    found = once(numbers(read_all(bootstrap_servers, route))["ann"])
    assert found[0] <= acked
    assert found == list(range(found[0], count))
    assert_balanced(daemon, received=count, delivered=count)


@pytest.mark.parametrize("until_noticed", [True, False])
async def test_topic_deleted_under_load_is_waited_for_and_no_tick_becomes_a_dead_letter(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka, until_noticed: bool
) -> None:
    bootstrap = kafka.bootstrap_servers
    route, dead = f"lost-{until_noticed}", f"lost-{until_noticed}-dead"
    apache.create_topics(bootstrap, [route, dead], partitions=1)
    daemon = start_daemon(bootstrap, settings=routes(route, dead))
    await lose_the_topic_under_load(daemon, bootstrap, route, until_noticed=until_noticed)
    assert read_all(bootstrap, dead) == []


def test_topics_that_are_away_for_longer_than_the_producer_waits_for_them_get_everything(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    """librdkafka fails records for a topic that has been unknown for thirty seconds; so it does dead letters."""
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["away", "away-dead"], partitions=1)
    daemon = start_daemon(bootstrap, settings={**routes("away", "away-dead"), "session.idle_timeout_s": 300})
    kinds = ("tick_data", "nonsense")
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, (tick("ann", number, message_type=kinds[number % 2]) for number in range(20)))
        until_acked(client, 20)
        delete_topic(bootstrap, "away-dead")
        send_burst(client, (tick("ann", number, message_type=kinds[number % 2]) for number in range(20, 40)))
        until_says(daemon, "topics_missing", "away-dead")
        delete_topic(bootstrap, "away")
        send_burst(client, (tick("ann", number, message_type=kinds[number % 2]) for number in range(40, 60)))
        until_says(daemon, "topics_missing", "away", "away-dead")
        time.sleep(35)
        books = daemon.books()
        assert (books["dead_lettered"], books["dropped"], books["spooled"]) == (10, 0, 0)
        apache.create_topics(bootstrap, ["away", "away-dead"], partitions=1)
        until(lambda: is_ready(daemon), "ready again")
        until_acked(client, 60)
    assert_balanced(daemon, received=60, delivered=30, dead_lettered=30)
    ticks = once(numbers(read_all(bootstrap, "away"))["ann"])
    assert ticks == list(range(ticks[0], 60, 2))
    assert ticks[0] <= 40, "what was sent before is in the topic that is gone"
    assert once(numbers(read_all(bootstrap, "away-dead"))["ann"]) == list(range(21, 60, 2))


def reloads(daemon: Daemon, outcome: str) -> int:
    (line,) = (
        line for line in daemon.get("/metrics")[1].splitlines() if f'reloads_total{{outcome="{outcome}"}}' in line
    )
    return int(float(line.rpartition(" ")[2]))


def failed_reload(daemon: Daemon) -> str:
    """The log's last line about a reload that failed."""
    lines = [line for line in daemon.log().splitlines() if "reload failed" in line]
    return lines[-1] if lines else ""


@pytest.mark.parametrize("what", ["a new type", "a type in use", "dead letters"])
def test_reload_with_a_topic_that_does_not_exist_is_refused_and_changes_nothing(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka, what: str
) -> None:
    bootstrap = kafka.bootstrap_servers
    name = what.replace(" ", "-")
    route, dead, absent = f"old-{name}", f"old-{name}-dead", f"absent-{name}"
    apache.create_topics(bootstrap, [route, dead], partitions=1)
    daemon = start_daemon(bootstrap, settings=routes(route, dead))
    topics = {"tick_data": absent if what == "a type in use" else route}
    if what == "a new type":
        topics["user_event"] = absent
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, [tick("ann", 0), tick("ann", 1, message_type="user_event")])
        until_acked(client, 2)
        daemon.reconfigure(routes__topics=topics, routes__dead_letter=absent if what == "dead letters" else dead)
        daemon.signal(signal.SIGHUP)
        ready: set[bool] = set()

        def refused() -> bool:
            ready.add(is_ready(daemon))
            return absent in failed_reload(daemon)

        until(refused, "the reload is refused", timeout_s=20)
        assert (reloads(daemon, "failed"), reloads(daemon, "ok")) == (1, 0)
        send_burst(client, [tick("ann", 2), tick("ann", 3, message_type="user_event")])
        until_acked(client, 4)
        ready.add(is_ready(daemon))
        assert ready == {True}
        assert numbers(read_all(bootstrap, route)) == {"ann": [0, 2]}
        assert numbers(read_all(bootstrap, dead)) == {"ann": [1, 3]}
        assert absent not in all_topics(bootstrap)

        apache.create_topics(bootstrap, [absent], partitions=1)
        daemon.signal(signal.SIGHUP)
        until(lambda: reloads(daemon, "ok") == 1, "reloaded once the topic is there")
        send_burst(client, [tick("ann", 4), tick("ann", 5, message_type="user_event")])
        until_acked(client, 6)
    assert numbers(read_all(bootstrap, absent))["ann"] in ([4], [5])
    dead_lettered = 2 if what == "a new type" else 3
    assert_balanced(daemon, received=6, delivered=6 - dead_lettered, dead_lettered=dead_lettered)


def test_topic_that_refuses_every_record_is_an_alarm(start_daemon: StartDaemon, kafka: apache.ApacheKafka) -> None:
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["closed"], partitions=1, config={"max.message.bytes": "200"})
    apache.create_topics(bootstrap, ["closed-dead"], partitions=1)
    settings = {**routes("closed", "closed-dead"), "kafka.properties": {"compression.type": "none"}}
    daemon = start_daemon(bootstrap, settings=settings)
    count = 0

    def alarmed_while_ticks_come() -> bool:
        nonlocal count
        client.send_binary(tick("ann", count))
        count += 1
        return says(daemon, "all_records_refused")

    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        until(alarmed_while_ticks_come, "the alarm", timeout_s=20)
        apache.alter_topic(bootstrap, "closed", {"max.message.bytes": "100000"})
        until(lambda: not alarmed_while_ticks_come() and is_ready(daemon), "the alarm ends with its cause")
        until_acked(client, count)
    books = daemon.settled_books()
    assert (books["delivered"] + books["dead_lettered"], books["imbalance"]) == (count, 0)


def test_topic_of_a_thousand_partitions_costs_the_event_loop_no_more_than_one_of_eight(
    start_daemon: StartDaemon, kafka: apache.ApacheKafka
) -> None:
    """Told by the CPU time of the event loop's thread, which other work on the machine does not change."""
    bootstrap = kafka.bootstrap_servers
    apache.create_topics(bootstrap, ["few", "few-dead"], partitions=8)
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    for future in admin.create_topics([NewTopic("many", num_partitions=1000, replication_factor=1)]).values():
        future.result(timeout=60)

    def known() -> bool:
        topic = admin.list_topics(timeout=10).topics.get("many")
        return topic is not None and len(topic.partitions) == 1000

    until(known, "the topic is known")
    few, many = (start_daemon(bootstrap, settings=routes(route, "few-dead")) for route in ("few", "many"))
    for daemon in (few, many):
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
            send_burst(client, [tick("ann", 0)])
            until_acked(client, 1)  # the partition has its leader, and the producer knows the whole topic

    def busy_ns(daemon: Daemon) -> int:
        return int(Path(f"/proc/{daemon.pid}/task/{daemon.pid}/schedstat").read_text().split()[0])

    found: list[tuple[float, float]] = []
    while not any(of_many <= 1.25 * of_few + 1 for of_few, of_many in found):
        assert len(found) < 6, f"milliseconds a second for 8 and for 1,000 partitions: {found}"
        before = busy_ns(few), busy_ns(many)
        seconds = 5.0
        time.sleep(seconds)
        after = busy_ns(few), busy_ns(many)
        of_few, of_many = ((now - then) / 1e6 / seconds for then, now in zip(before, after, strict=True))
        found.append((of_few, of_many))


# What the gateway may not do


def test_asking_for_a_topic_does_not_create_it(start_daemon: StartDaemon, guarded: GuardedKafka) -> None:
    bootstrap = guarded.bootstrap_servers
    daemon = start_daemon(
        guarded.gateway_address, settings=guarded.settings("unasked", "unasked-dead"), wait_ready=False
    )
    until_says(daemon, "topics_missing", "unasked", "unasked-dead")
    time.sleep(3)  # it asks again meanwhile: a real wait, since absence cannot be awaited
    assert not all_topics(bootstrap) & {"unasked", "unasked-dead"}
    apache.create_topics(bootstrap, ["unasked", "unasked-dead"], partitions=1)
    daemon.wait_ready()


async def test_topic_deleted_under_load_is_not_made_again_by_the_gateway(
    start_daemon: StartDaemon, guarded: GuardedKafka
) -> None:
    bootstrap = guarded.bootstrap_servers
    apache.create_topics(bootstrap, ["unmade", "unmade-dead"], partitions=1)
    daemon = start_daemon(guarded.gateway_address, settings=guarded.settings("unmade", "unmade-dead"))
    await lose_the_topic_under_load(daemon, bootstrap, "unmade", until_noticed=True)
    assert read_all(bootstrap, "unmade-dead") == []


@pytest.mark.parametrize("which", ["route", "dead letters"])
def test_topic_that_is_forbidden_at_the_start_is_called_so(
    start_daemon: StartDaemon, guarded: GuardedKafka, which: str
) -> None:
    bootstrap = guarded.bootstrap_servers
    route, dead = f"secret-{which[:1]}", f"secret-{which[:1]}-dead"
    apache.create_topics(bootstrap, [route, dead], partitions=1)
    forbidden = route if which == "route" else dead
    guarded.forbid(forbidden, AclOperation.ALL)
    daemon = start_daemon(guarded.gateway_address, settings=guarded.settings(route, dead), wait_ready=False)
    until_says(daemon, "not_authorised", forbidden)
    assert not says(daemon, "topics_missing")
    assert "create them" not in daemon.log()
    guarded.allow(forbidden, AclOperation.ALL)
    daemon.wait_ready()
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, [tick("ann", 0), tick("ann", 1, message_type="nonsense")])
        until_acked(client, 2)
    assert_balanced(daemon, received=2, delivered=1, dead_lettered=1)


@pytest.mark.parametrize("operation", [AclOperation.WRITE, AclOperation.ALL])
async def test_permission_taken_away_under_load_is_waited_for_and_no_tick_becomes_a_dead_letter(
    start_daemon: StartDaemon, guarded: GuardedKafka, operation: AclOperation
) -> None:
    bootstrap = guarded.bootstrap_servers
    route, dead = f"revoked-{operation.name}", f"revoked-{operation.name}-dead"
    apache.create_topics(bootstrap, [route, dead], partitions=1)
    daemon = start_daemon(guarded.gateway_address, settings=guarded.settings(route, dead))

    async def revoke(_: GatewayClient) -> None:
        await trio.to_thread.run_sync(guarded.forbid, route, operation)
        await trio.to_thread.run_sync(until_says, daemon, "not_authorised", route)
        await trio.sleep(3)  # nothing may happen to what waits: a real wait, since absence cannot be awaited
        assert says(daemon, "not_authorised", route)
        await trio.to_thread.run_sync(guarded.allow, route, operation)
        await trio.to_thread.run_sync(until, lambda: is_ready(daemon), "ready again")

    count = await under_load(daemon, "ann", revoke)
    assert_balanced(daemon, received=count, delivered=count)
    assert once(numbers(read_all(bootstrap, route))["ann"]) == list(range(count))
    assert read_all(bootstrap, dead) == []


def test_permission_to_write_dead_letters_taken_away_spools_none(
    start_daemon: StartDaemon, guarded: GuardedKafka
) -> None:
    bootstrap = guarded.bootstrap_servers
    apache.create_topics(bootstrap, ["letterbox", "letterbox-dead"], partitions=1)
    daemon = start_daemon(guarded.gateway_address, settings=guarded.settings("letterbox", "letterbox-dead"))
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, (tick("ann", number, message_type="nonsense") for number in range(10)))
        until_acked(client, 10)
        guarded.forbid("letterbox-dead", AclOperation.WRITE)
        send_burst(client, (tick("ann", number, message_type="nonsense") for number in range(10, 20)))
        until_says(daemon, "not_authorised", "letterbox-dead")
        guarded.allow("letterbox-dead", AclOperation.WRITE)
        until(lambda: is_ready(daemon), "ready again")
        until_acked(client, 20)
    assert_balanced(daemon, received=20, dead_lettered=20)
    assert once(numbers(read_all(bootstrap, "letterbox-dead"))["ann"]) == list(range(20))


def test_reload_with_a_topic_that_is_forbidden_is_refused(start_daemon: StartDaemon, guarded: GuardedKafka) -> None:
    bootstrap = guarded.bootstrap_servers
    apache.create_topics(bootstrap, ["open", "open-dead", "shut"], partitions=1)
    guarded.forbid("shut", AclOperation.ALL)
    daemon = start_daemon(guarded.gateway_address, settings=guarded.settings("open", "open-dead"))
    daemon.reconfigure(routes__topics={"tick_data": "shut"})
    daemon.signal(signal.SIGHUP)
    until(lambda: "shut" in failed_reload(daemon), "the reload is refused", timeout_s=20)
    assert is_ready(daemon)
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, [tick("ann", 0)])
        until_acked(client, 1)
    assert numbers(read_all(bootstrap, "open")) == {"ann": [0]}


# Brokers that go


def test_idle_connections_that_the_broker_closes_are_no_fault(
    start_daemon: StartDaemon, hasty: apache.ApacheKafka
) -> None:
    bootstrap = hasty.bootstrap_servers
    apache.create_topics(bootstrap, ["weekend", "weekend-dead"], partitions=1)
    daemon = start_daemon(bootstrap, settings=routes("weekend", "weekend-dead"))
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token("ann"), protocols="gateway.v1.json")
        send_burst(client, [tick("ann", 0)])
        until_acked(client, 1)
        found: list[list[str]] = []
        began = time.monotonic()
        while time.monotonic() - began < 10:
            found.append(reasons(daemon))
            time.sleep(0.02)
        send_burst(client, [tick("ann", 1)])
        until_acked(client, 2)
    assert [reason for reason in found if reason] == []
    assert "Kafka error" not in daemon.log()
    assert numbers(read_all(bootstrap, "weekend")) == {"ann": [0, 1]}


def node_with_few_duties(cluster: apache.ApacheCluster) -> int:
    """The id of a broker that is not the active controller: the cluster needs no election when it goes."""
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    controller = admin.list_topics(timeout=10).controller_id
    return next(number for number in (3, 2, 1) if number != controller)


def test_broker_lost_by_topics_that_need_both_replicas_is_an_alarm_and_clients_hear_of_it(
    start_daemon: StartDaemon, cluster: apache.ApacheCluster
) -> None:
    bootstrap = cluster.bootstrap_servers
    lost = node_with_few_duties(cluster)
    other = lost % 3 + 1
    for topic in ("paired", "paired-dead"):
        place_topic(bootstrap, topic, [[lost, other], [other, lost]], min_insync_replicas="2")
    daemon = start_daemon(bootstrap, settings=routes("paired", "paired-dead"))
    node = cluster.nodes[lost - 1]
    users = ["ann", "bob", "cid", "dan"]
    with ExitStack() as stack:
        clients = {user: stack.enter_context(RawClient(daemon.url)) for user in users}
        for user, client in clients.items():
            client.upgrade(daemon.token(user), protocols="gateway.v1.json")
            send_burst(client, (tick(user, number) for number in range(20)))
            until_acked(client, 20)
        node.kill()
        for user, client in clients.items():
            send_burst(client, (tick(user, number) for number in range(20, 40)))
        until_says(daemon, "kafka_", timeout_s=20)
        for client in clients.values():
            client.sock.settimeout(40)
            assert client.read_control("degraded")["reason"].startswith("kafka_")
        assert daemon.get("/health/live")[0] == 200
        assert not is_ready(daemon)
        node.start()
        for client in clients.values():
            acked, recovered = 0, False
            while acked < 40 or not recovered:
                message = client.read_control()
                acked = message.get("count", acked) if message["type"] == "ack" else acked
                recovered = recovered or message["type"] == "recovered"
    until(lambda: is_ready(daemon), "ready again")
    assert_balanced(daemon, received=160, delivered=160)
    assert numbers(read_all(bootstrap, "paired")) == {user: list(range(40)) for user in users}


@pytest.mark.parametrize("flooded", ["route", "dead letters"])
async def test_partition_without_a_leader_stops_only_its_own_users(
    start_daemon: StartDaemon, cluster: apache.ApacheCluster, flooded: str
) -> None:
    """The users of the dead partition flood; everybody else sends and is acked for as long as it lasts."""
    bootstrap = cluster.bootstrap_servers
    lost = node_with_few_duties(cluster)
    first, second = (number for number in (1, 2, 3) if number != lost)
    route, dead = f"parted-{flooded[:1]}", f"parted-{flooded[:1]}-dead"
    healthy = [[first], [second], [first]]
    place_topic(bootstrap, route, [[lost], *healthy] if flooded == "route" else [[first], *healthy])
    place_topic(bootstrap, dead, [[lost], *healthy] if flooded == "dead letters" else [[first], *healthy])
    queued = 2000
    daemon = start_daemon(
        bootstrap, settings={**routes(route, dead), "kafka.max_queued_messages": queued, "session.ack_interval_ms": 50}
    )
    node = cluster.nodes[lost - 1]
    topic, message_type = (route, "tick_data") if flooded == "route" else (dead, "nonsense")
    homes = await trio.to_thread.run_sync(homes_of_users, daemon, bootstrap, topic, message_type)
    stranded = homes[0][:2]
    fine = [homes[partition][0] for partition in (1, 2, 3)]
    each = 2 * queued

    with trio.fail_after(180):
        async with AsyncExitStack() as stack:
            clients = {
                user: await stack.enter_async_context(open_client(daemon.url, daemon.token(user)))
                for user in (*stranded, *fine)
            }
            for user in stranded:
                await clients[user].send(message_type, bytes(400), timestamp_ms=1)
                await clients[user].flush()
            await trio.to_thread.run_sync(node.kill)
            memory = daemon.rss_bytes()
            for user in stranded:
                for number in range(1, each):
                    await clients[user].send(message_type, bytes(400), timestamp_ms=number + 1)
            sent = dict.fromkeys(fine, 0)

            async def go_on(user: str) -> None:
                began = trio.current_time()
                while trio.current_time() < began + 10 or sent[user] < 20:
                    await clients[user].send("tick_data", bytes(400), timestamp_ms=sent[user] + 1)
                    sent[user] += 1
                    with trio.fail_after(20):
                        await clients[user].flush()

            async with trio.open_nursery() as nursery:
                for user in fine:
                    nursery.start_soon(go_on, user)
            assert all(clients[user].acked == 1 for user in stranded), "their partition has no leader"
            assert daemon.books()["in_flight"] <= 2 * queued
            assert daemon.rss_bytes() < memory + 64 * 1024 * 1024
            await trio.to_thread.run_sync(node.start)
            for client in clients.values():
                await client.flush()
    ticks = await trio.to_thread.run_sync(read_all, bootstrap, route)
    letters = await trio.to_thread.run_sync(read_all, bootstrap, dead)
    # the first of each user's told where its partition is
    found = {user: once(numbers([*ticks, *letters])[user]) for user in clients}
    assert found == {
        **{user: list(range(each)) for user in stranded},
        **{user: list(range(sent[user])) for user in fine},
    }
    assert daemon.settled_books(30)["imbalance"] == 0
    until(lambda: is_ready(daemon), "ready again")


def homes_of_users(daemon: Daemon, bootstrap_servers: str, topic: str, message_type: str) -> dict[int, list[str]]:
    """Users by the partition that their messages to a topic go to; each has sent number 0."""
    users = [f"user-{number}" for number in range(40)]
    for user in users:
        with RawClient(daemon.url) as client:
            client.upgrade(daemon.token(user), protocols="gateway.v1.json")
            send_burst(client, [tick(user, 0, message_type=message_type)])
            until_acked(client, 1)
    homes: dict[int, list[str]] = defaultdict(list)
    for record in read_all(bootstrap_servers, topic):
        partition = record.partition()
        assert partition is not None
        homes[partition].append((record.key() or b"").decode())
    return homes
