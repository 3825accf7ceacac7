"""``gateway serve --workers N``: one parent that starts, watches and drains N gateways on one port.

The parent binds the port without listening, which keeps it for the workers (SO_REUSEPORT, socket(7)); the kernel
spreads connections over those that listen. It reads no client's bytes. Its sidecar adds up its workers': they have one
each, on a free port of loopback.

A worker that ends without having been told to, or whose sidecar has been silent for `HUNG_S`, is started again, after a
pause that grows while that repeats; its connections are lost, nobody else's. One that fails before it has listened for
the first time stops the start: its fault would be there again. SIGTERM and SIGHUP go to all workers; a worker ends with
its parent, whatever ends that, and is killed when it has not ended some seconds after `drain.timeout_s`.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from trio_util import AsyncValue

from gateway import config
from gateway.daemon import systemd
from gateway.daemon.orders import Orders
from gateway.daemon.signals import SIGNALS, waiting_signals
from gateway.errors import GatewayError, NoThread, StartupError
from gateway.ops import aggregate, serve
from gateway.ops.asgi import Sidecar
from gateway.telemetry.logging import RateLimited
from gateway.threads import in_thread
from gateway.ws.sockets import in_url, open_listening_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.config import Settings
    from gateway.telemetry.logging import Log

SCRAPE_S: Final = 1.0
"""Between readings of the workers' metrics: what a worker that dies counted since the last one is lost to the sum."""
ANNOUNCE_POLL_S: Final = 0.02
SCRAPE_TIMEOUT_S: Final = 2.0
FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 30.0
LONG_LIFE_S: Final = 60.0
"""A worker that lived this long starts its pauses from the beginning."""
SILENT_S: Final = 10.0
"""A worker whose sidecar has not answered for this long does not count as ready."""
HUNG_S: Final = 30.0
"""One that has not for this long is killed and started again, as systemd's watchdog does with a single gateway."""
START_S: Final = 120.0
"""How long a worker may take from its start to its sidecar: a second or two, more on a machine that is very busy."""
DRAIN_MARGIN_S: Final = 5.0
"""How long after `drain.timeout_s` a worker that is draining may take to be gone before it is killed."""
PARENT_POLL_S: Final = 1.0
"""Between looks at the parent where the system has no pidfd (Linux 5.3; some sandboxes forbid it)."""
KILLED_S: Final = 5.0
"""How long a killed worker may take to be gone."""

_loopback: Final = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


async def end_with_parent(parent: int) -> None:
    """In a worker: drain, as on SIGTERM, when the parent has ended. Raises StartupError when it is gone already.

    Not by PR_SET_PDEATHSIG, which tells the end of the thread that forked (prctl(2)), and Trio forks in a thread.
    """
    try:
        ended = os.pidfd_open(parent)
    except ProcessLookupError:
        raise StartupError("the parent of this worker is gone") from None
    except (AttributeError, OSError):
        while os.getppid() == parent:  # noqa: ASYNC110  # nothing tells it here
            await trio.sleep(PARENT_POLL_S)
    else:
        try:
            if os.getppid() == parent:
                await trio.lowlevel.wait_readable(ended)  # pidfd_open(2): readable when the process has terminated
        finally:
            os.close(ended)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Worker:
    """One place for a process, and the process that holds it."""

    number: int
    process: trio.Process | None = None
    sidecar: str = ""
    """Its sidecar's address, once it has said it: from then on it handles signals."""
    ready: bool = False
    reload: bool = False
    """It has not said yet that it took the settings of the last SIGHUP."""
    starts: int = 0
    faults: list[str] = field(default_factory=list)
    """Why it does not start, in its own words."""
    started_at: float = 0.0
    heard_at: float = 0.0
    """When its sidecar last answered, in Trio's seconds."""
    pause_s: float = FIRST_PAUSE_S
    page: aggregate.Page = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    """What its sidecar said last."""
    complete: bool = False
    """``page`` is what it counted by its end."""


class Supervisor:
    """The parent. `run` is its whole life; afterwards ``failed`` says whether a worker ended badly in the drain."""

    def __init__(
        self,
        settings: Settings,
        count: int,
        command: Sequence[str],
        log: Log,
        *,
        version: str,
        say: Callable[[str], None],
        orders: Orders = Orders(),  # noqa: B008  # frozen
        load: Callable[[], Settings] | None = None,
    ) -> None:
        """``command`` starts one worker, which gets ``orders`` with settings of its own; ``load`` reads them again."""
        self._settings = settings
        self._orders = orders
        self._load = load
        self._starting: AsyncValue[str] = AsyncValue("starting")
        self._candidate: Settings | None = None
        """Settings that no worker has taken yet."""
        self._unknown_fate = 0
        self._blind_s = 0.0
        self._past: dict[str, int] = {}
        self._command = list(command)
        self._log = log
        self._version = version
        self._say = say
        self._workers = [Worker(number) for number in range(count)]
        self._sum = aggregate.Sum()
        self._restarts = 0
        self._port = 0
        self._drain = trio.Event()
        self._all_ready = trio.Event()
        self._news = trio.Event()
        self.failed = False

    async def run(self) -> None:
        """Serve until the workers have been drained. Raises StartupError when a port or a worker cannot be had."""
        settings = self._settings
        listen = settings.listen
        places = open_listening_sockets("listen", listen.host, listen.port, backlog=0, reuse_port=True, listening=False)
        with ExitStack() as stack:
            for place in places:
                stack.callback(place.close)
            self._port = places[0].getsockname()[1]
            sidecar = serve.open_sockets(settings.sidecar.host, settings.sidecar.port)
            limited = RateLimited(self._log.error, trio.current_time)
            for warning in config.warnings(settings):
                self._log.warning("settings", warning=warning)
            self._warn_of_orphans()
            async with trio.open_nursery() as services:
                await services.start(self._handle_signals)
                port: int = await services.start(serve.run, self._sidecar_app(), sidecar, limited)
                services.start_soon(systemd.feed_watchdog)
                services.start_soon(systemd.extend_start, self._starting)
                services.start_soon(self._scrape)
                services.start_soon(self._kill_late)
                scheme = "ws" if settings.tls.cert_file is None else "wss"
                self._say(f"listening on {scheme}://{in_url(listen.host)}:{self._port}{listen.path}")
                self._say(f"sidecar on http://{in_url(settings.sidecar.host)}:{port}")
                self._say(f"kafka at {settings.kafka.bootstrap_servers}")
                services.start_soon(self._announce)
                async with trio.open_nursery() as workers:
                    for worker in self._workers:
                        workers.start_soon(self._keep, worker)
                services.cancel_scope.cancel()
        faults = dict.fromkeys(fault for worker in self._workers for fault in worker.faults)
        if faults:
            raise StartupError("\n".join(faults))

    async def _announce(self) -> None:
        await self._all_ready.wait()
        while self._reasons():  # noqa: ASYNC110  # what is announced is what the sidecar says
            await trio.sleep(ANNOUNCE_POLL_S)
        self._starting.value = "ready"
        systemd.notify("READY=1", f"STATUS={len(self._workers)} workers ready")
        self._say("ready")

    async def _keep(self, worker: Worker) -> None:
        """Keep one place filled until the drain."""
        while not self._drain.is_set():
            status = await self._live(worker)
            if isinstance(status, int) and status > 0 and worker.starts == 1 and not worker.sidecar:
                worker.faults = worker.faults or [f"worker {worker.number} ended with status {status}"]
                self._begin_drain()
                return
            faults, worker.faults = worker.faults, []
            if self._drain.is_set():
                self.failed = self.failed or (status != 0 and worker.sidecar != "")  # it had nothing to drain before
                self._forget(worker)
                return
            self._forget(worker)
            self._restarts += 1
            if trio.current_time() - worker.started_at >= LONG_LIFE_S:
                worker.pause_s = FIRST_PAUSE_S
            pause_s, worker.pause_s = worker.pause_s, min(MAX_PAUSE_S, worker.pause_s * 2)
            why = {"faults": faults} if faults else {}
            self._log.error("worker ended", worker=worker.number, status=status, started_again_after_s=pause_s, **why)
            with trio.move_on_after(pause_s):
                await self._drain.wait()

    def _forget(self, worker: Worker) -> None:
        """What a process said is its own, not its successor's; what it counted stays in the sum.

        Of one that was killed only the last sample is known: what was in flight then has an unknown fate, and what it
        counted since is not in the sum.
        """
        self._sum.retire(worker.page)
        if worker.sidecar and not worker.complete:
            self._blind_s += trio.current_time() - worker.heard_at
        self._unknown_fate += int(aggregate.value(worker.page, "gateway_messages_in_flight"))
        for name, value in worker.health.get("messages", {}).items():
            name = "unknown_fate" if name == "in_flight" else name
            self._past[name] = self._past.get(name, 0) + value
        worker.page, worker.health, worker.process, worker.complete = {}, {}, None, False
        worker.sidecar, worker.ready = "", False

    async def _live(self, worker: Worker) -> int | str:
        """Start a worker and wait for its end; its exit status, negative for a signal, or why it did not start."""
        worker.started_at = trio.current_time()
        environment = {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}
        try:
            # A group of its own: a terminal's Ctrl-C is for the parent, which tells the workers once.
            process = await trio.lowlevel.open_process(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
            )
        except (OSError, RuntimeError) as error:  # no memory, no process, no thread or no file for the moment
            return str(error)
        worker.starts += 1
        worker.process = process
        if self._drain.is_set():  # it was asked for before there was a process to tell
            process.send_signal(signal.SIGTERM)
        try:
            await self._order(worker, process)
            await self._listen_to(worker, process)
            return await process.wait()
        except BaseException:
            process.terminate()  # the parent fails; the worker may drain
            with trio.move_on_after(self._settings.drain.timeout_s + DRAIN_MARGIN_S, shield=True):
                await process.wait()
            if process.returncode is None:
                process.kill()
                with trio.move_on_after(KILLED_S, shield=True):
                    await process.wait()
            raise

    async def _order(self, worker: Worker, process: trio.Process) -> None:
        """Tell a worker what to do."""
        own: dict[str, Any] = {
            "listen.port": self._port,
            "listen.reuse_port": True,
            "sidecar.host": "127.0.0.1",
            "sidecar.port": 0,
            "kafka.bootstrap_servers": self._settings.kafka.bootstrap_servers,
        }
        if self._settings.spool.directory is not None:
            own["spool.directory"] = str(self._spool_of(worker.number).absolute())
        orders = replace(
            self._orders,
            flags={**self._orders.flags, **own},
            settings=_with(config.dump(self._settings), own),
            parent=os.getpid(),
        )
        assert process.stdin is not None  # noqa: S101  # it was asked for
        async with process.stdin as stdin:
            try:
                await stdin.send_all(orders.encode())
            except trio.BrokenResourceError:
                return  # it has ended already, and says why

    def _spool_of(self, number: int) -> Path:
        return Path(self._settings.spool.directory or "") / f"worker-{number}"

    def _warn_of_orphans(self) -> None:
        """Segments of another number of workers: nobody sends them."""
        directory = self._settings.spool.directory
        if directory is None:
            return
        own = {self._spool_of(worker.number) for worker in self._workers}
        segments = (*Path(directory).glob("*.spool"), *Path(directory).glob("worker-*/*.spool"))
        for orphan in sorted({path.parent for path in segments} - own):
            self._log.error(
                "a spool that no worker sends",
                directory=str(orphan),
                remedy="gateway spool replay --config FILE --directory DIR, or as many workers as before",
            )

    async def _listen_to(self, worker: Worker, process: trio.Process) -> None:
        """Read what a worker says until it closes its standard output."""
        assert process.stdout is not None  # noqa: S101  # it was asked for
        said = b""
        async with process.stdout as stdout:
            async for data in stdout:
                said += data
                *lines, said = said.split(b"\n")
                for line in lines:
                    self._heard(worker, line.decode(errors="replace").removeprefix("gateway: "))

    def _heard(self, worker: Worker, line: str) -> None:
        if line.startswith("fault: "):
            worker.faults.append(line.removeprefix("fault: "))
        elif line.startswith("counted: "):
            worker.page = aggregate.parse(json.loads(line.removeprefix("counted: ")))
            worker.complete = True
        elif line.startswith("sidecar on "):
            worker.sidecar = line.removeprefix("sidecar on ")
            worker.heard_at = trio.current_time()
            if worker.reload and worker.process is not None:
                worker.process.send_signal(signal.SIGHUP)
        elif line == "reloaded":
            worker.reload = False
            self._settings, self._candidate = self._candidate or self._settings, None
        elif line == "ready":
            worker.ready = True
            self._log.info("worker ready", worker=worker.number)
            self._news.set()
            if all(one.ready for one in self._workers):
                self._all_ready.set()

    async def _handle_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            for number in waiting_signals():
                self._act(number)
            async for number in signals:
                self._act(number)

    def _act(self, number: int) -> None:
        if number != signal.SIGHUP:
            self._begin_drain()
            return
        self._reload()
        for worker in self._workers:
            worker.reload = True  # until it has done so: it may be ending, and its successor is told then
            if worker.process is not None and worker.sidecar:
                worker.process.send_signal(signal.SIGHUP)

    def _begin_drain(self) -> None:
        """Let all workers drain; called again, each cuts its drain short."""
        if not self._drain.is_set():
            self._drain.set()
            self._starting.value = "draining"
            timeout_s = self._settings.drain.timeout_s + DRAIN_MARGIN_S + KILLED_S
            systemd.notify("STOPPING=1", "STATUS=draining", systemd.extension(timeout_s))
            self._log.info("draining", workers=len(self._workers))
        for worker in self._workers:
            if worker.process is not None:
                worker.process.send_signal(signal.SIGTERM)

    def _reload(self) -> None:
        """Read the settings again, for workers that are started from now on, once a worker has taken them.

        The workers that run read them for themselves, and say what they think of them; so a fault changes nothing.
        """
        self._candidate = None
        if self._load is None:
            return
        try:
            settings = self._load()
        except GatewayError as error:
            self._log.error("reload failed, the old settings stay", faults=str(error).splitlines())
            return
        except Exception as error:  # no file may end a daemon that runs
            self._log.error("reload failed, the old settings stay", exc_info=error)
            return
        update = {name: getattr(settings, name) for name in ("routes", "auth", "tls", "log")}
        self._candidate = self._settings.model_copy(update=update)
        if not any(worker.process for worker in self._workers):  # nobody runs who could judge them
            self._settings, self._candidate = self._candidate, None

    async def _kill_late(self) -> None:
        """Kill the workers that are still there when a drain must be over."""
        await self._drain.wait()
        await trio.sleep(self._settings.drain.timeout_s + DRAIN_MARGIN_S)
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                self._log.error("worker did not end in time, killed", worker=worker.number)
                worker.process.kill()

    # The sidecar

    async def _scrape(self) -> None:
        """Read the workers' sidecars until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                for worker in self._workers:
                    if worker.process is not None and worker.sidecar:
                        nursery.start_soon(self._read, worker, worker.process)
            self._kill_hung()
            with trio.move_on_after(SCRAPE_S):
                await self._news.wait()
            self._news = trio.Event()

    async def _read(self, worker: Worker, process: trio.Process) -> None:
        try:
            health, page = await in_thread(_fetch, worker.sidecar, abandon_on_cancel=True)
        except NoThread:
            worker.heard_at = trio.current_time()  # this process cannot ask: nobody is to be killed for that
            return
        except (OSError, ValueError, http.client.HTTPException):
            return  # it is starting or ending; what it said last counts
        if worker.process is process and not worker.complete:
            worker.health, worker.page, worker.heard_at = health, page, trio.current_time()

    def _kill_hung(self) -> None:
        for worker in self._workers:
            if worker.process is None or self._drain.is_set():
                continue
            heard_at, patience_s = (worker.heard_at, HUNG_S) if worker.sidecar else (worker.started_at, START_S)
            silent_s = trio.current_time() - heard_at
            if silent_s >= SILENT_S and worker.health.get("ready"):
                worker.health = {**worker.health, "ready": False, "reasons": ["does not answer"]}
            if silent_s >= patience_s:
                self._log.error("worker hangs, killed", worker=worker.number, silent_s=round(silent_s))
                worker.process.kill()

    def _reasons(self) -> list[str]:
        """Ready while one worker is: the others refuse with 503, and clients come again."""
        if any(worker.health.get("ready") for worker in self._workers):
            return []
        return [
            f"worker {worker.number}: {reason}"
            for worker in self._workers
            for reason in worker.health.get("reasons", ["not started"])
        ]

    def _details(self) -> dict[str, Any]:
        sums = dict(self._past)
        for worker in self._workers:
            for name, value in worker.health.get("messages", {}).items():
                sums[name] = sums.get(name, 0) + value
        return {
            "connections": sum(worker.health.get("connections", 0) for worker in self._workers),
            "messages": sums,
            "workers": [
                {
                    "worker": worker.number,
                    "pid": worker.process.pid if worker.process is not None else None,
                    "sidecar": worker.sidecar,
                    **worker.health,
                }
                for worker in self._workers
            ],
            "restarts": self._restarts,
            "version": self._version,
        }

    def _metrics(self) -> bytes:
        running = sum(worker.process is not None for worker in self._workers)
        own = (
            ("gateway_workers", "gauge", "Worker processes that run.", float(running)),
            ("gateway_worker_restarts", "counter", "Workers started again.", float(self._restarts)),
            (
                "gateway_messages_unknown_fate",
                "counter",
                "In flight in a worker when it was last heard of before it was killed.",
                float(self._unknown_fate),
            ),
            (
                "gateway_worker_unsampled_seconds",
                "counter",
                "Between killed workers' last samples and their ends: what they counted then is not in the sum.",
                self._blind_s,
            ),
        )
        return self._sum.text((worker.page for worker in self._workers), own)

    def _sidecar_app(self) -> Sidecar:
        return Sidecar(
            reasons=self._reasons,
            details=self._details,
            metrics=self._metrics,
            version={"gateway": self._version, "python": sys.version.split()[0]},
        )


def _with(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Dumped settings with dotted ones over them."""
    found = {section: dict(values) for section, values in settings.items()}
    for name, value in own.items():
        section, _, key = name.partition(".")
        found[section][key] = value
    return found


def _fetch(sidecar: str) -> tuple[dict[str, Any], aggregate.Page]:
    """A worker's /health and /metrics. Raises OSError, ValueError and HTTPException."""
    try:
        with _loopback(f"{sidecar}/health", timeout=SCRAPE_TIMEOUT_S) as answer:
            health = answer.read()
    except urllib.error.HTTPError as error:  # 503 is an answer too
        with error:
            health = error.read()
    with _loopback(f"{sidecar}/metrics", timeout=SCRAPE_TIMEOUT_S) as answer:
        page = answer.read()
    return json.loads(health), aggregate.parse(page.decode())
