"""The process among other things that fail: its output, signals, threads, its manager, limits, a changed clock."""

from __future__ import annotations

import json
import os
import re
import resource
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pytest
from confluent_kafka import Consumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from gateway.testing.daemon import Daemon
from gateway.testing.kafka import free_ports
from gateway.testing.rawclient import Closed, RawClient, frame
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope

PROJECT = Path(__file__).parent.parent
TICK = MessageEnvelope(message_type="tick_data").SerializeToString()
NOBODY = 65534
SETTLED = ("delivered", "dead_lettered", "dropped", "spooled")
UNKNOWN_FATE = "gateway_messages_unknown_fate"
FAST: dict[str, Any] = {"drain.close_window_s": 0, "drain.reconnect_window_ms": 0}
IMPATIENT: dict[str, Any] = {
    **FAST,
    "drain.flush_timeout_s": 1,
    "drain.close_timeout_s": 1,
    "session.close_timeout_s": 1,
}


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """True while the process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_ended(pids: list[int]) -> bool:
    return not any(map(runs, pids))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def listening_ports(pid: int) -> set[int]:
    """The TCP ports on which a process listens: for one that can tell nobody."""
    inodes = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


def get(url: str, timeout_s: float = 5.0) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def is_live(port: int) -> bool:
    try:
        return get(f"http://127.0.0.1:{port}/health/live")[0] == 200
    except OSError:
        return False


def faults(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("gateway: ")]


def check_faults(status: int, text: str, count: int | None = 1) -> list[str]:
    """One readable line for each fault, exit status 1, no traceback."""
    assert status == 1, text
    assert "Traceback" not in text
    found = faults(text)
    assert found, text
    assert len(found) == len(set(found)), "each is said once"
    assert count is None or len(found) == count, found
    return found


class Served:
    """``gateway serve`` started as `Daemon` does not: behind another program, with an output of the test's own.

    ``prefix`` is the program in front; ``stdout`` is where standard output goes, a file of the home by default.
    """

    def __init__(
        self,
        home: Path,
        kafka: str | None,
        *arguments: str,
        settings: dict[str, Any] | None = None,
        prefix: list[str] | None = None,
        python: list[str] | None = None,
        environment: dict[str, str | None] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        self.home = home
        self._minter = Daemon()  # never started: it has a secret, and mints tokens
        (home / "secret").write_bytes(self._minter.secret)
        values: dict[str, Any] = {
            "auth.secret_file": "secret",
            "listen.port": 0,
            "listen.handshakes_per_address_per_s": 0,
            "listen.max_pending_per_address": 0,
            "sidecar.port": 0,
            "spool.directory": "spool",
            **({} if kafka is None else {"kafka.bootstrap_servers": kafka}),
            **(settings or {}),
        }
        self.config = home / "gateway.toml"
        self.configure(values)
        program = python or [sys.executable, "-m", "gateway"]
        self._command = [*(prefix or []), *program, "serve", "--config", str(self.config), *arguments]
        changed = {**os.environ, **(environment or {})}
        self._environment = {name: value for name, value in changed.items() if value is not None}
        self._stdout, self._stderr = stdout, stderr
        self.process: subprocess.Popen[bytes]

    def configure(self, values: dict[str, Any]) -> None:
        self.values = values
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()]
        self.config.write_text("".join(lines), encoding="utf-8")

    def __enter__(self) -> Self:
        with (self.home / "said").open("wb") as said, (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=said if self._stdout is None else self._stdout,
                stderr=log if self._stderr is None else self._stderr,
                env=self._environment,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left = [self.process.pid, *descendants(self.process.pid)] if self.process.poll() is None else []
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        wait_for(lambda: not any(map(runs, left)), "nobody is left")

    def said(self) -> str:
        return (self.home / "said").read_text(errors="replace")

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def expect(self, what: str) -> str:
        """The rest of the line of standard output that holds ``what``."""

        def found() -> list[str]:
            return [line.partition(what)[2].strip() for line in self.said().splitlines() if what in line]

        wait_for(lambda: found() or self.process.poll() is not None, f"{what!r}: {self.log()}")
        assert found(), f"ended with {self.process.returncode} before it said {what!r}: {self.log()}"
        return found()[0]

    @property
    def url(self) -> str:
        return self.expect("listening on ")

    @property
    def sidecar(self) -> str:
        return self.expect("sidecar on ")

    def wait_ready(self) -> None:
        self.expect("gateway: ready")

    def ready(self) -> bool:
        return get(self.sidecar + "/health/ready")[0] == 200

    def token(self, user: str = "alice") -> str:
        return self._minter.token(user)

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def exchange(self, user: str = "alice") -> None:
        """A client is let in and heard."""
        with RawClient(self.url) as client:
            client.upgrade(self.token(user))
            client.send_binary(TICK)
            client.ping()

    def stopped(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines() if '"event": "stopped"' in line]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that another user may be given: pytest's own lie behind one of root's."""
    with tempfile.TemporaryDirectory(prefix="gateway-process-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def kafka() -> Iterator[Daemon]:
    """A Kafka in a process that can be stopped; who stops it lets it go on."""
    with Daemon(settings={"log.level": "warning"}) as host:
        yield host


@pytest.fixture
def frozen_kafka(kafka: Daemon) -> Iterator[Callable[[], None]]:
    """Stops the Kafka when called, until the test ends."""
    try:
        yield lambda: kafka.signal(signal.SIGSTOP)
    finally:
        kafka.signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Needed by a test that gives a process another view of the system."""
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs root and namespaces: {done.stderr.decode().strip()}")


@pytest.fixture(scope="session")
def nobody() -> list[str]:
    """What runs a command as another user than root, whom no limit of processes holds back.

    The user may read all files: the sources and Python itself may lie in a directory of root's.
    """
    capabilities = "+dac_override,+dac_read_search"
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    prefix += [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
    probe = [*prefix, "sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", "import gateway"]
    done = subprocess.run(probe, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs root: {done.stderr.decode().strip()[-200:]}")
    return prefix


def run_first(home: Path, source: str) -> str:
    """A PYTHONPATH under which every Python runs ``source`` before anything else."""
    (home / "first").mkdir(exist_ok=True)
    (home / "first" / "sitecustomize.py").write_text(source)
    return os.pathsep.join(filter(None, (str(home / "first"), os.environ.get("PYTHONPATH"))))


def page_of(text: str) -> dict[str, float]:
    """A metrics page: the sum of each metric, and of each metric's outcomes as NAME:OUTCOME."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
            if outcome := sample.labels.get("outcome"):
                name = f"{sample.name}:{outcome}"
                found[name] = found.get(name, 0.0) + sample.value
    return found


# Standard output


@pytest.mark.parametrize("workers", [1, 2])
def test_full_standard_output_costs_lines_and_not_the_service(home: Path, kafka: Daemon, workers: int) -> None:
    with (
        open("/dev/full", "wb") as full,
        Served(home, kafka.kafka, f"--workers={workers}", stdout=full, settings=FAST) as served,
    ):
        check_that_it_serves_unheard(served, workers)


@pytest.mark.parametrize("late", [False, True], ids=["ready at once", "ready later"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reader_of_standard_output_that_goes_away_ends_nothing(
    home: Path, kafka: Daemon, frozen_kafka: Callable[[], None], workers: int, late: bool
) -> None:
    if late:
        frozen_kafka()
    with Served(home, kafka.kafka, f"--workers={workers}", stdout=subprocess.PIPE, settings=FAST) as served:
        assert served.process.stdout is not None
        assert served.process.stdout.readline().startswith(b"gateway: listening on ")
        served.process.stdout.close()
        pid = served.process.pid
        wait_for(lambda: any(map(is_live, listening_ports(pid))) or not runs(pid), "it goes on without a reader")
        kafka.signal(signal.SIGCONT)
        check_that_it_serves_unheard(served, workers)


def check_that_it_serves_unheard(served: Served, workers: int) -> None:
    """It gets ready, stays so, and drains in order when it is told to; its addresses nobody has heard."""
    pid = served.process.pid
    last = '"event": "ready"' if workers == 1 else '"event": "worker ready"'

    def sidecar() -> str | None:
        return next((f"http://127.0.0.1:{port}" for port in listening_ports(pid) if is_live(port)), None)

    def is_ready() -> bool:
        found = sidecar()
        return found is not None and get(found + "/health/ready")[0] == 200

    def listeners() -> set[int]:
        return {port for one in (pid, *descendants(pid)) for port in listening_ports(one) if not is_live(port)}

    wait_for(lambda: is_ready() or not runs(pid), "it gets ready")
    wait_for(lambda: served.log().count(last) == workers or not runs(pid), "it has come to where it says so")
    wait_for(lambda: listeners() or not runs(pid), "it listens")
    assert runs(pid), served.log()
    (port,) = listeners()
    for _ in range(3):
        with RawClient(f"ws://127.0.0.1:{port}/ws/mt5") as client:
            client.upgrade(served.token())
            client.ping()
            client.close()
    assert served.stop() == 0, served.log()
    assert served.stopped()
    assert "Traceback" not in served.log()


def test_closed_standard_streams_are_not_mistaken_for_sockets(home: Path, kafka: Daemon) -> None:
    """Descriptors 0 to 2 must not become a client's or Kafka's connection, into which log lines are then written."""
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    settings = {**FAST, "log.level": "debug"}
    with Served(home, kafka.kafka, prefix=closing, settings=settings) as served:
        pid = served.process.pid
        wait_for(lambda: any(map(is_live, listening_ports(pid))) or not runs(pid), "it starts")
        assert runs(pid)
        wait_for(lambda: len(listening_ports(pid)) == 2, "it listens")
        (port,) = (port for port in listening_ports(pid) if not is_live(port))
        (sidecar,) = listening_ports(pid) - {port}
        wait_for(lambda: get(f"http://127.0.0.1:{sidecar}/health/ready")[0] == 200, "it gets ready")
        with RawClient(f"ws://127.0.0.1:{port}/ws/mt5") as client:
            client.upgrade(served.token())
            for _ in range(3):
                client.ping()
        for number in range(3):
            with suppress(FileNotFoundError):
                assert not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"), number
        assert served.stop() == 0


# Ctrl-C in the commands that are no daemon


def interrupted(
    command: list[str], when: Callable[[subprocess.Popen[bytes]], object], home: Path, *, group: bool = False
) -> tuple[int, str]:
    """Run a command, send SIGINT when a condition holds; exit status and standard error. Leaves no process behind."""
    with (home / "out").open("wb") as out, (home / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    left: list[int] = []
    try:
        wait_for(lambda: when(process) or process.poll() is not None, "the moment of the interrupt")
        assert process.poll() is None, (home / "err").read_text()
        left = descendants(process.pid)
        if group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        status = process.wait(30)
        wait_for(lambda: not any(map(runs, left)), "what it had started ends with it")
        return status, (home / "err").read_text()
    finally:
        for pid in (process.pid, *left):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def check_interrupted(status: int, text: str) -> None:
    assert "Traceback" not in text, text
    assert status == 130, text
    assert len(text.splitlines()) <= 1, text


def test_interrupted_stream_ends_with_130_and_no_traceback(daemon: Daemon, home: Path) -> None:
    ticks = home / "ticks.csv"
    ticks.write_text(
        "time_msc,symbol,bid,ask,volume\n" + "".join(f"{number},EURUSD,1.1,1.2,0\n" for number in range(10_000))
    )
    (home / "token").write_text(daemon.token("interrupted"))
    before = daemon.books()["received"]
    status, text = interrupted(
        ["stream", str(ticks), "--url", daemon.url, "--token-file", str(home / "token"), "--rate", "20"],
        lambda _: daemon.books()["received"] > before,
        home,
    )
    check_interrupted(status, text)


def test_stream_interrupted_while_it_waits_for_the_gateway_ends_with_130(home: Path) -> None:
    (home / "ticks.csv").write_text("time_msc,symbol,bid,ask,volume\n1,EURUSD,1.1,1.2,0\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, never answers the handshake
        silent.settimeout(0.01)
        taken: list[socket.socket] = []

        def connected(_: object) -> bool:
            with suppress(TimeoutError):
                taken.append(silent.accept()[0])
            return bool(taken)

        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws/mt5"
        try:
            check_interrupted(
                *interrupted(["stream", str(home / "ticks.csv"), "--url", url, "--token", "t"], connected, home)
            )
        finally:
            for sock in taken:
                sock.close()


@pytest.mark.parametrize(
    ("early", "group"), [(True, True), (False, True), (False, False)], ids=["while it starts", "while it runs", "alone"]
)
def test_interrupted_demo_ends_with_130_and_leaves_no_daemon(home: Path, early: bool, group: bool) -> None:
    """A terminal's Ctrl-C goes to the demo's daemon, too."""

    def moment(process: subprocess.Popen[bytes]) -> bool:
        return bool(children(process.pid)) if early else "messages/s" in (home / "out").read_text()

    status, text = interrupted(["demo", "--clients", "2", "--rate", "5", "--seconds", "60"], moment, home, group=group)
    check_interrupted(status, text)


def fill_spool(daemon: Daemon, kafka: Daemon, user: str, count: int) -> None:
    """Have a running daemon spool messages: drain it while its Kafka does not answer."""
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token(user))
        kafka.signal(signal.SIGSTOP)
        try:
            client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(count)))
            client.ping()
            assert daemon.stop() == 0
        finally:
            kafka.signal(signal.SIGCONT)
    assert list((daemon.home / "spool").glob("*.spool"))


def test_interrupted_spool_replay_ends_with_130_and_keeps_what_is_not_sent(
    start_daemon: Callable[..., Daemon], kafka: Daemon, frozen_kafka: Callable[[], None], home: Path
) -> None:
    daemon = start_daemon(kafka.kafka, settings=IMPATIENT)
    fill_spool(daemon, kafka, "replayed", 30)
    daemon.reconfigure(kafka__max_queued_messages=5)
    frozen_kafka()

    def tries_to_reach_kafka(process: subprocess.Popen[bytes]) -> bool:
        names = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/comm")]
        return any(name.startswith("rdk:broker") for name in names)

    status, text = interrupted(
        ["spool", "replay", "--config", str(daemon.home / "gateway.toml")], tries_to_reach_kafka, home
    )
    check_interrupted(status, text)
    shown = subprocess.run(
        [sys.executable, "-m", "gateway", "spool", "inspect", str(daemon.home / "spool")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown
    total = re.search(r": (\d+) records to send", shown.stdout)
    assert total is not None
    assert int(total[1]) >= 30, "everything is still there; what was under way may be there twice"


# Signals

HOLD = """
import importlib.abc, os, pathlib, sys, time


class Hold(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in HELD_AT and (not ONLY_WORKERS or "--worker" in sys.argv):
            marker = pathlib.Path(os.environ["HELD"])
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return None
            while not marker.with_suffix(".go").exists():
                time.sleep(0.01)
        return None


HELD_AT, ONLY_WORKERS = set(os.environ["HELD_AT"].split()), bool(os.environ.get("HELD_WORKERS"))
sys.meta_path.insert(0, Hold())
"""
"""Holds one process where it imports something for the first time: an instant becomes as long as a test likes."""

FIRST = "trio cyclopts pydantic pydantic_settings pydantic_core confluent_kafka structlog jwt cryptography rich attr"
LATE = "hypercorn hypercorn.config hypercorn.trio"
PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def installed_command() -> list[str]:
    """What the installed ``gateway`` program does, for these sources."""
    entry: str = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]["gateway"]
    module, _, function = entry.partition(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


@pytest.mark.parametrize(
    ("number", "at", "first_process", "installed", "workers"),
    [
        (signal.SIGTERM, FIRST, False, False, 1),
        (signal.SIGTERM, LATE, False, True, 1),
        (signal.SIGTERM, FIRST, True, True, 1),
        (signal.SIGTERM, LATE, True, False, 2),
        (signal.SIGINT, FIRST, False, True, 1),
        (signal.SIGINT, FIRST, True, False, 2),
        (signal.SIGHUP, FIRST, False, False, 1),
        (signal.SIGHUP, LATE, False, True, 2),
        (signal.SIGHUP, LATE, True, True, 1),
    ],
    ids=[
        *("SIGTERM early", "SIGTERM late", "SIGTERM early as PID 1", "SIGTERM late as PID 1", "SIGINT early"),
        *("SIGINT early as PID 1", "SIGHUP early", "SIGHUP late", "SIGHUP late as PID 1"),
    ],
)
def test_signal_means_from_the_first_instant_what_it_means_later(
    request: pytest.FixtureRequest,
    home: Path,
    kafka: Daemon,
    number: signal.Signals,
    at: str,
    first_process: bool,
    installed: bool,
    workers: int,
) -> None:
    """Held before the first library is loaded, or before the last: to drain nothing is in order, and to reload is."""
    if first_process:
        request.getfixturevalue("namespaces")
    environment: dict[str, str | None] = {
        "PYTHONPATH": run_first(home, HOLD),
        "HELD": str(home / "held"),
        "HELD_AT": at,
    }
    with Served(
        home,
        kafka.kafka,
        f"--workers={workers}",
        settings=FAST,
        prefix=PID_1 if first_process else [],
        python=installed_command() if installed else None,
        environment=environment,
    ) as served:
        wait_for(lambda: (home / "held").exists() or served.process.poll() is not None, "it is held")
        assert served.process.poll() is None, served.log()
        pid = children(served.process.pid)[0] if first_process else served.process.pid
        os.kill(pid, number)
        (home / "held.go").touch()
        if number == signal.SIGHUP:
            served.wait_ready()
            assert served.ready()
            served.exchange()
            os.kill(pid, signal.SIGTERM)
        assert served.wait() == 0, served.log()
        assert "Traceback" not in served.log()
        assert not runs(pid)


def test_worker_that_hangs_before_it_can_say_anything_does_not_hold_up_the_end(home: Path, kafka: Daemon) -> None:
    environment: dict[str, str | None] = {
        "PYTHONPATH": run_first(home, HOLD),
        "HELD": str(home / "held"),
        "HELD_AT": FIRST,
        "HELD_WORKERS": "1",
    }
    settings = {**IMPATIENT, "drain.timeout_s": 4}
    with Served(home, kafka.kafka, "--workers=2", settings=settings, environment=environment) as served:
        wait_for(lambda: (home / "held").exists() or served.process.poll() is not None, "a worker is held")
        assert served.process.poll() is None, served.log()
        left = descendants(served.process.pid)
        served.process.send_signal(signal.SIGTERM)
        served.wait(30)
        assert not any(map(runs, left))


# No thread can be had


def limit_processes(nobody: list[str], pid: int, soft: int | str) -> None:
    """Change how many processes and threads a process's user may have; asked for by that user, as the system wants."""
    subprocess.run([*nobody, "prlimit", f"--pid={pid}", f"--nproc={soft}:"], check=True, capture_output=True)


def without_threads(nobody: list[str], pid: int) -> None:
    """From now on the process gets no new thread; wait first until it has no idle one to use again."""

    def idle() -> bool:
        names = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
        return any(name.startswith("Trio") for name in names)

    deadline = time.monotonic() + 12  # Trio lets an idle thread go after ten seconds; one that never ends is fine too
    while idle() and time.monotonic() < deadline:
        time.sleep(0.05)
    limit_processes(nobody, pid, 1)


def with_threads(nobody: list[str], pid: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]  # the process has it from here
    limit_processes(nobody, pid, "unlimited" if hard == resource.RLIM_INFINITY else hard)


def owned(home: Path) -> Path:
    """The directory as the other user's own."""
    os.chown(home, NOBODY, NOBODY)
    return home


def says_no_thread(log: str) -> bool:
    return re.search(r"thread|temporarily unavailable", log, re.IGNORECASE) is not None


def test_reload_while_no_thread_can_be_had_is_logged_and_done_later(
    home: Path, kafka: Daemon, nobody: list[str]
) -> None:
    with (
        Served(owned(home), kafka.kafka, prefix=nobody, settings=FAST) as served,
        Records(kafka.kafka, "notifications") as records,
    ):
        served.wait_ready()
        pid = served.process.pid
        without_threads(nobody, pid)
        served.configure({**served.values, "routes.topics.tick_data": "notifications"})
        served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: says_no_thread(served.log()) or served.process.poll() is not None, "it says what is amiss")
        assert served.process.poll() is None, served.log()
        assert get(served.sidecar + "/health/live")[0] == 200
        with_threads(nobody, pid)
        with RawClient(served.url) as client:
            wait_for(lambda: client_is_in(served, "router"), "handshakes are served again")
            client.upgrade(served.token("router"))
            deadline = time.monotonic() + 30
            while True:  # until the new route holds, a tick may go the old way
                client.send_binary(TICK)
                with suppress(AssertionError):
                    records.take(1, key="router", timeout_s=0.5)
                    break
                assert time.monotonic() < deadline, f"the new route never came: {served.log()}"
        assert served.ready()
        assert served.stop() == 0
        assert "Traceback" not in served.log()


def client_is_in(served: Served, user: str) -> bool:
    with RawClient(served.url) as client:
        return client.request(client.headers(served.token(user))).status == 101


def test_drain_that_spools_while_no_thread_can_be_had_still_loses_nothing(
    home: Path, kafka: Daemon, frozen_kafka: Callable[[], None], nobody: list[str]
) -> None:
    settings = {**IMPATIENT, "drain.grace_s": 0, "drain.timeout_s": 40}
    with Served(owned(home), kafka.kafka, prefix=nobody, settings=settings) as served:
        served.wait_ready()
        pid = served.process.pid
        with RawClient(served.url) as client:
            client.upgrade(served.token())
            frozen_kafka()
            client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(50)))
            client.ping()
            without_threads(nobody, pid)
            served.process.send_signal(signal.SIGTERM)
            wait_for(
                lambda: says_no_thread(served.log()) or served.process.poll() is not None, "it meets what is amiss"
            )
            if served.process.poll() is None:
                with_threads(nobody, pid)
            status = served.wait()
        (stopped,) = served.stopped() or [{}]
        assert (status, stopped.get("received"), stopped.get("spooled"), stopped.get("imbalance")) == (0, 50, 50, 0), (
            served.log()
        )


def test_worker_that_cannot_be_started_again_for_want_of_a_process_is_tried_again(
    home: Path, kafka: Daemon, nobody: list[str]
) -> None:
    with Served(owned(home), kafka.kafka, "--workers=2", prefix=nobody, settings=FAST) as served:
        served.wait_ready()
        parent = served.process.pid
        victim, other = sorted(children(parent))
        # the threads that read two sidecars are in use each second: they do not go away
        limit_processes(nobody, parent, 1)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: says_no_thread(served.log()) or not runs(parent), "it says what is amiss")
        assert runs(parent), served.log()
        assert runs(other)
        assert served.ready()
        with_threads(nobody, parent)
        wait_for(lambda: len(children(parent)) == 2, "it is started again")
        wait_for(
            lambda: all(worker.get("ready") for worker in json.loads(get(served.sidecar + "/health")[1])["workers"]),
            "and ready",
        )
        assert served.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_start_without_a_thread_to_be_had_is_one_line(
    home: Path, kafka: Daemon, nobody: list[str], workers: int
) -> None:
    prefix = [*nobody, "prlimit", "--nproc=1:1"]
    with Served(owned(home), kafka.kafka, f"--workers={workers}", prefix=prefix) as served:
        check_faults(served.wait(), served.log())


# The service manager


class Manager:
    """systemd's side of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(0.1)

    def hear(self) -> list[str]:
        """The assignments of the next message, none when there is none for the moment."""
        with suppress(TimeoutError):
            return self.sock.recv(4096).decode().splitlines()
        return []

    def hear_until(self, what: str, timeout_s: float = 40.0) -> list[str]:
        heard: list[str] = []
        deadline = time.monotonic() + timeout_s
        while not any(assignment.startswith(what) for assignment in heard):
            assert time.monotonic() < deadline, f"{what} was not among {heard}"
            heard += self.hear()
        return heard

    def check_extended(self, times: int, meanwhile: Callable[[], None]) -> None:
        """More time is asked for ``times`` times, each time before what was given before has passed; never READY."""
        heard_at: list[tuple[float, float]] = []
        deadline = time.monotonic() + 40
        while len(heard_at) < times:
            assert time.monotonic() < deadline, f"asked for more time {len(heard_at)} times"
            meanwhile()
            for assignment in self.hear():
                name, _, value = assignment.partition("=")
                assert name != "READY"
                if name == "EXTEND_TIMEOUT_USEC":
                    heard_at.append((time.monotonic(), int(value) / 1e6))
        for (before, given_s), (after, _) in pairwise(heard_at):
            assert after - before < given_s


@pytest.fixture
def manager(home: Path) -> Iterator[Manager]:
    listening = Manager(home / "notify")
    with listening.sock:
        yield listening


@pytest.mark.parametrize("workers", [1, 2])
def test_start_that_waits_for_kafka_asks_its_manager_for_more_time(
    start_daemon: Callable[..., Daemon], home: Path, manager: Manager, workers: int
) -> None:
    daemon = start_daemon(
        "127.0.0.1:1",
        environment={"NOTIFY_SOCKET": str(home / "notify")},
        settings=FAST,
        wait_ready=False,
        workers=workers,
    )

    def check_sidecar() -> None:
        assert daemon.get("/health/live")[0] == 200
        assert daemon.get("/health/ready")[0] == 503

    manager.check_extended(3, check_sidecar)
    assert daemon.stop() == 0


def test_replay_that_waits_for_kafka_asks_its_manager_for_more_time(
    start_daemon: Callable[..., Daemon],
    kafka: Daemon,
    frozen_kafka: Callable[[], None],
    home: Path,
    manager: Manager,
) -> None:
    daemon = start_daemon(
        kafka.kafka, environment={"NOTIFY_SOCKET": str(home / "notify")}, settings={**IMPATIENT}, wait_ready=True
    )
    fill_spool(daemon, kafka, "patient", 500)
    manager.hear_until("STOPPING=1")
    # one record at a time finds room: the replay takes seconds, and Kafka goes away in the midst of it
    daemon.reconfigure(kafka__max_queued_messages=1)
    daemon._wait_ready = False
    daemon.start()
    manager.hear_until("STATUS=sending what the spool holds")
    frozen_kafka()

    def check_sidecar() -> None:
        assert daemon.get("/health/live")[0] == 200
        assert "spool_not_sent_yet" in daemon.get("/health/ready")[1]

    manager.check_extended(3, check_sidecar)
    kafka.signal(signal.SIGCONT)
    daemon.reconfigure(kafka__max_queued_messages=1000)
    manager.hear_until("READY=1")


# The end


def check_config(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (home / "secret").write_text("s" * 40)
    path = home / "checked.toml"
    path.write_text('auth.secret_file = "secret"\n')
    command = [sys.executable, "-m", "gateway", "check-config", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def default_drain(home: Path) -> dict[str, float]:
    done = check_config(home)
    assert done.returncode == 0, done
    drain: dict[str, float] = json.JSONDecoder().raw_decode(done.stdout)[0]["drain"]
    return drain


UNITS = sorted((PROJECT / "deploy").glob("*.service"))


def unit_value(unit: Path, name: str) -> str:
    """A unit's setting, continued lines joined (systemd.syntax(7))."""
    lines = unit.read_text().replace("\\\n", " ").splitlines()
    (value,) = (line.partition("=")[2].strip() for line in lines if line.startswith(f"{name}="))
    return value


def seconds_of(span: str) -> float:
    """A time span as systemd.time(7) writes it."""
    units = {"": 1, "s": 1, "sec": 1, "min": 60, "m": 60, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)\s*([a-z]*)", span))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_waits_longer_than_a_drain_may_take(home: Path, unit: Path) -> None:
    drain = default_drain(home)
    assert seconds_of(unit_value(unit, "TimeoutStopSec")) > drain["timeout_s"]
    assert 0 < drain["grace_s"] <= 5
    assert drain["grace_s"] + drain["close_window_s"] < drain["timeout_s"]


@pytest.mark.parametrize(
    ("command", "sets"),
    [
        ("check-config", ["drain.grace_s=40", "drain.close_window_s=20"]),
        ("check-config", ["drain.grace_s=60"]),
        ("check-config", ["drain.timeout_s=2", "drain.close_window_s=3"]),
        ("serve", ["drain.close_window_s=60"]),
    ],
)
def test_grace_and_window_that_do_not_fit_into_the_drain_are_refused(
    home: Path, kafka: Daemon, command: str, sets: list[str]
) -> None:
    arguments = [f"--set={one}" for one in sets]
    if command == "check-config":
        done = check_config(home, *arguments)
        status, text = done.returncode, done.stderr
    else:
        with Served(home, kafka.kafka, *arguments) as served:
            wait_for(lambda: served.process.poll() is not None or served.said(), "it ends, or says where it listens")
            assert not served.said()
            status, text = served.wait(), served.log()
    (line,) = check_faults(status, text)
    assert "drain.timeout_s" in line
    assert "is not a setting" not in line


@pytest.mark.parametrize("workers", [1, 2])
def test_worst_drain_ends_within_its_one_deadline_and_spools(
    start_daemon: Callable[..., Daemon], kafka: Daemon, frozen_kafka: Callable[[], None], workers: int
) -> None:
    """Kafka does not answer, clients neither close nor read, and every part may take longer than the whole."""
    settings = {
        "drain.timeout_s": 5,
        "drain.grace_s": 0.3,
        "drain.close_window_s": 1,
        "drain.close_timeout_s": 60,
        "drain.flush_timeout_s": 600,
        "session.close_timeout_s": 60,
    }
    daemon = start_daemon(kafka.kafka, settings=settings, workers=workers)
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(4)]
        for number, client in enumerate(clients):
            client.upgrade(daemon.token(f"worst-{number}"))
        frozen_kafka()
        for client in clients:
            client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(500)))
            client.ping()
        began = time.monotonic()
        assert daemon.stop(45) == 0, daemon.log()
        assert time.monotonic() - began < 15
    lines = [json.loads(line) for line in daemon.log().splitlines() if '"event": "stopped"' in line]
    assert len(lines) == workers
    assert sum(line["spooled"] for line in lines) == 2000
    assert all(line["imbalance"] == 0 for line in lines)


def test_worker_that_hangs_while_draining_is_killed_and_the_parent_ends(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, settings={**IMPATIENT, "drain.timeout_s": 4}, workers=2)
    hanging, other = sorted(children(daemon.pid))
    os.kill(hanging, signal.SIGSTOP)
    try:
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(25) == 1, "what the killed one held nobody knows"
        assert not runs(hanging)
        assert not runs(other)
        assert daemon.log().count('"event": "stopped"') == 1, "the other one ended in order"
        assert str(hanging) in daemon.log() or "killed" in daemon.log()
    finally:
        with suppress(ProcessLookupError):
            os.kill(hanging, signal.SIGKILL)


class Newcomers:
    """Handshakes at an address that is being given up."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self.statuses: list[int] = []

    def come(self) -> None:
        """One more; raises OSError or Closed when it gets no answer."""
        with RawClient(self.url) as client:
            request = "".join(f"{name}: {value}\r\n" for name, value in client.headers(self.token))
            client.sock.sendall(f"GET {client.path} HTTP/1.1\r\n{request}\r\n".encode())
            self.statuses.append(client.read_response().status)


@pytest.mark.parametrize("workers", [1, 2])
def test_newcomers_are_answered_during_the_grace_of_a_drain_that_readiness_tells(
    start_daemon: Callable[..., Daemon], kafka: Daemon, workers: int
) -> None:
    grace_s = 2.0
    daemon = start_daemon(kafka.kafka, settings={**FAST, "drain.grace_s": grace_s}, workers=workers)
    newcomers = Newcomers(daemon.url, daemon.token())
    asked_at = time.monotonic()
    daemon.signal(signal.SIGTERM)
    reasons = ""
    while time.monotonic() < asked_at + grace_s - 0.2:
        newcomers.come()
        status, body = daemon.get("/health/ready")
        reasons = body if status == 503 else reasons
        assert daemon.get("/health/live")[0] == 200
    assert "draining" in reasons, reasons
    assert len(newcomers.statuses) > 3
    assert set(newcomers.statuses) <= {101, 503}
    assert daemon.process is not None
    assert daemon.process.wait(30) == 0


def test_instances_on_one_port_answer_every_newcomer_while_one_of_them_drains(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    grace_s = 2.0
    settings = {**FAST, "listen.reuse_port": True, "drain.grace_s": grace_s}
    leaving = start_daemon(kafka.kafka, settings=settings)
    port = int(leaving.url.rpartition(":")[2].partition("/")[0])
    staying = start_daemon(
        kafka.kafka,
        settings={**settings, "listen.port": port, "auth.secret_file": str(leaving.home / "secret")},
    )
    newcomers = Newcomers(staying.url, leaving.token())
    asked_at = time.monotonic()
    leaving.signal(signal.SIGTERM)
    while time.monotonic() < asked_at + grace_s - 0.2:
        newcomers.come()
    assert set(newcomers.statuses) <= {101, 503}
    assert leaving.process is not None
    assert leaving.process.wait(30) == 0
    newcomers.statuses.clear()
    for _ in range(20):
        newcomers.come()
    assert set(newcomers.statuses) == {101}


@pytest.mark.parametrize("grace_s", [None, 0])
def test_who_waits_in_the_backlog_when_a_drain_begins_is_answered(
    start_daemon: Callable[..., Daemon], kafka: Daemon, grace_s: float | None
) -> None:
    settings = FAST if grace_s is None else {**FAST, "drain.grace_s": grace_s}
    daemon = start_daemon(kafka.kafka, settings=settings)
    token = daemon.token()
    with ExitStack() as stack:
        daemon.signal(signal.SIGSTOP)
        try:
            stopped = Path(f"/proc/{daemon.pid}/stat")
            wait_for(lambda: stopped.read_text().rpartition(")")[2].split()[0] == "T", "it stands still")
            clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(300)]
            for client in clients:
                request = "".join(f"{name}: {value}\r\n" for name, value in client.headers(token))
                client.sock.sendall(f"GET {client.path} HTTP/1.1\r\n{request}\r\n".encode())
            daemon.signal(signal.SIGTERM)
        finally:
            daemon.signal(signal.SIGCONT)
        answers: dict[str, int] = {}
        for client in clients:
            try:
                answer = str(client.read_response().status)
            except (Closed, OSError) as error:
                answer = type(error).__name__
            answers[answer] = answers.get(answer, 0) + 1
        assert set(answers) <= {"101", "503"}, answers
    assert daemon.process is not None
    assert daemon.process.wait(30) == 0


def test_second_sigterm_cuts_the_grace_short(start_daemon: Callable[..., Daemon], kafka: Daemon) -> None:
    daemon = start_daemon(kafka.kafka, settings={**FAST, "drain.grace_s": 30, "drain.timeout_s": 60})
    daemon.signal(signal.SIGTERM)
    wait_for(lambda: daemon.get("/health/ready")[0] == 503, "it drains")
    began = time.monotonic()
    assert daemon.stop(25) == 0
    assert time.monotonic() - began < 15


# Workers and instances

NO_PIDFD = {
    "missing": "import os\ndel os.pidfd_open\n",
    "forbidden": """
import errno, os

def pidfd_open(pid, flags=0):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

os.pidfd_open = pidfd_open
""",
}


@pytest.mark.parametrize("why", NO_PIDFD)
def test_workers_do_without_pidfd_open(home: Path, kafka: Daemon, why: str) -> None:
    environment: dict[str, str | None] = {"PYTHONPATH": run_first(home, NO_PIDFD[why])}
    with Served(home, kafka.kafka, "--workers=2", settings=FAST, environment=environment) as served:
        wait_for(lambda: "worker ended" in served.log() or "gateway: ready" in served.said(), "ready, or why not")
        assert "worker ended" not in served.log(), served.log()
        served.exchange()
        workers = children(served.process.pid)
        assert len(workers) == 2
        served.process.kill()
        try:
            wait_for(lambda: not any(map(runs, workers)), "they end with their parent", 20)
        finally:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_instances_have_sidecar_ports_beside_each_other(home: Path, kafka: Daemon) -> None:
    (port,) = free_ports(1)
    base = port - 10
    with Served(home, kafka.kafka, f"--sidecar-port={base}", "--instance=10", settings=FAST) as served:
        assert served.sidecar == f"http://127.0.0.1:{port}"
        wait_for(lambda: is_live(port), "it is there")
        assert served.stop() == 0


def test_workers_of_an_instance_have_its_sidecar_port_and_free_ones(home: Path, kafka: Daemon) -> None:
    (port,) = free_ports(1)
    settings = {**FAST, "sidecar.port": port - 3}
    with Served(home, kafka.kafka, "--instance=3", "--workers=2", settings=settings) as served:
        served.wait_ready()
        assert served.sidecar == f"http://127.0.0.1:{port}"
        workers = json.loads(get(served.sidecar + "/health")[1])["workers"]
        assert all(int(worker["sidecar"].rpartition(":")[2]) > 1023 for worker in workers)
        assert served.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_instance_whose_sidecar_port_does_not_exist_is_one_line(home: Path, kafka: Daemon, workers: int) -> None:
    with Served(home, kafka.kafka, "--sidecar-port=65530", "--instance=10", f"--workers={workers}") as served:
        (line,) = check_faults(served.wait(), served.log())
        assert "sidecar.port" in line or "--instance" in line


def test_unit_of_instances_counts_their_sidecar_ports() -> None:
    words = shlex.split(unit_value(PROJECT / "deploy" / "gateway@.service", "ExecStart"))
    joined = " ".join(words).replace("=", " ")
    assert re.search(r"--instance %i\b", joined), joined
    base = re.search(r"--sidecar-port (\S+)", joined)
    assert base is not None
    assert base[1].isdigit(), f"the number of an instance written behind it is no port from 10 on: {base[1]}"
    assert 1023 < int(base[1]) + 255 <= 65535


# Faults that will not go away


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["auth.secret_file=nofile"], ["auth.secret_file", "nofile", "No such file"]),
        (["tls.cert_file=nocert", "tls.key_file=nokey"], ["tls.", "No such file"]),
        (['kafka.properties={"linger.mss"=1}'], ["linger.mss"]),
        (["listen.max_connections=900000"], ["listen.max_connections"]),
    ],
    ids=["secret", "certificate", "property", "descriptors"],
)
def test_fault_that_every_worker_meets_stops_the_start(
    home: Path, kafka: Daemon, sets: list[str], words: list[str]
) -> None:
    if "900000" in sets[0] and resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 900_000:
        pytest.skip("this host has so many descriptors")
    with Served(home, kafka.kafka, "--workers=2", *(f"--set={one}" for one in sets)) as served:
        wait_for(lambda: served.process.poll() is not None or served.log().count("worker ended") > 3, "it ends", 30)
        left = descendants(served.process.pid)
        assert served.process.poll() is not None, f"workers are started for ever: {served.log()}"
        (line,) = check_faults(served.wait(), served.log())
        for word in words:
            assert word in line
        assert not any(map(runs, left))


def test_spool_in_use_by_another_daemon_stops_the_start_of_workers(
    start_daemon: Callable[..., Daemon], home: Path, kafka: Daemon
) -> None:
    holder = start_daemon(kafka.kafka, workers=2, settings=FAST)
    spool = str(holder.home / "spool")
    with Served(home, kafka.kafka, "--workers=2", settings={**FAST, "spool.directory": spool}) as served:
        wait_for(lambda: served.process.poll() is not None or served.log().count("worker ended") > 3, "it ends", 30)
        assert served.process.poll() is not None, f"workers are started for ever: {served.log()}"
        lines = check_faults(served.wait(), served.log(), None)
        assert {*re.findall(r"worker-\d", " ".join(lines))} <= {"worker-0", "worker-1"}, lines
        assert all("in use" in line and "worker-" in line for line in lines)  # each that came so far before the first
    assert holder.get("/health/ready")[0] == 200, "the other one does not notice"


def test_one_worker_that_fails_at_its_first_start_stops_the_others(
    start_daemon: Callable[..., Daemon], home: Path, kafka: Daemon
) -> None:
    holder = start_daemon(kafka.kafka, settings={**FAST, "spool.directory": str(home / "spool" / "worker-1")})
    with Served(home, kafka.kafka, "--workers=3", settings=FAST) as served:
        wait_for(lambda: served.process.poll() is not None or served.log().count("worker ended") > 3, "it ends", 30)
        left = descendants(served.process.pid)
        assert served.process.poll() is not None, f"it is started for ever: {served.log()}"
        (line,) = check_faults(served.wait(), served.log())
        assert "worker-1" in line
        assert "in use" in line
        assert not any(map(runs, left))
    assert holder.get("/health/ready")[0] == 200


def test_fault_that_comes_later_does_not_stop_the_workers_that_run(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, workers=2, settings=FAST)
    (daemon.home / "secret").rename(daemon.home / "elsewhere")
    victim, other = sorted(children(daemon.pid))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: daemon.log().count("worker ended") >= 2, "it fails again")
    assert runs(daemon.pid)
    assert runs(other)
    (daemon.home / "elsewhere").rename(daemon.home / "secret")
    wait_for(
        partial(all_ready, daemon),
        "it comes when the fault is gone",
    )
    assert daemon.stop() == 0


# The sum over workers


def page(daemon: Daemon) -> dict[str, float]:
    return page_of(daemon.get("/metrics")[1])


def page_says_received(daemon: Daemon, count: int) -> bool:
    return page(daemon).get("gateway_messages_total:received", 0) == count


def all_ready(daemon: Daemon) -> bool:
    return all(worker.get("ready") for worker in json.loads(daemon.get("/health")[1])["workers"])


def restarted(daemon: Daemon, times: int) -> bool:
    return page(daemon)["gateway_worker_restarts_total"] >= times


def unaccounted(found: dict[str, float]) -> float:
    """Received and in none of the places the page knows."""
    places = sum(found[f"gateway_messages_total:{outcome}"] for outcome in SETTLED)
    known = places + found["gateway_messages_in_flight"] + found[f"{UNKNOWN_FATE}_total"]
    return found["gateway_messages_total:received"] - known


def held_in(kafka: str, topic: str) -> int:
    """How many records a topic holds."""
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": "count"})
    try:
        partitions = consumer.list_topics(topic, timeout=15).topics[topic].partitions
        marks = [consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=15) for number in partitions]
        return sum(high - low for low, high in marks)
    finally:
        consumer.close()


def test_sum_says_of_how_many_messages_of_a_killed_worker_it_does_not_know_the_fate(
    start_daemon: Callable[..., Daemon], kafka: Daemon, frozen_kafka: Callable[[], None]
) -> None:
    daemon = start_daemon(kafka.kafka, workers=2, settings=IMPATIENT)
    wait_for(lambda: f"{UNKNOWN_FATE}_total" in page(daemon), f"{UNKNOWN_FATE}_total is on the page", 5)
    assert page(daemon)[f"{UNKNOWN_FATE}_total"] == 0
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(16)]
        for number, client in enumerate(clients):
            client.upgrade(daemon.token(f"fate-{number}"))
            client.send_binary(TICK)
            client.ping()
        wait_for(lambda: page(daemon)["gateway_messages_total:delivered"] == 16, "some are delivered")
        frozen_kafka()
        for client in clients:
            client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(50)))
            client.ping()
        wait_for(lambda: page(daemon)["gateway_messages_in_flight"] == 800, "the rest is in flight")
        assert unaccounted(page(daemon)) == 0
        victim = sorted(children(daemon.pid))[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: page(daemon)[f"{UNKNOWN_FATE}_total"] > 0, "what it held is of unknown fate")
        assert unaccounted(page(daemon)) == 0
        wait_for(lambda: page(daemon)["gateway_worker_restarts_total"] == 1, "it is noticed")
        kafka.signal(signal.SIGCONT)
        wait_for(lambda: page(daemon)["gateway_messages_in_flight"] == 0, "Kafka takes the other's")
        found = page(daemon)
        assert 0 < found[f"{UNKNOWN_FATE}_total"] < 800
        assert found["gateway_messages_total:received"] == 816
        assert unaccounted(found) == 0
        assert found["gateway_books_imbalance"] == 0


def test_sum_balances_after_workers_were_killed_again_and_again_under_load(
    start_daemon: Callable[..., Daemon], kafka: Daemon
) -> None:
    daemon = start_daemon(kafka.kafka, workers=2, settings=IMPATIENT)
    for kills in (1, 2):
        with ExitStack() as stack:
            clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(8)]
            for number, client in enumerate(clients):
                client.upgrade(daemon.token(f"load-{number}"))
            for client in clients:
                client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(100)))
            for victim in children(daemon.pid):
                os.kill(victim, signal.SIGKILL)
        wait_for(partial(restarted, daemon, 2 * kills), "both are noticed")
        wait_for(
            partial(all_ready, daemon),
            "both are back",
        )
    wait_for(lambda: page(daemon)["gateway_messages_in_flight"] == 0, "all is settled")
    found = page(daemon)
    assert f"{UNKNOWN_FATE}_total" in found
    assert unaccounted(found) == 0
    assert found["gateway_books_imbalance"] == 0


def test_sum_loses_nothing_of_workers_that_end_in_order(start_daemon: Callable[..., Daemon]) -> None:
    """What a worker counts between its last sample and its end is in the sum: it had time to say so."""
    with Daemon(settings={"log.level": "warning"}) as kafka:
        daemon = start_daemon(kafka.kafka, workers=2, settings={**FAST, "drain.grace_s": 0})
        sent = 0
        for ends in (2, 4):
            with ExitStack() as stack:
                clients = [stack.enter_context(RawClient(daemon.url)) for _ in range(4)]
                for client in clients:
                    client.upgrade(daemon.token(f"orderly-{ends}"))
                    client.send_binary(TICK)
                sent += len(clients)
                wait_for(partial(page_says_received, daemon, sent), f"a sample has just been taken: {sent} in all", 20)
                for client in clients:
                    client.sock.sendall(b"".join(frame(0x2, TICK) for _ in range(50)))
                for client in clients:
                    client.ping()
                sent += 50 * len(clients)
            workers = children(daemon.pid)  # with nobody to close they end at once, well before the next sample
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            wait_for(partial(all_ended, workers), "they end")
            wait_for(partial(restarted, daemon, ends), "they are started again")
            wait_for(partial(all_ready, daemon), "and ready")
        assert held_in(kafka.kafka, "tick-data") == sent
        found = page(daemon)
        counted = {name: found[f"gateway_messages_total:{name}"] for name in ("received", "delivered")}
        assert counted == {"received": sent, "delivered": sent}
        assert found[f"{UNKNOWN_FATE}_total"] == 0


# Restricted worlds

SMALL_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$@"', "sh"]


@pytest.mark.parametrize("workers", [1, 2])
def test_figures_of_the_process_are_there_where_proc_shows_processes_only(
    home: Path, kafka: Daemon, namespaces: None, workers: int
) -> None:
    before = time.time()
    with Served(home, kafka.kafka, f"--workers={workers}", prefix=SMALL_PROC, settings=FAST) as served:
        served.wait_ready()
        assert not Path(f"/proc/{served.process.pid}/root/proc/stat").exists()
        if workers > 1:
            wait_for(
                lambda: "gateway_messages_total" in get(served.sidecar + "/metrics")[1], "the workers have been read"
            )
        found = page_of(get(served.sidecar + "/metrics")[1])
        assert found.get("process_resident_memory_bytes", 0) > 10_000_000
        assert 5 < found["process_open_fds"] < 1000
        assert 0 < found["process_cpu_seconds_total"] < 600
        assert before - 5 < found["process_start_time_seconds"] < time.time() + 5
        assert served.stop() == 0


def test_locale_without_a_character_set_changes_nothing(home: Path, kafka: Daemon) -> None:
    with in_plain_ascii(home, kafka, {"LC_ALL": "C", "LANG": None}) as (served, run):
        served.wait_ready()
        with Records(kafka.kafka, "tick-data") as records:
            with RawClient(served.url) as client:
                client.upgrade(served.token("ünder-ß"))
                client.send_binary(TICK)
                records.take(1, key="ünder-ß")
            assert run("check-config", str(served.config)).returncode == 0
            ticks = served.home / "Kurse.csv"
            streamed = run("stream", str(ticks), "--url", served.url, "--token", served.token("gold"))
            assert streamed.returncode == 0, streamed
            (record,) = records.take(1, key="gold")
            assert "Gold€".encode() in (record.value() or b"")
        assert served.stop() == 0
        assert "Traceback" not in served.log()


def test_locale_of_ascii_only_works_or_one_line_says_what_does_not(home: Path, kafka: Daemon) -> None:
    """Python does not help itself to UTF-8 here: names of files cannot be written as they are in the settings."""
    environment: dict[str, str | None] = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with in_plain_ascii(home, kafka, environment) as (served, run):
        wait_for(lambda: served.process.poll() is not None or "gateway: ready" in served.said(), "ready, or one line")
        if served.process.poll() is None:
            served.exchange()
            assert served.stop() == 0
        else:
            check_faults(served.wait(), served.log())
        done = [
            run("check-config", str(served.config)),
            run("stream", str(served.home / "Kurse.csv"), "--url", "ws://127.0.0.1:1/x", "--token", "t"),
        ]
        for one in done:
            if one.returncode:
                check_faults(one.returncode, one.stderr.decode("utf-8", "replace"))


@contextmanager
def in_plain_ascii(
    home: Path, kafka: Daemon, environment: dict[str, str | None]
) -> Iterator[tuple[Served, Callable[..., subprocess.CompletedProcess[bytes]]]]:
    """A daemon whose names are not ASCII, a tick file likewise, and what runs other commands in the same locale."""
    strange = home / "Zürich €"
    strange.mkdir()
    (strange / "Kurse.csv").write_text("time_msc,symbol,bid,ask,volume\n1,Gold€,1.1,1.2,0\n", encoding="utf-8")
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "gateway", *arguments]
        # a stream that nobody takes is tried again for ever: it is ended, and says nothing
        try:
            return subprocess.run(command, capture_output=True, check=False, timeout=10, env=variables)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 0)

    settings = {**FAST, "spool.directory": "Späne", 'kafka.properties."client.id"': "Zürich €"}
    with Served(strange, kafka.kafka, settings=settings, environment=environment) as served:
        yield served, run


@pytest.mark.parametrize(("level", "workers"), [("1", 2), ("2", 1)])
def test_python_without_assertions_serves_the_same(home: Path, kafka: Daemon, level: str, workers: int) -> None:
    environment: dict[str, str | None] = {"PYTHONOPTIMIZE": level}
    settings = {**FAST, "kafka.bootstrap_servers": kafka.kafka}
    with Served(home, None, f"--workers={workers}", settings=settings, environment=environment) as served:
        served.wait_ready()
        served.exchange()
        assert served.stop() == 0
        stopped = served.stopped()
        assert (sum(books["received"] for books in stopped), sum(books["delivered"] for books in stopped)) == (1, 1)
    help_text = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONOPTIMIZE": level},
    )
    assert help_text.returncode == 0, help_text
    assert "--workers" in help_text.stdout


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [([], 1), (["--set=listen.max_connections=8"], 1), (["--set=listen.max_connections=8"], 2)],
    ids=["defaults", "few connections", "workers"],
)
def test_sixty_four_descriptors_are_enough_or_one_line_says_what_to_do(
    home: Path, kafka: Daemon, arguments: list[str], workers: int
) -> None:
    prefix = ["prlimit", "--nofile=64:64"]
    with Served(home, kafka.kafka, f"--workers={workers}", *arguments, prefix=prefix, settings=FAST) as served:
        wait_for(
            lambda: (
                served.process.poll() is not None
                or "gateway: ready" in served.said()
                or served.log().count("worker ended") > 3
            ),
            "ready, or one line",
        )
        if served.process.poll() is None:
            assert "gateway: ready" in served.said(), served.log()
            served.exchange()
            assert served.stop() == 0
        else:
            (line,) = check_faults(served.wait(), served.log())
            assert not re.search(r"\s-\d", line), f"nobody can set that: {line}"


def test_client_commands_need_few_descriptors(daemon: Daemon, home: Path) -> None:
    (home / "ticks.csv").write_text("time_msc,symbol,bid,ask,volume\n1,EURUSD,1.1,1.2,0\n")
    done = subprocess.run(
        [
            *("prlimit", "--nofile=64:64", sys.executable, "-m", "gateway", "stream", str(home / "ticks.csv")),
            *("--url", daemon.url, "--token", daemon.token("few")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    assert done.returncode == 0, done


NO_TMP = """
mount --bind "$HOME_OF_IT" "$HOME_OF_IT" && mount --rbind /tmp /tmp && mount -o remount,bind,ro /tmp &&
mount --rbind /var/tmp /var/tmp && mount -o remount,bind,ro /var/tmp && cd /proc &&
! touch /tmp/probe 2>/dev/null && touch "$HOME_OF_IT/probe" && exec "$@"
"""
READ_ONLY_ROOT = """
mount --bind "$HOME_OF_IT" "$HOME_OF_IT" && mount -o remount,bind,ro / &&
{ ! mountpoint -q /dev/shm || mount -o remount,bind,ro /dev/shm; } && cd / &&
! touch /tmp/probe 2>/dev/null && touch "$HOME_OF_IT/probe" && exec "$@"
"""


@pytest.mark.parametrize(("world", "workers"), [(NO_TMP, 1), (READ_ONLY_ROOT, 2)], ids=["no /tmp", "read-only root"])
def test_daemon_needs_no_place_to_write_but_its_own(
    home: Path, kafka: Daemon, namespaces: None, world: str, workers: int
) -> None:
    environment: dict[str, str | None] = {"HOME_OF_IT": str(home), "TMPDIR": None}
    prefix = ["unshare", "--mount", "sh", "-c", world, "sh"]
    with Served(
        home, kafka.kafka, f"--workers={workers}", prefix=prefix, environment=environment, settings=FAST
    ) as served:
        served.wait_ready()
        served.exchange()
        assert served.stop() == 0
        assert "Traceback" not in served.log()


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--clients", "1", "--seconds", "1"],
        ["serve", "--embedded-kafka", "--port", "0", "--sidecar-port", "0"],
        ["serve", "--config", "gateway.toml", "--set", "spool.directory=/tmp/spool-that-cannot-be"],
    ],
    ids=["demo", "development secret", "spool"],
)
def test_command_that_has_no_place_to_write_says_so_in_one_line(
    home: Path, namespaces: None, command: list[str]
) -> None:
    (home / "secret").write_text(secrets.token_urlsafe(48))
    (home / "gateway.toml").write_text('auth.secret_file = "secret"\nlisten.port = 0\nsidecar.port = 0\n')
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "XDG_STATE_HOME")}
    environment |= {"HOME_OF_IT": str(home), "HOME": "/proc/no-home", "TEMP": "/proc", "TMP": "/proc"}
    arguments = [str(home / word) if word == "gateway.toml" else word for word in command]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY_ROOT, "sh", sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    check_faults(done.returncode, done.stderr)


CLOCK = """
import datetime, os, time

_time, _time_ns, _gettime = time.time, time.time_ns, time.clock_gettime


def _offset():
    try:
        with open(os.environ["CLOCK_OFFSET"]) as file:
            return int(file.read())
    except OSError:
        return 0


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)


time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 1_000_000_000
time.clock_gettime = lambda clock: _gettime(clock) + (_offset() if clock == time.CLOCK_REALTIME else 0)
datetime.datetime = _Datetime
"""
"""A wall clock that a file puts forward or back while the process runs."""


class Clock:
    """Puts a daemon's wall clock forward or back."""

    def __init__(self, home: Path) -> None:
        self._file = home / "offset"
        self.environment = {"PYTHONPATH": run_first(home, CLOCK), "CLOCK_OFFSET": str(self._file)}

    def jump(self, hours: float) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(str(int(hours * 3600)))
        new.replace(self._file)


def test_token_ends_by_the_wall_clock_and_nothing_else_does_when_it_jumps_ahead(
    start_daemon: Callable[..., Daemon], kafka: Daemon, home: Path
) -> None:
    clock = Clock(home)
    daemon = start_daemon(
        kafka.kafka,
        environment=clock.environment,
        settings={
            **FAST,
            "session.ping_interval_s": 30,
            "session.idle_timeout_s": 120,
            "listen.handshake_timeout_s": 120,
        },
    )
    with RawClient(daemon.url) as brief, RawClient(daemon.url) as lasting, RawClient(daemon.url) as half:
        brief.upgrade(daemon.token("brief", ttl_s=3600))
        lasting.upgrade(daemon.token("lasting", ttl_s=86_400))
        half.sock.sendall(f"GET {half.path} HTTP/1.1\r\n".encode())
        clock.jump(+2)
        assert brief.read_close()[0] == 4401
        lasting.ping()
        rest = "".join(f"{name}: {value}\r\n" for name, value in half.headers(daemon.token("half", ttl_s=86_400)))
        half.sock.sendall(f"{rest}\r\n".encode())
        assert half.read_response().status == 101
        with RawClient(daemon.url) as late:
            assert late.request(late.headers(daemon.token("late", ttl_s=3600))).status == 401
        lasting.send_binary(TICK)
        lasting.ping()
    wait_for(lambda: page(daemon)["gateway_messages_total:delivered"] == 1, "the figures go on")
    assert daemon.stop() == 0


def test_timeouts_and_rates_go_on_when_the_wall_clock_is_put_back(
    start_daemon: Callable[..., Daemon], kafka: Daemon, home: Path
) -> None:
    clock = Clock(home)
    daemon = start_daemon(
        kafka.kafka,
        environment=clock.environment,
        settings={
            **FAST,
            "session.ping_interval_s": 1,
            "session.idle_timeout_s": 3,
            "listen.handshake_timeout_s": 3,
            "listen.handshakes_per_address_per_s": 0.5,
            "listen.handshakes_per_address_burst": 3,
        },
    )

    def attempt() -> int:
        with RawClient(daemon.url, source="127.0.0.7") as client:
            return client.request(client.headers(daemon.token())).status

    with RawClient(daemon.url) as silent, RawClient(daemon.url) as idle:
        idle.upgrade(daemon.token("idle"))
        idle.send_binary(TICK)
        wait_for(lambda: attempt() == 429, "the rate is used up")
        clock.jump(-5)
        began = time.monotonic()
        assert silent.read_response().status == 408
        assert idle.read_close()[0] == 4408
        assert time.monotonic() - began < 12
    wait_for(lambda: attempt() != 429, "the rate is given back", 15)
    wait_for(lambda: page(daemon)["gateway_messages_total:delivered"] == 1, "the figures go on")
    clock.jump(0)
    wait_for(lambda: attempt() == 101, "and who comes with a good token is let in", 15)
    assert daemon.get("/health/ready")[0] == 200
    assert daemon.stop() == 0
