"""The ``gateway`` command: what an operator types. Faults end in readable lines and exit status 1.

A command is a file of this folder, imported when it is asked for; what it runs on, Trio and librdkafka among it, is
imported inside it, so that ``--help`` needs neither.
"""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import NoReturn

import cyclopts

from gateway import streams
from gateway.errors import GatewayError

app = cyclopts.App(
    name="gateway",
    help="A WebSocket router daemon: authenticated MT5 tick clients in, Kafka records out.",
    version=version("gateway"),
)

# Said here and not by the commands' docstrings, so that the list needs none of their modules.
for path, text in {
    "serve:serve": "Run the daemon until SIGTERM or SIGINT.",
    "check_config:check_config": (
        "Check a TOML file with everything it names: keys, certificate, Kafka properties. Connects to nothing.\n\n"
        "Where the file names systemd credentials and this is not the unit, they are named, and the rest is checked."
    ),
    "token:token": "Print a development token.",
    "stream:stream": "Replay a tick file to a gateway, as an MT5 client would.",
    "demo:demo": (
        "Show the whole system on this machine: an embedded Kafka, the daemon, clients over WSS, a checking consumer."
    ),
    "spool:app": "The spool: records that Kafka has not taken yet.",
}.items():
    app.command(f"gateway.cli.{path}", name=path.partition(":")[0].replace("_", "-"), help=text)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a fault that was printed, 2 usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale that lacks a character is no reason to end
    try:
        result = app(print_error=True, exit_on_error=True, result_action="return_value")
    except GatewayError as error:
        _complain(error)
        sys.exit(1)
    except UnicodeEncodeError as error:  # in the name of a file
        missing = error.object[error.start : error.end]
        _complain(GatewayError(f"{missing!r}: the locale's {error.encoding} has no such character: set LC_ALL=C.UTF-8"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # whoever read standard output is gone; there is nobody to tell
    except OSError as error:  # what is not translated at its own boundary: standard output, on a full disk say
        streams.give_up_stdout()
        _complain(GatewayError(f"{error.filename or 'standard output'}: {error.strerror or error}"))
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


def _complain(error: GatewayError) -> None:
    for line in str(error).splitlines():
        print(f"gateway: {line}", file=sys.stderr)
