"""The daemon's signals, and how they wait until somebody can act on them. Imports nothing: it is needed first."""

from __future__ import annotations

import signal
from typing import Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def hold_signals() -> None:
    """Let the signals wait until `release_signals`.

    Called before anything else: until then a SIGHUP would kill, and as process 1, whose signals have no default action
    (pid_namespaces(7)), a SIGTERM would be lost. Processes that are started meanwhile hold them too (signal(7)).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Take the signals that have come since `hold_signals`, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
