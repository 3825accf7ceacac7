"""What a daemon says about itself while it starts: lines for people on standard output, data for programs.

A program that starts a daemon gives it a descriptor (``--announce-fd N``) and reads one JSON object a line from it:

* ``{"event": "listening", "listen": URL, "sidecar": URL, "kafka": ADDRESSES, "across": {...}}`` when it listens;
* ``{"event": "ready"}`` once they are let in;
* ``{"event": "reloaded"}`` when a reload has been taken, by each worker where there are several;
* ``{"event": "fault", "fault": TEXT}`` for each reason why it does not start;
* ``{"event": "counted", "metrics": TEXT}``, from a worker, with the last page of its metrics.

``across`` says how the metrics of several processes make one, by name, where it is not their sum
(`gateway.telemetry.metrics.Across`); the parent of several workers, whose page is theirs together, says nothing there.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gateway import streams
from gateway.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running daemon is found."""

    listen: str
    sidecar: str
    kafka: str


class Announcer:
    """Tells people, unless they are somebody else's to tell, and whoever started this process, if it wants to know.

    Where nobody takes what is said it is lost, which is no reason to end. A reader must read: what a pipe does not hold
    (64 KiB) is waited for.
    """

    def __init__(self, descriptor: int | None = None, *, people: bool = True) -> None:
        """Raises StartupError for a descriptor that is not open."""
        self._descriptor = descriptor
        self._people = people
        if descriptor is not None:
            try:
                os.set_inheritable(descriptor, False)
            except OSError as error:  # something else would get that number, and the events
                raise StartupError(f"--announce-fd {descriptor}: {error.strerror}") from error

    def listening(self, addresses: Addresses, across: Mapping[str, str], *, embedded: bool = False) -> None:
        """It listens; ``embedded`` says that the Kafka is gone with this process."""
        kafka = f"{addresses.kafka}{' (embedded)' if embedded else ''}"
        self._say(f"listening on {addresses.listen}", f"sidecar on {addresses.sidecar}", f"kafka at {kafka}")
        self.tell("listening", **asdict(addresses), across=dict(across))

    def ready(self) -> None:
        """Connections are let in."""
        self._say("ready")
        self.tell("ready")

    def tell(self, event: str, **facts: Any) -> None:
        """Write one event for programs."""
        if self._descriptor is None:
            return
        line = memoryview(json.dumps({"event": event, **facts}).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:  # nobody reads it any more
            self._descriptor = None

    def _say(self, *lines: str) -> None:
        if not self._people:
            return
        try:
            for line in lines:
                print(f"gateway: {line}", flush=True)
        except OSError:  # a reader that has gone, a full disk; ValueError below: it was closed
            streams.give_up_stdout()
        except ValueError:
            return


def read_event(line: bytes | str) -> dict[str, Any]:
    """One event. Raises ValueError for a line that holds none."""
    found = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        raise ValueError(f"no event: {line[:80]!r}")  # noqa: TRY004  # a value of another form, like any other
    return found
