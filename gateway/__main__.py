"""The ``gateway`` command, as ``python -m gateway`` too: what must happen before anything else is imported."""

from __future__ import annotations

import sys
from typing import NoReturn

from gateway import streams


def main() -> NoReturn:
    """Run the command line and exit (`gateway.cli.main`); the daemon's signals count from the first instant."""
    streams.fill()
    if "serve" in sys.argv[1:2]:
        from gateway.daemon.signals import catch_signals

        catch_signals()
    try:
        from gateway.cli import main as run

        run()
    except KeyboardInterrupt:  # where nobody else catches it: while modules load
        sys.exit(130)


if __name__ == "__main__":
    main()
