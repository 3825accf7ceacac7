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
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from trio_util import AsyncValue

from gateway import config
from gateway.daemon import systemd
from gateway.daemon.announce import Addresses, Announcer
from gateway.daemon.host import Host
from gateway.daemon.orders import Orders
from gateway.daemon.signals import SIGNALS, waiting_signals
from gateway.daemon.worker import KILLED_S, Worker
from gateway.errors import GatewayError, NoThread, StartupError
from gateway.ops import aggregate, serve
from gateway.ops.probe import fetch
from gateway.registry import host
from gateway.telemetry.logging import RateLimited
from gateway.threads import in_thread
from gateway.ws.sockets import in_url, open_listening_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.config import Settings
    from gateway.telemetry.logging import Log

# long: a parent's whole life; one place for a process is in `worker`, what is said of all in `host`

SCRAPE_S: Final = 1.0
"""Between readings of the workers' metrics: what a worker that dies counted since the last one is lost to the sum."""
ANNOUNCE_POLL_S: Final = 0.02
SCRAPE_TIMEOUT_S: Final = 2.0
SILENT_S: Final = 10.0
"""A worker whose sidecar has not answered for this long does not count as ready."""
HUNG_S: Final = 30.0
"""One that has not for this long is killed and started again, as systemd's watchdog does with a single gateway."""
START_S: Final = 120.0
"""How long a worker may take from its start to its sidecar: a second or two, more on a machine that is very busy."""
DRAIN_MARGIN_S: Final = 5.0
"""How long after `drain.timeout_s` a worker that is draining may take to be gone before it is killed."""


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
        announcer: Announcer,
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
        self._command = list(command)
        self._log = log
        self._announcer = announcer
        self._workers = [Worker(number) for number in range(count)]
        self.host = Host(self._workers, version)
        """What is said of all workers together."""
        self._port = 0
        self._places = ""
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
            sidecar = open_listening_sockets(
                "sidecar",
                settings.sidecar.host,
                settings.sidecar.port,
                backlog=serve.BACKLOG,
                prepare=serve.prepare,
            )
            for warning in config.warnings(settings):
                self._log.warning("settings", warning=warning)
            self._warn_of_orphans()
            await self._serve(sidecar)
        faults = dict.fromkeys(fault for worker in self._workers for fault in worker.faults)
        if faults:
            raise StartupError("\n".join(faults))

    async def _serve(self, sidecar: list[socket.socket]) -> None:
        """Keep the workers, and everything around them, until they have been drained."""
        settings, listen = self._settings, self._settings.listen
        limited = RateLimited(self._log.error, trio.current_time)
        async with trio.open_nursery() as services:
            await services.start(self._handle_signals)
            port: int = await services.start(serve.run, self.host.sidecar(), sidecar, limited)
            services.start_soon(systemd.feed_watchdog)
            services.start_soon(systemd.extend_start, self._starting)
            self._places = await services.start(host.run)
            services.start_soon(self._scrape)
            services.start_soon(self._kill_late)
            scheme = "ws" if settings.tls.cert_file is None else "wss"
            self._announcer.listening(
                Addresses(
                    listen=f"{scheme}://{in_url(listen.host)}:{self._port}{listen.path}",
                    sidecar=f"http://{in_url(settings.sidecar.host)}:{port}",
                    kafka=settings.kafka.bootstrap_servers,
                ),
                {},
            )
            services.start_soon(self._announce)
            async with trio.open_nursery() as workers:
                for worker in self._workers:
                    workers.start_soon(self._keep, worker)
            services.cancel_scope.cancel()

    async def _announce(self) -> None:
        await self._all_ready.wait()
        while self.host.reasons():  # noqa: ASYNC110  # what is announced is what the sidecar says
            await trio.sleep(ANNOUNCE_POLL_S)
        self._starting.value = "ready"
        systemd.notify("READY=1", f"STATUS={len(self._workers)} workers ready")
        self._announcer.ready()

    async def _keep(self, worker: Worker) -> None:
        """Keep one place filled until the drain."""
        while not self._drain.is_set():
            status = await self._live(worker)
            if isinstance(status, int) and status > 0 and worker.starts == 1 and not worker.sidecar:
                if not worker.faults:
                    worker.note_fault(f"worker {worker.number} ended with status {status}")
                self._begin_drain()
                return
            faults = worker.take_faults()
            if self._drain.is_set():
                self.failed = self.failed or (status != 0 and worker.sidecar != "")  # it had nothing to drain before
                self._forget(worker)
                return
            self._forget(worker)
            self.host.note_restart()
            pause_s = worker.next_pause_s()
            why = {"faults": faults} if faults else {}
            self._log.error("worker ended", worker=worker.number, status=status, started_again_after_s=pause_s, **why)
            with trio.move_on_after(pause_s):
                await self._drain.wait()

    def _forget(self, worker: Worker) -> None:
        """What a process said is its own, not its successor's; what it counted stays in the sum."""
        self.host.retire(worker)
        worker.forget()

    async def _live(self, worker: Worker) -> int | str:
        """Start a worker and wait for its end; its exit status, negative for a signal, or why it did not start."""

        def started() -> None:
            if self._drain.is_set():  # it was asked for before there was a process to tell
                worker.signal(signal.SIGTERM)

        return await worker.live(
            self._command,
            self._orders_of(worker).encode(),
            started=started,
            hear=lambda event: self._heard(worker, event),
            drain_s=self._settings.drain.timeout_s + DRAIN_MARGIN_S,
        )

    def _orders_of(self, worker: Worker) -> Orders:
        """What a worker is to do: the parent's settings, with its own over them."""
        own: dict[str, Any] = {
            "listen.port": self._port,
            "listen.reuse_port": True,
            "sidecar.host": "127.0.0.1",
            "sidecar.port": 0,
            "kafka.bootstrap_servers": self._settings.kafka.bootstrap_servers,
        }
        if self._settings.spool.directory is not None:
            own["spool.directory"] = str(self._spool_of(worker.number).absolute())
        return replace(
            self._orders,
            flags={**self._orders.flags, **own},
            settings=_with(config.dump(self._settings), own),
            parent=os.getpid(),
            places=self._places,
        )

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

    def _heard(self, worker: Worker, event: dict[str, Any]) -> None:
        """A worker has announced something (`gateway.daemon.announce`)."""
        what = event["event"]
        if what == "fault":
            worker.note_fault(event["fault"])
        elif what == "counted":
            worker.note_counted(aggregate.parse(event["metrics"]))
        elif what == "listening":
            self.host.learn(event.get("across", {}))
            worker.note_listening(event["sidecar"])
        elif what == "reloaded":
            worker.note_reloaded()
            self._announcer.tell("reloaded")
            self._settings, self._candidate = self._candidate or self._settings, None
        elif what == "ready":
            worker.note_ready()
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
            worker.ask_reload()

    def _begin_drain(self) -> None:
        """Let all workers drain; called again, each cuts its drain short."""
        if not self._drain.is_set():
            self._drain.set()
            self._starting.value = "draining"
            timeout_s = self._settings.drain.timeout_s + DRAIN_MARGIN_S + KILLED_S
            systemd.notify("STOPPING=1", "STATUS=draining", systemd.extension(timeout_s))
            self._log.info("draining", workers=len(self._workers))
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

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
        self._candidate = config.with_live(self._settings, settings)
        if not any(worker.process for worker in self._workers):  # nobody runs who could judge them
            self._settings, self._candidate = self._candidate, None

    async def _kill_late(self) -> None:
        """Kill the workers that are still there when a drain must be over."""
        await self._drain.wait()
        await trio.sleep(self._settings.drain.timeout_s + DRAIN_MARGIN_S)
        for worker in self._workers:
            if worker.kill_late():
                self._log.error("worker did not end in time, killed", worker=worker.number)

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
            worker.note_alive()  # this process cannot ask: nobody is to be killed for that
            return
        except (OSError, ValueError, http.client.HTTPException):
            return  # it is starting or ending; what it said last counts
        if worker.process is process:
            worker.note_sample(health, page)

    def _kill_hung(self) -> None:
        for worker in self._workers:
            if worker.process is None or self._drain.is_set():
                continue
            heard_at, patience_s = (worker.heard_at, HUNG_S) if worker.sidecar else (worker.started_at, START_S)
            silent_s = trio.current_time() - heard_at
            if silent_s >= SILENT_S and worker.health.get("ready"):
                worker.note_silent()
            if silent_s >= patience_s:
                self._log.error("worker hangs, killed", worker=worker.number, silent_s=round(silent_s))
                worker.process.kill()


def _with(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Dumped settings with dotted ones over them."""
    found = {section: dict(values) for section, values in settings.items()}
    for name, value in own.items():
        section, _, key = name.partition(".")
        found[section][key] = value
    return found


def _fetch(sidecar: str) -> tuple[dict[str, Any], aggregate.Page]:
    """A worker's /health and /metrics. Raises OSError, ValueError and HTTPException."""
    _, health = fetch(f"{sidecar}/health", SCRAPE_TIMEOUT_S)
    status, page = fetch(f"{sidecar}/metrics", SCRAPE_TIMEOUT_S)
    if status != 200:
        raise ValueError(f"/metrics answered {status}")
    return json.loads(health), aggregate.parse(page.decode())
