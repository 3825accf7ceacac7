"""The ``gateway`` command, as ``python -m gateway`` too: what must happen before anything else is imported."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit (`gateway.cli.main`); the daemon's signals wait from the first instant."""
    if "serve" in sys.argv[1:2]:
        from gateway.signals import hold_signals

        hold_signals()
    from gateway.cli import main as run

    run()


if __name__ == "__main__":
    main()
