"""Apache Kafka on loopback, from its Maven Central jars: for tests, benches and trials.

``python -m gateway.testing.kafka`` starts one node in KRaft mode, creates the gateway's topics, prints its address and
runs until interrupted. It needs Java 17 and ``mvn``; the jars (about 45 MB) are kept in
``$XDG_CACHE_HOME/gateway/kafka-VERSION``.

`ApacheKafka` is the same for Python: a context manager that owns the process and its data directory.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.cimpl import NewTopic

from gateway.core.routes import DEFAULT_DEAD_LETTER_TOPIC, DEFAULT_ROUTES
from gateway.errors import GatewayError

# long: one broker, from its jars to its last partition

KAFKA_VERSION = "4.1.1"
SLF4J_VERSION = "1.7.36"
PARTITIONS = 8
START_TIMEOUT_S = 60.0

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>bench</groupId><artifactId>kafka</artifactId><version>1</version>
<dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>{SLF4J_VERSION}</version></dependency>
</dependencies></project>
"""


class KafkaUnavailable(GatewayError):
    """Apache Kafka cannot be started here; the message says what is missing."""


def why_not() -> str | None:
    """What is missing to run Apache Kafka here, None when nothing is."""
    if shutil.which("java") is None:
        return "Java 17 is not installed"
    if not _jars().is_dir() and shutil.which("mvn") is None:
        return "mvn is not installed, and the jars are not cached"
    return None


def _jars() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gateway" / f"kafka-{KAFKA_VERSION}"


def ensure_jars() -> Path:
    """The directory with Kafka's jars, downloaded by Maven the first time. Raises KafkaUnavailable."""
    reason = why_not()
    if reason is not None:
        raise KafkaUnavailable(reason)
    jars = _jars()
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():
            with tempfile.TemporaryDirectory(dir=jars.parent) as directory:
                (Path(directory) / "pom.xml").write_text(_POM)
                command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime"]
                done = subprocess.run(
                    [*command, "-DoutputDirectory=libs"],
                    cwd=directory,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise KafkaUnavailable(f"mvn could not fetch Kafka: {done.stdout[-800:]}")
                (Path(directory) / "libs").rename(jars)
    return jars


def free_ports(count: int) -> list[int]:
    """Ports on loopback that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class ApacheKafka:
    """A one-node Kafka of its own, from entering to leaving the context. Raises KafkaUnavailable."""

    def __init__(
        self,
        *,
        port: int | None = None,
        cpus: str | None = None,
        heap: str = "1g",
        properties: dict[str, str | int] | None = None,
    ) -> None:
        """``cpus`` pins the broker to those cores, as ``taskset -c`` takes them; ``properties`` are the broker's."""
        free = free_ports(2)
        self._port = port or free[0]
        self._controller_port = free[1]
        self._properties = properties or {}
        self._cpus = cpus
        self._heap = heap
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.bootstrap_servers = f"127.0.0.1:{self._port}"

    def __enter__(self) -> ApacheKafka:
        self.prepare()
        try:
            self.format(self.new_cluster_id())
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        if self._directory is not None:
            self._directory.cleanup()

    def prepare(self) -> None:
        """Find the jars and make the data directory. Raises KafkaUnavailable."""
        self._jars = ensure_jars()
        self._directory = tempfile.TemporaryDirectory(prefix="gateway-kafka-")

    def _java(self, *arguments: str) -> list[str]:
        pin = ["taskset", "-c", self._cpus] if self._cpus else []
        # One core is all the broker gets in a bench: a collector without threads of its own, few request threads.
        options = [
            f"-Xms{self._heap}",
            f"-Xmx{self._heap}",
            "-XX:+UseSerialGC",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        ]
        return [*pin, "java", *options, "-cp", f"{self._jars}/*", *arguments]

    @property
    def _home(self) -> Path:
        assert self._directory is not None
        return Path(self._directory.name)

    @property
    def voter(self) -> str:
        """This node's controller endpoint."""
        return f"127.0.0.1:{self._controller_port}"

    def new_cluster_id(self) -> str:
        """A random cluster id, as Kafka wants them."""
        tool = self._java("kafka.tools.StorageTool", "random-uuid")
        return subprocess.run(tool, capture_output=True, text=True, check=True).stdout.strip()

    def format(self, cluster_id: str, properties: dict[str, str | int] | None = None) -> None:
        """Write server.properties and format the data directory; ``properties`` go over the node's own."""
        settings: dict[str, object] = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self._port},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self._home / "data",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            "auto.create.topics.enable": "false",
            "num.network.threads": 1,
            "num.io.threads": 2,
            **self._properties,
            **(properties or {}),
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        (self._home / "server.properties").write_text("\n".join(lines) + "\n")
        tool = self._java("kafka.tools.StorageTool", "format", "-t", cluster_id)
        subprocess.run([*tool, "-c", str(self._home / "server.properties")], capture_output=True, check=True)

    def start(self) -> None:
        """Start the broker on its data directory and wait until it answers. Raises KafkaUnavailable."""
        self.spawn()
        self.wait()

    def spawn(self) -> None:
        """Start the broker's process."""
        with (self._home / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._home / "server.properties")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait until the broker answers. Raises KafkaUnavailable."""
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        while True:
            try:
                if admin.list_topics(timeout=2).brokers:
                    return
            except KafkaException:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self._home / "broker.log").read_text(errors="replace")[-1500:]
                raise KafkaUnavailable(f"the broker did not start:\n{tail}")

    def kill(self) -> None:
        """End the broker at once, as a crash would; its data directory stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def suspend(self, seconds: float) -> None:
        """Stop the broker's process with SIGSTOP for ``seconds``, then let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self.process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds the broker has used."""
        assert self.process is not None
        return cpu_seconds(self.process.pid)


class ApacheCluster:
    """Several nodes, each broker and controller, from entering to leaving the context. Raises KafkaUnavailable."""

    def __init__(self, nodes: int = 3, *, heap: str = "512m") -> None:
        self.nodes = [
            ApacheKafka(
                heap=heap,
                properties={
                    "node.id": number,
                    # a broker that has died is noticed as soon as Kafka allows
                    "broker.session.timeout.ms": 3000,
                    "broker.heartbeat.interval.ms": 500,
                    "replica.lag.time.max.ms": 5000,
                },
            )
            for number in range(1, nodes + 1)
        ]
        self.bootstrap_servers = ",".join(node.bootstrap_servers for node in self.nodes)

    def __enter__(self) -> ApacheCluster:
        voters = ",".join(f"{number}@{node.voter}" for number, node in enumerate(self.nodes, 1))
        try:
            cluster_id = ""
            for node in self.nodes:
                node.prepare()
                cluster_id = cluster_id or node.new_cluster_id()
                node.format(cluster_id, {"controller.quorum.voters": voters})
            for node in self.nodes:
                node.spawn()
            for node in self.nodes:
                node.wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.__exit__(None, None, None)


def cpu_seconds(pid: int) -> float:
    """CPU seconds, user and system, of a process with all its threads (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process (proc(5), statm)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def create_topics(
    bootstrap_servers: str,
    topics: list[str] | None = None,
    *,
    partitions: int = PARTITIONS,
    replicas: int = 1,
    config: dict[str, str] | None = None,
) -> None:
    """Create the gateway's default topics, or ``topics``, and wait for leaders; existing ones stay as they are."""
    names = topics or sorted({*DEFAULT_ROUTES.values(), DEFAULT_DEAD_LETTER_TOPIC})
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    existing = admin.list_topics(timeout=10).topics
    wanted = [
        NewTopic(name, num_partitions=partitions, replication_factor=replicas, config=config or {})
        for name in names
        if name not in existing
    ]
    for future in (admin.create_topics(wanted) if wanted else {}).values():
        future.result(timeout=30)
    deadline = time.monotonic() + 30
    while not all(_led(admin, name) for name in names):
        if time.monotonic() > deadline:
            raise KafkaUnavailable(f"no leaders for {', '.join(names)}")
        time.sleep(0.05)


def leader(bootstrap_servers: str, topic: str) -> int:
    """The id of the broker that leads the topic's first partition."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    deadline = time.monotonic() + 30
    while not _led(admin, topic):  # the broker that is asked may not have heard of it yet
        if time.monotonic() > deadline:
            raise KafkaUnavailable(f"no leader for {topic}")
        time.sleep(0.05)
    found: int = admin.list_topics(topic, timeout=10).topics[topic].partitions[0].leader
    return found


def alter_topic(bootstrap_servers: str, topic: str, config: dict[str, str]) -> None:
    """Change a topic's configuration and wait until the cluster has taken it."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    entries = [ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in config.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(timeout=30)


def _led(admin: AdminClient, topic: str) -> bool:
    """True when every partition of ``topic`` has a leader that answers for it."""
    partitions = admin.list_topics(topic, timeout=10).topics[topic].partitions.values()
    if not partitions or any(partition.leader < 0 for partition in partitions):
        return False
    ends = admin.list_offsets(
        {
            TopicPartition(topic, partition.id): OffsetSpec.latest()  # type: ignore[no-untyped-call]  # no annotations in confluent-kafka
            for partition in partitions
        }
    )
    try:
        return all(future.result(timeout=10) is not None for future in ends.values())
    except KafkaException:
        return False


def main() -> None:
    """Run a broker until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m gateway.testing.kafka", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=9092, help="client port (default 9092)")
    parser.add_argument("--cpus", help="pin the broker to these cores, e.g. 1")
    parser.add_argument("--partitions", type=int, default=PARTITIONS, help="partitions a topic (default 8)")
    arguments = parser.parse_args()
    try:
        with ApacheKafka(port=arguments.port, cpus=arguments.cpus) as kafka:
            create_topics(kafka.bootstrap_servers, partitions=arguments.partitions)
            print(
                f"Apache Kafka {KAFKA_VERSION} on {kafka.bootstrap_servers}, topics created; Ctrl-C ends it",
                flush=True,
            )
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            signal.pause()
    except KafkaUnavailable as error:
        sys.exit(f"gateway.testing.kafka: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
