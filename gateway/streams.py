"""Standard input, output and error, where they are closed, full or read by nobody."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def fill() -> None:
    """Open what was closed of the three: else the first sockets would take their places."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:  # the three are there
            os.close(descriptor)
            return


def give_up_stdout() -> None:
    """Nothing more can be written: what is buffered would be tried again at exit, and change the exit status."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
