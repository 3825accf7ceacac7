"""What systemd wants to know: sd_notify(3) and its watchdog. Without systemd nothing here does anything."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from trio_util import AsyncValue

EXTEND_S: Final = 10.0
"""Between two requests for more time, each for three times as long."""
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")
"""What systemd says to one process; its children are not meant."""


def notify(*assignments: str) -> None:
    """Send a state to the socket in NOTIFY_SOCKET, if there is one: ``READY=1``, ``STOPPING=1``, ``STATUS=...``."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket (unix(7))
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
    except OSError:
        return  # systemd decides by its own timeouts when it hears nothing


def extension(seconds: float) -> str:
    """The assignment that asks systemd for ``seconds`` from now for what is going on: a start, or a stop.

    sd_notify(3): once the time a unit allows is over, systemd waits for as long as it is told in time.
    """
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}"


async def extend_start(state: AsyncValue[Any]) -> None:
    """Keep systemd waiting while the daemon is ``starting``: Kafka may be away longer than a unit allows."""
    while state.value == "starting":
        notify(extension(3 * EXTEND_S))
        with trio.move_on_after(EXTEND_S):
            await state.wait_value(lambda value: value != "starting")


def reloading() -> None:
    """Say that a reload begins (Type=notify-reload wants the time); ``READY=1`` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """How often to send ``WATCHDOG=1``: half of WATCHDOG_USEC (sd_watchdog_enabled(3)); None when not wanted."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    process = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or process != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000


async def feed_watchdog() -> None:
    """Send ``WATCHDOG=1`` as often as systemd wants while the event loop turns; returns at once when it does not."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await trio.sleep(interval_s)
