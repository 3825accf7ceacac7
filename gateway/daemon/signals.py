"""The daemon's signals before and after there is somebody to act on them. Imports next to nothing: it is needed first.

While the program loads, SIGTERM and SIGINT end it, in order and with exit status 0: there is nothing to drain yet. From
`hold_signals` on they wait for `waiting_signals`. SIGHUP always waits. All this by handlers of our own: process 1 has
no default actions (pid_namespaces(7)), elsewhere the one of SIGHUP is to kill. When the event loop has ended, what
still comes waits for nobody.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_waiting: list[int] = []
_held: list[bool] = []


def catch_signals() -> None:
    """Take the signals from now on."""
    for number in SIGNALS:
        signal.signal(number, _caught)


def _caught(number: int, _: FrameType | None) -> None:
    _waiting.append(number)  # first: what is raised in some callback of the interpreter is lost
    if number != signal.SIGHUP and not _held:
        raise SystemExit(0)


def hold_signals() -> None:
    """Let what comes from now on wait: an event loop is about to run, where nothing may be raised at any place."""
    _held.append(True)


def waiting_signals() -> list[int]:
    """What has come and nobody has acted on, once."""
    found = list(_waiting)
    _waiting.clear()
    return found
