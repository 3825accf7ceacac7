"""What stops or misleads a user at the start: environment, settings, Kafka properties, keys, certificates, reloads."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from tests.tokens import b64, claims, sign

DEADLINE_S = 60.0
BOM = b"\xef\xbb\xbf"
DEPLOY = Path(__file__).parent.parent / "deploy"
KUBERNETES = {
    "GATEWAY_SERVICE_HOST": "10.0.0.1",
    "GATEWAY_SERVICE_PORT": "8001",
    "GATEWAY_PORT": "tcp://10.0.0.1:8001",
    "GATEWAY_PORT_8001_TCP": "tcp://10.0.0.1:8001",
    "GATEWAY_PORT_8001_TCP_ADDR": "10.0.0.1",
    "GATEWAY_KAFKA_SERVICE_HOST": "10.0.0.2",
    "GATEWAY_KAFKA_PORT": "tcp://10.0.0.2:9092",
    "GATEWAY_KAFKA_PORT_9092_TCP_PORT": "9092",
}
"""What a container platform gives every process beside services named ``gateway`` and ``gateway-kafka``."""


def gateway(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A small configuration that is valid."""
    (tmp_path / "secret").write_text("s" * 40)
    path = tmp_path / "gateway.toml"
    path.write_text('[auth]\nsecret_file = "secret"\n[listen]\nport = 0\n[sidecar]\nport = 0\n')
    return path


def with_sections(toml: Path, text: str) -> Path:
    """The configuration with more sections."""
    toml.write_text(f"{toml.read_text()}{text}\n", encoding="utf-8")
    return toml


def said(done: subprocess.CompletedProcess[str], beginning: str = "gateway: ") -> list[str]:
    """The lines on standard error that begin like this."""
    return [line for line in done.stderr.splitlines() if line.startswith(beginning)]


def warnings(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The warning lines on standard error."""
    return said(done, "gateway: warning:")


def check_ok(done: subprocess.CompletedProcess[str]) -> None:
    """The command has found no fault."""
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr, done.stderr


def check_fault(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with exit status 1 and a readable line that holds all ``words``."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in said(done) if "warning" not in line]
    assert any(all(word in line for word in words) for line in lines), (words, done.stderr)


def wait_for(condition: Callable[[], bool], what: Callable[[], str], timeout_s: float = DEADLINE_S) -> None:
    """Wait until ``condition`` holds; ``what`` says what there is instead."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def reload(daemon: Daemon) -> dict[str, Any]:
    """SIGHUP; the log line that says that it has been taken, or why not."""

    def said() -> list[dict[str, Any]]:
        lines = [line for line in daemon.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in map(json.loads, lines) if line["event"].startswith(("reloaded", "reload failed"))]

    before = len(said())
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(said()) > before, daemon.log)
    return said()[-1]


def reloaded(daemon: Daemon) -> dict[str, Any]:
    """SIGHUP that is taken; its log line."""
    line = reload(daemon)
    assert line["event"] == "reloaded", line
    return line


class Changing:
    """A daemon that is given other settings by SIGHUP: quicker than a start for each."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        sections = tomllib.loads((daemon.home / "gateway.toml").read_text())
        self._settings = {f"{name}.{key}": value for name, table in sections.items() for key, value in table.items()}

    def faults(self, settings: dict[str, Any]) -> list[str]:
        """Why these settings over those of the start are refused; empty when they have been taken."""
        self.daemon.write_config({**self._settings, **settings})
        line = reload(self.daemon)
        return [] if line["event"] == "reloaded" else [str(fault) for fault in line["faults"]]

    def check_refused(self, settings: dict[str, Any], *words: str) -> None:
        """One fault holds all ``words``."""
        faults = self.faults(settings)
        assert any(all(word in fault for word in words) for fault in faults), (settings, faults)


@pytest.fixture(scope="module")
def changing() -> Iterator[Changing]:
    """A daemon whose settings each test here sets anew."""
    with Daemon() as daemon:
        yield Changing(daemon)


def status(daemon: Daemon, token: str | None = None, **headers: str) -> int:
    """The answer to a handshake."""
    with RawClient(daemon.url) as client:
        return client.request(client.headers(token or daemon.token(), **headers)).status


# The environment


def test_variables_of_a_container_platform_are_one_warning(toml: Path) -> None:
    done = gateway("check-config", str(toml), environment=KUBERNETES)
    check_ok(done)
    assert len(warnings(done)) == 1, done.stderr
    assert len(said(done)) == 1, done.stderr
    token = gateway("token", "--user", "alice", "--config", str(toml), environment=KUBERNETES)
    check_ok(token)
    assert token.stdout.count(".") == 2
    assert len(token.stdout.splitlines()) == 1, "a warning must not get into what a script reads"


def test_token_in_the_environment_is_no_matter_for_a_warning(toml: Path) -> None:
    done = gateway("check-config", str(toml), environment={"GATEWAY_TOKEN": "e30.e30.c2ln"})
    check_ok(done)
    assert done.stderr == ""
    assert "e30.e30" not in done.stdout


def test_daemon_starts_beside_the_variables_of_a_container_platform(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(environment={**KUBERNETES, "GATEWAY_TOKEN": "e30.e30.c2ln", "GATEWAY_LOG__LEVEL": "debug"})
    assert status(daemon) == 101
    assert sum("GATEWAY_" in line for line in daemon.log().splitlines()) <= 1, daemon.log()
    assert "GATEWAY_TOKEN" not in daemon.log()


def test_variables_that_look_like_settings_and_are_none_are_refused(toml: Path) -> None:
    names = ("GATEWAY_LISTEN__PROT", "GATEWAY_LSTEN__PORT", "GATEWAY_PORT__8001")
    done = gateway("check-config", str(toml), environment={**KUBERNETES, **dict.fromkeys(names, "1")})
    for name in names:
        check_fault(done, name)
    assert not any(f"{name}:" in line for line in said(done) for name in KUBERNETES if "warning" not in line), (
        done.stderr
    )


def test_variable_in_lower_case_counts_like_any_other(toml: Path) -> None:
    done = gateway("check-config", str(toml), environment={"gateway_listen__prot": "1"})
    check_fault(done, "is not a setting")
    assert "prot" in done.stderr


# Workers


class Served:
    """``gateway serve`` with a command line of the test's own."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self.process = process
        self._home = home

    def log(self) -> str:
        """Everything it has written."""
        return "".join((self._home / name).read_text(errors="replace") for name in ("stdout", "stderr"))

    def expect(self, what: str) -> str:
        """The rest of the line of standard output that holds ``what``."""
        wait_for(lambda: self.process.poll() is not None or f"{what}" in (self._home / "stdout").read_text(), self.log)
        lines = (self._home / "stdout").read_text().splitlines()
        found = [line.partition(what)[2].strip() for line in lines if what in line]
        assert found, self.log()
        return found[0]

    def health(self) -> dict[str, Any]:
        """The parent's ``/health``."""
        try:
            with urllib.request.urlopen(self.expect("sidecar on ") + "/health", timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        return found


@contextmanager
def served(home: Path, *arguments: str) -> Iterator[Served]:
    """Runs ``gateway serve`` until the context is left."""
    with (home / "stdout").open("wb") as stdout, (home / "stderr").open("wb") as stderr:
        command = [sys.executable, "-m", "gateway", "serve", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:
        yield Served(process, home)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()  # workers drain when their parent is gone
            process.wait()


def all_ready(health: dict[str, Any], log: str) -> bool:
    """Whether each worker is ready; fails the test when one had to be started again."""
    assert health["restarts"] == 0, log
    return len(health["workers"]) == 2 and all(worker.get("ready") for worker in health["workers"])


@pytest.mark.parametrize(
    ("sets", "changes", "kid"),
    [
        pytest.param(
            [
                'kafka.properties={"linger.ms"=1, "socket.keepalive.enable"=false, "client.id"="007"}',
                'routes.topics={"tick_data"="tick-data"}',
                'listen.allowed_origins=["https://desk.example"]',
            ],
            {},
            None,
            id="tables and lists",
        ),
        pytest.param(
            ['auth.secret_kid="20261101"', 'auth.issuer="true"', 'auth.audience="[1, \\"a = b\\"]"'],
            {"iss": "true", "aud": '[1, "a = b"]'},
            "20261101",
            id="text that reads like something else",
        ),
    ],
)
def test_workers_run_with_the_settings_that_the_parent_checked(
    toml: Path, tmp_path: Path, sets: list[str], changes: dict[str, str], kid: str | None
) -> None:
    flags = [flag for assignment in sets for flag in ("--set", assignment)]
    arguments = ["--workers", "2", "--embedded-kafka", "--config", str(toml), *flags]
    with served(tmp_path, *arguments) as daemon:
        daemon.expect("sidecar on ")
        wait_for(lambda: all_ready(daemon.health(), daemon.log()), daemon.log)
        token = sign(b"s" * 40, claims(**changes), {"alg": "HS256", **({"kid": kid} if kid else {})})
        for _ in range(8):  # the system spreads them over both
            with RawClient(daemon.expect("listening on ")) as client:
                client.upgrade(token)
        assert daemon.health()["restarts"] == 0


def test_worker_that_comes_back_runs_with_the_checked_settings_and_not_with_a_file_in_the_making(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon(workers=2)
    good = (daemon.home / "gateway.toml").read_text()
    (daemon.home / "gateway.toml").write_text("[listen\n")
    victim = json.loads(daemon.get("/health")[1])["workers"][0]["pid"]
    os.kill(victim, signal.SIGKILL)

    def back() -> bool:
        health = json.loads(daemon.get("/health")[1])
        assert health["restarts"] <= 1, daemon.log()
        return health["restarts"] == 1 and all(worker.get("ready") for worker in health["workers"])

    wait_for(back, daemon.log)
    (daemon.home / "gateway.toml").write_text(good)


# Kafka's properties

BREAKING: dict[str, str | int | bool] = {
    "transactional.id": "gw",
    "enable.gapless.guarantee": True,
    "metadata.broker.list": "127.0.0.1:1",
    "request.required.acks": 1,
    "retries": 3,
    "message.send.max.retries": 3,
    "test.mock.num.brokers": 1,
    "enabled_events": 1,
    "allow.auto.create.topics": True,
    "topic.blacklist": "tick-data",  # never produced to: librdkafka takes the topic for unknown
    "queuing.strategy": "lifo",
    "internal.termination.signal": 9,  # librdkafka ends its threads with it, and this one ends the process
    "ut_handle_ProduceResponse": "x",
    "message.timeout.ms": 1000,
    "delivery.report.only.error": True,
}
"""What would lose, double, reorder or never report messages, or make the topics or the broker up."""


def as_toml(properties: dict[str, str | int | bool]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in properties.items()) + "}"


@pytest.mark.parametrize("name", BREAKING)
def test_property_that_breaks_a_promise_is_refused_by_name(changing: Changing, name: str) -> None:
    changing.check_refused({"kafka.properties": {name: BREAKING[name]}}, "kafka.properties", name)


def test_all_properties_that_break_a_promise_are_named_at_once_by_the_daemon_too(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "value").write_text("1")
    in_files, others = list(BREAKING)[::2], list(BREAKING)[1::2]
    files = as_toml(dict.fromkeys(in_files, "value"))
    properties = as_toml({name: BREAKING[name] for name in others})
    with_sections(toml, f"[kafka]\nproperties = {properties}\nproperty_files = {files}")
    done = gateway("serve", "--config", str(toml), "--embedded-kafka")
    for name in BREAKING:
        check_fault(done, "kafka.propert", name)


@pytest.mark.parametrize("value", ["true", "t", "1", 1])
def test_automatic_topics_are_refused_however_they_are_written(changing: Changing, value: str | int) -> None:
    properties = {"allow.auto.create.topics": value}
    changing.check_refused({"kafka.properties": properties}, "kafka.properties", "allow.auto.create.topics")


def test_property_of_another_kind_is_one_line_and_no_traceback(toml: Path) -> None:
    with_sections(toml, '[kafka]\nproperties = { "default.topic.config" = "acks" }')
    check_fault(gateway("check-config", str(toml)), "kafka.properties")


def test_harmless_properties_are_taken(toml: Path) -> None:
    harmless: dict[str, str | int | bool] = {
        "linger.ms": 1,
        "compression.type": "zstd",
        "max.in.flight": 1,
        "message.max.bytes": 2_000_000,
        "client.id": "gw",
        "security.protocol": "ssl",
        "socket.timeout.ms": 10_000,
        "allow.auto.create.topics": False,
    }
    with_sections(toml, f"[kafka]\nproperties = {as_toml(harmless)}")
    check_ok(gateway("check-config", str(toml)))


# Origins and the path


def test_origins_are_compared_as_browsers_mean_them(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        settings={
            "listen.allowed_origins": [
                "https://slash.example/",
                "HTTPS://Upper.Example",
                "https://plain.example",
                "https://port.example:443",
                "http://old.example:80/",
                "https://other.example:8443",
                "http://[::1]:80",
            ]
        }
    )
    for origin, expected in {
        "https://slash.example": 101,
        "https://upper.example": 101,
        "https://plain.example": 101,
        "https://plain.example:443": 101,
        "https://port.example": 101,
        "http://old.example": 101,
        "https://other.example:8443": 101,
        "http://[::1]": 101,
        "http://slash.example": 403,
        "https://plain.example:80": 403,
        "http://plain.example:443": 403,
        "https://plain.example:8443": 403,
        "https://other.example": 403,
        "https://sub.plain.example": 403,
        "https://plain.example.evil.example": 403,
        "https://plain.example@evil.example": 403,
        "null": 403,
    }.items():
        assert status(daemon, Origin=origin) == expected, origin


def test_star_lets_every_origin_in_and_is_said_aloud(toml: Path, start_daemon: Callable[..., Daemon]) -> None:
    done = gateway("check-config", str(toml), "--set", 'listen.allowed_origins=["*"]')
    check_ok(done)
    assert any("allowed_origins" in line for line in warnings(done)), done.stderr
    daemon = start_daemon(settings={"listen.allowed_origins": ["https://desk.example", "*"]})
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://desk.example"):
        assert status(daemon, Origin=origin) == 101, origin

    def warned() -> bool:
        return any("allowed_origins" in line and '"level": "warning"' in line for line in daemon.log().splitlines())

    wait_for(warned, daemon.log, timeout_s=15)


UNSENT = (
    "https://*.example",
    "https://desk.example/app",
    "https://desk.example//",
    "https://desk.example?x=1",
    "https://desk.example#x",
    "https://user@desk.example",
    "https://desk.example:http",
    "https://desk.example:99999",
    "https://",
    "",
)


@pytest.mark.parametrize("origin", UNSENT)
def test_origin_that_no_browser_sends_is_refused(changing: Changing, origin: str) -> None:
    origins = ["https://desk.example", origin]
    changing.check_refused({"listen.allowed_origins": origins}, "listen.allowed_origins")


@pytest.mark.parametrize("path", ["/ws/mt5?x=1", "/ws/mt5#x", "/?", "/#"])
def test_path_that_no_request_has_is_refused(changing: Changing, path: str) -> None:
    changing.check_refused({"listen.path": path}, "listen.path")


def test_origin_and_path_that_never_match_are_refused_on_the_command_line(toml: Path) -> None:
    sets = ["--set", 'listen.allowed_origins=["https://*.example"]', "--set", "listen.path=/ws/mt5?x=1"]
    done = gateway("check-config", str(toml), *sets)
    check_fault(done, "listen.allowed_origins", "https://*.example")
    check_fault(done, "listen.path")


# Files as editors on Windows write them


def test_configuration_with_a_byte_order_mark_and_crlf_is_read(toml: Path) -> None:
    text = toml.read_bytes()
    toml.write_bytes(BOM + text.replace(b"\n", b"\r\n"))
    check_ok(gateway("check-config", str(toml)))
    toml.write_bytes(text.replace(b"\n", b"\r\n"))
    check_ok(gateway("check-config", str(toml)))
    toml.write_bytes(text + BOM)
    check_fault(gateway("check-config", str(toml)), str(toml), "not TOML")


@pytest.mark.parametrize("packed", [False, True])
def test_ticks_with_a_byte_order_mark_and_crlf_are_read(daemon: Daemon, tmp_path: Path, packed: bool) -> None:
    text = (
        BOM + b"time_msc,symbol,bid,ask,volume\r\n1700000000000,EURUSD,1.1,1.2,1\r\n1700000000001,EURUSD,1.1,1.2,0\r\n"
    )
    (tmp_path / "ticks.csv").write_bytes(gzip.compress(text) if packed else text)
    (tmp_path / "token").write_text(daemon.token())
    arguments = ["--url", daemon.url, "--token-file", str(tmp_path / "token"), "--rate", "0"]
    done = gateway("stream", str(tmp_path / "ticks.csv"), *arguments)
    check_ok(done)
    assert done.stdout.startswith("2 ticks in "), done


def test_token_file_with_a_byte_order_mark_is_read(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "ticks.csv").write_text("time_msc,symbol,bid,ask,volume\n1700000000000,EURUSD,1.1,1.2,1\n")
    (tmp_path / "token").write_bytes(BOM + daemon.token().encode() + b"\r\n")
    arguments = ["--url", daemon.url, "--token-file", str(tmp_path / "token"), "--rate", "0"]
    done = gateway("stream", str(tmp_path / "ticks.csv"), *arguments)
    check_ok(done)
    assert done.stdout.startswith("1 ticks in "), done


def test_key_set_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "jwks.json").write_bytes(BOM + json.dumps({"keys": [as_jwk("RS256", key, "good")]}).encode())
    (tmp_path / "gateway.toml").write_text('[auth]\nalgorithms = ["RS256"]\njwks_file = "jwks.json"\n')
    check_ok(gateway("check-config", str(tmp_path / "gateway.toml")))


# Secrets


def test_properties_are_masked_by_what_they_hold(toml: Path) -> None:
    secrets = {
        "sasl.oauthbearer.assertion.private.key.passphrase": "hush-1",
        "sasl.oauthbearer.assertion.private.key.pem": "hush-2",
        "sasl.oauthbearer.client.secret": "hush-3",
        "sasl.oauthbearer.client.credentials.client.secret": "hush-4",
        "sasl.password": "hush-5",
        "ssl.key.password": "hush-6",
        "ssl.keystore.password": "hush-7",
        "sasl.oauthbearer.token.endpoint.url": "https://user:hush-8@idp.example/token",
    }
    with_sections(toml, f"[kafka]\nproperties = {as_toml({**secrets, 'client.id': 'shown'})}")
    done = gateway("check-config", str(toml))
    check_ok(done)
    assert "hush" not in done.stdout + done.stderr, done.stdout
    assert '"client.id": "shown"' in done.stdout
    for name in secrets:
        assert f'"{name}"' in done.stdout, "that it is set is no secret"


def test_password_in_a_property_that_is_none_is_not_repeated_in_the_fault(toml: Path) -> None:
    with_sections(toml, '[kafka]\nproperties = { "https.proxies" = "http://u:hush@p", "sasl.pasword" = "hush" }')
    done = gateway("check-config", str(toml))
    check_fault(done, "kafka.properties")
    assert "hush" not in done.stdout + done.stderr, done


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def plain_password(listener: socket.socket) -> bytes:
    """Be a broker that asks for SASL PLAIN; the password that comes.

    Kafka's protocol: https://kafka.apache.org/protocol (ApiVersions, SaslHandshake, SaslAuthenticate).
    """
    while True:
        sock, _ = listener.accept()
        sock.settimeout(DEADLINE_S)
        with sock:
            try:
                while True:
                    request = read_exactly(sock, struct.unpack("!i", read_exactly(sock, 4))[0])
                    api, version, correlation = struct.unpack_from("!hhi", request)
                    if api == 18:  # ApiVersions, of which only version 0 is spoken here
                        apis = ((3, 0, 4), (17, 0, 1), (18, 0, 0), (36, 0, 0))
                        body = struct.pack("!hi", 35 if version else 0, len(apis))
                        body += b"".join(struct.pack("!hhh", *entry) for entry in apis)
                    elif api == 17:
                        body = struct.pack("!hih", 0, 1, 5) + b"PLAIN"
                    elif api == 36:
                        client_id_length = max(0, struct.unpack_from("!h", request, 8)[0])
                        return request[10 + client_id_length + 4 :].split(b"\x00")[2]
                    else:
                        raise AssertionError(f"request {api} before authentication")
                    sock.sendall(struct.pack("!ii", 4 + len(body), correlation) + body)
            except ConnectionError:
                continue


def sasl_settings(password_file: Path) -> dict[str, Any]:
    return {
        "kafka.properties": {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": "gateway",
        },
        "kafka.property_files": {"sasl.password": str(password_file)},
    }


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale whose encoding is not UTF-8, without Python's own guess that it should be."""


@pytest.mark.parametrize(
    ("content", "sent", "environment"),
    [
        pytest.param("pässwörd\n".encode(), "pässwörd".encode(), ASCII_LOCALE, id="another locale"),
        pytest.param(b"a\rb\r\nc \n\r\n", b"a\rb\r\nc \n", {}, id="line endings and white space"),
    ],
)
def test_password_reaches_the_broker_as_it_is_in_its_file(
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
    content: bytes,
    sent: bytes,
    environment: dict[str, str],
) -> None:
    (tmp_path / "password").write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        start_daemon(
            f"127.0.0.1:{listener.getsockname()[1]}",
            settings=sasl_settings(tmp_path / "password"),
            environment=environment,
            wait_ready=False,
        )
        assert plain_password(listener) == sent


@pytest.mark.parametrize("content", [b"p\xe4ssw\xf6rd after\n", b"before\x00after\n"], ids=["Latin-1", "NUL"])
def test_password_that_librdkafka_cannot_be_given_is_one_line(toml: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "password").write_bytes(content)
    with_sections(toml, '[kafka]\nproperty_files = { "sasl.password" = "password" }')
    done = gateway("check-config", str(toml))
    check_fault(done, "kafka.property_files", "sasl.password")
    assert len(said(done)) == 1, done.stderr
    assert "after" not in done.stderr


@pytest.mark.parametrize("asks_for_tokens", [False, True], ids=["broker", "token endpoint"])
def test_check_config_dials_nobody(toml: Path, asks_for_tokens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        properties: dict[str, str | int | bool] = {}
        if asks_for_tokens:
            properties = {
                "security.protocol": "SASL_PLAINTEXT",
                "sasl.mechanisms": "OAUTHBEARER",
                "sasl.oauthbearer.method": "oidc",
                "sasl.oauthbearer.client.id": "gateway",
                "sasl.oauthbearer.client.secret": "hush",
                "sasl.oauthbearer.token.endpoint.url": f"http://{address}/token",
            }
        broker = "127.0.0.1:1" if asks_for_tokens else address
        with_sections(toml, f'[kafka]\nbootstrap_servers = "{broker}"\nproperties = {as_toml(properties)}')
        check_ok(gateway("check-config", str(toml)))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # a connection would wait here, ended or not
            listener.accept()[0].close()


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b" \t\x0b" + b"r" * 40 + b"\x0c \x00 ", b" \t\x0b" + b"r" * 40 + b"\x0c \x00 "),
        (b"\n\n" + b"r" * 40, b"\n\n" + b"r" * 40),
        (b"r" * 40 + b" \n", b"r" * 40 + b" "),
        (b"r" * 40 + b"\r\n", b"r" * 40),
        (b"r" * 40 + b"\n\n", b"r" * 40 + b"\n"),
        (b"r" * 40 + b"\n", b"r" * 40),
        (b"r" * 40, b"r" * 40),
    ],
    ids=["white space around", "line feeds before", "blank, line feed", "CRLF", "two line feeds", "line feed", "bare"],
)
def test_secret_file_loses_one_line_ending_at_most(
    changing: Changing, tmp_path: Path, content: bytes, secret: bytes
) -> None:
    (tmp_path / "secret").write_bytes(content)
    assert changing.faults({"auth.secret_file": str(tmp_path / "secret")}) == []
    assert status(changing.daemon, sign(secret, claims())) == 101
    for other in {content, content.strip(), content + b"\n", secret.strip()} - {secret}:
        assert status(changing.daemon, sign(other, claims())) == 401, other


def test_token_command_reads_a_secret_as_the_daemon_does(toml: Path, tmp_path: Path, changing: Changing) -> None:
    (tmp_path / "secret").write_bytes(b" " + b"r" * 40 + b" \n")
    assert changing.faults({"auth.secret_file": str(tmp_path / "secret")}) == []
    done = gateway("token", "--user", "alice", "--config", str(toml))
    check_ok(done)
    assert status(changing.daemon, done.stdout.strip()) == 101
    assert status(changing.daemon, sign(b" " + b"r" * 40 + b" ", claims())) == 101


# Names with more than one address

RESOLVER = """
import socket

NAMES = {names!r}
_real = socket.getaddrinfo


def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    name = host.decode() if isinstance(host, bytes) else host
    if name not in NAMES:
        return _real(host, port, family, type, proto, flags)
    found = []
    for address in NAMES[name]:
        if family in (0, socket.AF_INET6 if ":" in address else socket.AF_INET):
            found += _real(address, port, family, type, proto, flags)
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return found


socket.getaddrinfo = getaddrinfo
"""


def resolving(directory: Path, **names: list[str]) -> dict[str, str]:
    """An environment in which Python resolves these names so, whatever this machine's hosts file says."""
    (directory / "resolver").mkdir()
    (directory / "resolver" / "sitecustomize.py").write_text(RESOLVER.format(names=names))
    paths = [str(directory / "resolver"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def port_of(url: str) -> int:
    return int(url.partition("://")[2].partition("/")[0].rpartition(":")[2])


def answers(daemon: Daemon, address: str) -> None:
    """Both the listener and the sidecar answer at ``address``."""
    with RawClient(f"ws://{address}:{port_of(daemon.url)}/ws/mt5") as client:
        answer = client.request(client.headers(daemon.token(), Host=f"{address}:{port_of(daemon.url)}"))
        assert answer.status == 101, answer
    with urllib.request.urlopen(f"http://{address}:{port_of(daemon.sidecar)}/health/live", timeout=10) as live:
        assert live.status == 200


LOCALHOST: dict[str, Any] = {"listen.host": "localhost", "sidecar.host": "localhost"}


@pytest.mark.parametrize(
    ("workers", "addresses"),
    [(1, ["127.0.0.1", "::1"]), (2, ["::1", "127.0.0.1", "::1"])],  # hosts files name an address more than once
)
def test_every_address_of_a_name_is_listened_on(
    start_daemon: Callable[..., Daemon], tmp_path: Path, workers: int, addresses: list[str]
) -> None:
    names = resolving(tmp_path, localhost=addresses)
    daemon = start_daemon(settings=LOCALHOST, workers=workers, environment=names)
    answers(daemon, "127.0.0.1")
    answers(daemon, "[::1]")
    assert daemon.stop() == 0
    for port in (port_of(daemon.url), port_of(daemon.sidecar)):
        for address in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=10)


def test_address_that_this_machine_does_not_have_keeps_nobody_from_the_others(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    # as in a container without IPv6 whose hosts file has ::1 all the same
    names = resolving(tmp_path, localhost=["127.0.0.1", "2001:db8::1"])
    daemon = start_daemon(settings=LOCALHOST, environment=names)
    answers(daemon, "127.0.0.1")


@pytest.mark.parametrize("section", ["listen", "sidecar"])
def test_port_that_is_taken_on_one_address_of_a_name_is_a_fault(tmp_path: Path, section: str) -> None:
    names = resolving(tmp_path, localhost=["127.0.0.1", "::1"])
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        settings = {f"{section}.host": "localhost", f"{section}.port": taken.getsockname()[1]}
        with (
            pytest.raises(RuntimeError, match=f"{section}: .*Address already in use"),
            Daemon(settings=settings, environment=names),
        ):
            pass


# Credentials


def test_example_is_checked_outside_its_unit_but_for_its_credentials(tmp_path: Path) -> None:
    example = str(DEPLOY / "gateway.toml")
    issued = trustme.CA().issue_cert("gateway.example")
    (tmp_path / "server.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    done = gateway("check-config", example, "--set", f"tls.cert_file={tmp_path / 'server.pem'}")
    check_ok(done)
    assert '"port": 8001' in done.stdout
    for setting, credential in (("tls.key_file", "tls-key"), ("auth.secret_file", "jwt-secret")):
        assert any(setting in line and credential in line for line in warnings(done)), done.stderr


def test_everything_else_is_checked_when_credentials_cannot_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    (tmp_path / "server.pem").write_text("no certificate")
    path.write_text(
        '[tls]\ncert_file = "server.pem"\nkey_file = "credential:tls-key"\n'
        '[auth]\nalgorithms = ["HS256", "RS256"]\nsecret_file = "credential:jwt-secret"\njwks_file = "missing.json"\n'
        '[kafka]\nproperties = { "linger.mss" = 1 }\n'
    )
    done = gateway("check-config", str(path))
    check_fault(done, "tls", "server.pem")
    check_fault(done, "auth.jwks_file", "missing.json")
    check_fault(done, "kafka.properties", "linger.mss")
    path.write_text(path.read_text().replace('"server.pem"', '"none.pem"'))
    check_fault(gateway("check-config", str(path)), "tls.cert_file", "none.pem", "No such file")


def test_credentials_of_every_setting_may_be_out_of_sight(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(
        '[auth]\nalgorithms = ["RS256", "ES256"]\njwks_file = "credential:jwks"\n'
        'public_keys = [{ file = "credential:issuer" }]\n'
        '[kafka]\nproperties = { "security.protocol" = "SASL_SSL", "sasl.mechanism" = "PLAIN",'
        ' "sasl.username" = "u" }\n'
        'property_files = { "sasl.password" = "credential:kafka-password" }\n'
    )
    done = gateway("check-config", str(path))
    check_ok(done)
    for setting, credential in (
        ("auth.jwks_file", "jwks"),
        ("auth.public_keys.0.file", "issuer"),
        ("kafka.property_files", "kafka-password"),
    ):
        assert any(setting in line and credential in line for line in warnings(done)), done.stderr


def test_daemon_does_not_start_without_its_credentials(tmp_path: Path) -> None:
    done = gateway("serve", "--config", str(DEPLOY / "gateway.toml"))
    check_fault(done, "tls.key_file", "credential:tls-key")
    check_fault(done, "auth.secret_file", "credential:jwt-secret")
    done = gateway("check-config", str(DEPLOY / "gateway.toml"), environment={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    check_fault(done, "auth.secret_file", "jwt-secret", "No such file")


def test_reload_names_what_systemd_copied_at_the_start(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    (tmp_path / "server.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "tls-key").write_bytes(issued.private_key_pem.bytes())
    key = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "jwks").write_text(json.dumps({"keys": [as_jwk("RS256", key, "good")]}))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "server.pem").rename(tmp_path / "elsewhere" / "server.pem")
    daemon = Daemon(
        settings={
            "tls.cert_file": str(tmp_path / "elsewhere" / "server.pem"),
            "tls.key_file": "credential:tls-key",
            "auth.secret_file": "credential:jwt-secret",
            "auth.algorithms": ["HS256", "RS256"],
            "auth.jwks_file": "credential:jwks",
        },
        environment={"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    (tmp_path / "jwt-secret").write_bytes(daemon.secret)
    with daemon:
        line = reloaded(daemon)
        assert "restart" in json.dumps(line).lower(), line
        copied = ("tls.key_file", "auth.secret_file", "auth.jwks_file")
        named = [value for value in line.values() if all(name in str(value) for name in copied)]
        assert named, line
        assert "tls.cert_file" not in json.dumps(line), "that one was read again"


def test_reload_without_credentials_asks_for_no_restart(start_daemon: Callable[..., Daemon]) -> None:
    assert "restart" not in json.dumps(reloaded(start_daemon())).lower()


@pytest.mark.parametrize("unit", ["gateway.service", "gateway@.service"])
def test_units_say_that_copied_credentials_want_a_restart(unit: str) -> None:
    comments = " ".join(line for line in (DEPLOY / unit).read_text().splitlines() if line.startswith("#")).lower()
    assert "credential" in comments
    assert "restart" in comments


# Certificates

EC, RSA = trustme.KeyType.ECDSA, trustme.KeyType.RSA
CIPHERS = {EC: "ECDHE-ECDSA-AES128-GCM-SHA256", RSA: "ECDHE-RSA-AES128-GCM-SHA256"}


class Issued:
    """A certificate under an intermediate of a root of its own."""

    def __init__(self, kind: trustme.KeyType) -> None:
        authority = trustme.CA(key_type=kind)
        issued = authority.create_child_ca(key_type=kind).issue_cert("127.0.0.1", key_type=kind)
        self.root = authority.cert_pem.bytes().decode()
        self.chain = [blob.bytes() for blob in issued.cert_chain_pems]
        self.key = issued.private_key_pem.bytes()
        self.leaf = ssl.PEM_cert_to_DER_cert(self.chain[0].decode())

    def write(self, directory: Path) -> None:
        (directory / "server.pem").write_bytes(b"".join(self.chain))
        (directory / "server.key").write_bytes(self.key)


def trusting(*issued: Issued, version: ssl.TLSVersion, ciphers: str = "") -> ssl.SSLContext:
    """A client that knows these roots only and speaks one version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata="".join(one.root for one in issued))
    context.minimum_version = context.maximum_version = version
    if ciphers:
        context.set_ciphers(ciphers)
    return context


def leaf_of(client: RawClient) -> bytes | None:
    assert isinstance(client.sock, ssl.SSLSocket)
    return client.sock.getpeercert(binary_form=True)


@pytest.mark.parametrize(("before", "after"), [(EC, RSA), (RSA, EC)], ids=["to RSA", "to ECDSA"])
def test_only_the_new_certificate_is_served_after_a_reload(
    start_daemon: Callable[..., Daemon], tmp_path: Path, before: trustme.KeyType, after: trustme.KeyType
) -> None:
    old, new = Issued(before), Issued(after)
    old.write(tmp_path)
    daemon = start_daemon(
        settings={"tls.cert_file": str(tmp_path / "server.pem"), "tls.key_file": str(tmp_path / "server.key")}
    )
    with ExitStack() as stack:
        early = stack.enter_context(RawClient(daemon.url, tls=trusting(old, version=ssl.TLSVersion.TLSv1_3)))
        early.upgrade(daemon.token())
        new.write(tmp_path)
        reloaded(daemon)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            with RawClient(daemon.url, tls=trusting(old, new, version=version)) as client:
                assert leaf_of(client) == new.leaf, version
            with RawClient(daemon.url, tls=trusting(new, version=version)) as client:  # needs the intermediate
                client.upgrade(daemon.token())
        for kind, ciphers in CIPHERS.items():
            only = trusting(old, new, version=ssl.TLSVersion.TLSv1_2, ciphers=ciphers)
            if kind is after:
                with RawClient(daemon.url, tls=only) as client:
                    assert leaf_of(client) == new.leaf
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)), RawClient(daemon.url, tls=only):
                    pass
        early.ping()


def test_session_of_the_old_certificate_is_not_resumed_after_a_reload(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    old, new = Issued(EC), Issued(EC)
    old.write(tmp_path)
    daemon = start_daemon(
        settings={"tls.cert_file": str(tmp_path / "server.pem"), "tls.key_file": str(tmp_path / "server.key")}
    )
    context = trusting(old, new, version=ssl.TLSVersion.TLSv1_2)

    def connect(session: ssl.SSLSession | None) -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", port_of(daemon.url)), timeout=DEADLINE_S)
        return context.wrap_socket(sock, server_hostname="127.0.0.1", session=session)

    with connect(None) as first:
        session = first.session
        assert first.getpeercert(binary_form=True) == old.leaf
    new.write(tmp_path)
    reloaded(daemon)
    with connect(session) as second:
        assert second.getpeercert(binary_form=True) == new.leaf


# Keys


def as_jwk(algorithm: str, key: Any, kid: str, **members: Any) -> dict[str, Any]:
    """A public key as a JWK (RFC 7517)."""
    members = {"kid": kid, "use": "sig", **members}
    return {**jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True), **members}


USELESS = (
    *("p384", "p256", "ed25519", "short", "oct", "unknown-kty"),
    *("incomplete", "off-curve", "other-alg", "number", "untyped"),
)


@pytest.fixture(scope="module")
def useless() -> dict[str, Any]:
    """Keys that RFC 7517, section 5, has one ignore where only HS256 and RS256 are of use."""
    good = as_jwk("RS256", rsa.generate_private_key(65537, 2048).public_key(), "")
    keys = {
        "p384": as_jwk("ES384", ec.generate_private_key(ec.SECP384R1()).public_key(), ""),
        "p256": as_jwk("ES256", ec.generate_private_key(ec.SECP256R1()).public_key(), ""),
        "ed25519": as_jwk("EdDSA", ed25519.Ed25519PrivateKey.generate().public_key(), ""),
        "short": as_jwk("RS256", rsa.generate_private_key(65537, 1024).public_key(), ""),
        "oct": {"kty": "oct", "k": b64(b"k" * 40)},
        "unknown-kty": {"kty": "AKP", "alg": "ML-DSA-44", "pub": b64(b"p" * 40)},
        "incomplete": {"kty": "RSA", "e": "AQAB"},
        "off-curve": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        "other-alg": {**good, "alg": "PS512"},
        "number": {**good, "n": 5},
        "untyped": {"n": good["n"], "e": good["e"]},
    }
    return {name: {**key, "kid": f"useless-{name}"} for name, key in keys.items()}


def test_keys_of_no_use_in_a_key_set_are_skipped_and_named(
    start_daemon: Callable[..., Daemon], tmp_path: Path, useless: dict[str, Any]
) -> None:
    private = rsa.generate_private_key(65537, 2048)
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [*useless.values(), as_jwk("RS256", private.public_key(), "good")]}))
    daemon = start_daemon(settings={"auth.algorithms": ["HS256", "RS256"], "auth.jwks_file": str(path)})
    wait_for(lambda: all(key["kid"] in daemon.log() for key in useless.values()), daemon.log)
    assert status(daemon, jwt.encode(claims(), private, "RS256", {"kid": "good"})) == 101
    assert status(daemon, sign(b"k" * 40, claims(), {"alg": "HS256", "kid": "useless-oct"})) == 401


@pytest.mark.parametrize("name", USELESS)
def test_key_of_no_use_that_comes_with_a_reload_is_skipped_and_named(
    changing: Changing, tmp_path: Path, useless: dict[str, Any], name: str
) -> None:
    private = rsa.generate_private_key(65537, 2048)
    good = as_jwk("RS256", private.public_key(), "good")
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [useless[name], good]}))
    settings = {"auth.algorithms": ["HS256", "RS256"], "auth.jwks_file": str(tmp_path / "jwks.json")}
    assert changing.faults(settings) == []
    assert status(changing.daemon, jwt.encode(claims(), private, "RS256", {"kid": "good"})) == 101
    wait_for(lambda: f"useless-{name}" in changing.daemon.log(), changing.daemon.log, timeout_s=15)


def test_key_set_without_a_key_of_use_is_refused(tmp_path: Path, useless: dict[str, Any]) -> None:
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": list(useless.values())}))
    (tmp_path / "gateway.toml").write_text('[auth]\nalgorithms = ["RS256"]\njwks_file = "jwks.json"\n')
    check_fault(gateway("check-config", str(tmp_path / "gateway.toml")), "auth.jwks_file")


def pem_of(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_two_keys_in_one_file_are_both_used_or_refused(changing: Changing, tmp_path: Path) -> None:
    keys = [ed25519.Ed25519PrivateKey.generate() for _ in range(2)]
    (tmp_path / "keys.pem").write_bytes(b"".join(map(pem_of, keys)))
    check_both_or_none(changing, tmp_path / "keys.pem", keys, "EdDSA")


def test_certificate_and_key_in_one_file_are_both_used_or_refused(changing: Changing, tmp_path: Path) -> None:
    certified, bare = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(certified.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(certified, hashes.SHA256())
    )
    (tmp_path / "keys.pem").write_bytes(pem_of(bare) + certificate.public_bytes(Encoding.PEM))
    check_both_or_none(changing, tmp_path / "keys.pem", [certified, bare], "ES256")


def check_both_or_none(changing: Changing, path: Path, keys: Sequence[Any], algorithm: str) -> None:
    """The file is refused by name, or tokens of all ``keys`` are believed."""
    settings = {"auth.algorithms": ["HS256", algorithm], "auth.public_keys": [{"file": str(path)}]}
    if faults := changing.faults(settings):
        assert any("auth.public_keys.0.file" in fault for fault in faults), faults
    else:
        assert [status(changing.daemon, jwt.encode(claims(), key, algorithm)) for key in keys] == [101] * len(keys)


def test_key_without_a_name_is_tried_for_tokens_that_name_one(daemon: Daemon) -> None:
    assert status(daemon, sign(daemon.secret, claims(), {"alg": "HS256", "kid": "2026-11"})) == 101
    assert status(daemon, sign(b"w" * 40, claims(), {"alg": "HS256", "kid": "2026-11"})) == 401
    assert status(daemon, sign(daemon.secret, claims(), {"alg": "HS256", "kid": 5})) == 401


def test_key_with_a_name_is_for_its_own_tokens_only(changing: Changing, tmp_path: Path) -> None:
    named, nameless = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "named.pem").write_bytes(pem_of(named))
    (tmp_path / "nameless.pem").write_bytes(pem_of(nameless))
    settings = {
        "auth.algorithms": ["HS256", "EdDSA"],
        "auth.secret_kid": "secret",
        "auth.public_keys": [
            {"file": str(tmp_path / "named.pem"), "kid": "named"},
            {"file": str(tmp_path / "nameless.pem")},
        ],
    }
    assert changing.faults(settings) == []
    daemon = changing.daemon
    for key, kid, expected in (
        (named, "named", 101),
        (named, None, 101),
        (named, "other", 401),
        (nameless, "other", 101),
        (nameless, "named", 101),
        (nameless, None, 101),
    ):
        token = jwt.encode(claims(), key, "EdDSA", {"kid": kid} if kid else None)
        assert status(daemon, token) == expected, (key is named, kid)
    assert status(daemon, sign(daemon.secret, claims(), {"alg": "HS256", "kid": "secret"})) == 101
    assert status(daemon, sign(daemon.secret, claims(), {"alg": "HS256", "kid": "other"})) == 401
