"""One place for a worker process: what it is told, what it says, and what it last counted."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.core.backoff import Doubling
from gateway.daemon import systemd
from gateway.daemon.announce import read_event
from gateway.errors import StartupError
from gateway.ops import aggregate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 30.0
LONG_LIFE_S: Final = 60.0
"""A worker that lived this long starts its pauses from the beginning."""
KILLED_S: Final = 5.0
"""How long a killed worker may take to be gone."""
PARENT_POLL_S: Final = 1.0
"""Between looks at the parent where the system has no pidfd (Linux 5.3; some sandboxes forbid it)."""


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


class Worker:
    """One place, and the process that holds it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: trio.Process | None = None
        self.sidecar = ""
        """Its sidecar's address, once it has said it: from then on it handles signals."""
        self.ready = False
        self.reload = False
        """It has not said yet that it took the settings of the last SIGHUP."""
        self.starts = 0
        self.faults: list[str] = []
        """Why it does not start, in its own words."""
        self.started_at = 0.0
        self.heard_at = 0.0
        """When its sidecar last answered, in Trio's seconds."""
        self.page: aggregate.Page = {}
        self.health: dict[str, Any] = {}
        """What its sidecar said last."""
        self.complete = False
        """``page`` is what it counted by its end."""
        self._pauses = Doubling(FIRST_PAUSE_S, MAX_PAUSE_S)

    async def live(
        self,
        command: Sequence[str],
        orders: bytes,
        *,
        started: Callable[[], None],
        hear: Callable[[dict[str, Any]], None],
        drain_s: float,
    ) -> int | str:
        """Start a process, give it ``orders`` on its standard input, and let ``hear`` know what it announces.

        Returns its exit status, negative for a signal, or why there is no process: the system gives none, no thread or
        no file for the moment. ``started`` is called once there is one. Cancelled, it lets the process drain for
        ``drain_s``, then kills it.
        """
        self.started_at = trio.current_time()
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            return str(error)
        async with trio.lowlevel.FdStream(reading) as announced:
            try:
                process = await _open(command, writing)
            except (OSError, RuntimeError) as error:
                return str(error)
            finally:
                os.close(writing)
            self.starts += 1
            self.process = process
            started()
            try:
                await _send(process, orders)
                said = b""
                async for data in announced:
                    said += data
                    *lines, said = said.split(b"\n")
                    for line in lines:
                        hear(read_event(line))
                return await process.wait()
            except BaseException:
                with trio.move_on_after(drain_s + 2 * KILLED_S, shield=True):
                    await _end(process, drain_s)
                raise

    # What it says

    def note_listening(self, sidecar: str) -> None:
        """It listens, and handles signals from now on; a reload that it missed is asked for again."""
        self.sidecar = sidecar
        self.heard_at = trio.current_time()
        if self.reload:
            self.signal(signal.SIGHUP)

    def note_ready(self) -> None:
        """It lets connections in."""
        self.ready = True

    def note_reloaded(self) -> None:
        """It has taken the settings of the last SIGHUP."""
        self.reload = False

    def note_counted(self, page: aggregate.Page) -> None:
        """What it counted by its end."""
        self.page, self.complete = page, True

    def note_fault(self, fault: str) -> None:
        """Why it does not start."""
        self.faults.append(fault)

    def note_sample(self, health: dict[str, Any], page: aggregate.Page) -> None:
        """Its sidecar has answered; what it counted by its end is known better."""
        if not self.complete:
            self.health, self.page = health, page
            self.note_alive()

    def note_alive(self) -> None:
        """It is not to be taken for silent."""
        self.heard_at = trio.current_time()

    def note_silent(self) -> None:
        """It does not answer: nobody should be sent to it."""
        self.health = {**self.health, "ready": False, "reasons": ["does not answer"]}

    def take_faults(self) -> list[str]:
        """Why it did not start, once."""
        faults, self.faults = self.faults, []
        return faults

    # What it is told

    def signal(self, number: int) -> None:
        """Send the process a signal, if there is one."""
        if self.process is not None:
            self.process.send_signal(number)

    def ask_reload(self) -> None:
        """Let it reload, until it has done so: it may be ending, and its successor is told then."""
        self.reload = True
        if self.sidecar:
            self.signal(signal.SIGHUP)

    def kill_late(self) -> bool:
        """Kill the process if it is still there."""
        if self.process is None or self.process.returncode is not None:
            return False
        self.process.kill()
        return True

    # Between two processes

    def forget(self) -> None:
        """What a process said is its own, not its successor's."""
        self.page, self.health, self.process, self.complete = {}, {}, None, False
        self.sidecar, self.ready = "", False

    def next_pause_s(self) -> float:
        """How long to wait before the next start: longer and longer while processes live shortly."""
        if trio.current_time() - self.started_at >= LONG_LIFE_S:
            self._pauses.reset()
        return self._pauses.next_s()


async def _open(command: Sequence[str], announce: int) -> trio.Process:
    """Start a worker that announces on descriptor ``announce``."""
    environment = {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}
    # A group of its own: a terminal's Ctrl-C is for the parent, which tells the workers once.
    return await trio.lowlevel.open_process(
        [*command, "--announce-fd", str(announce)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        process_group=0,
        pass_fds=(announce,),
    )


async def _send(process: trio.Process, orders: bytes) -> None:
    """Tell a worker what to do."""
    assert process.stdin is not None  # noqa: S101  # it was asked for
    async with process.stdin as stdin:
        try:
            await stdin.send_all(orders)
        except trio.BrokenResourceError:
            return  # it has ended already, and says why


async def _end(process: trio.Process, drain_s: float) -> None:
    """Let a process drain, then kill it."""
    process.terminate()
    with trio.move_on_after(drain_s):
        await process.wait()
    if process.returncode is None:
        process.kill()
        with trio.move_on_after(KILLED_S):
            await process.wait()
