"""What the parent of several workers tells each of them, on its standard input: a line of JSON, then the end.

So a worker runs with exactly the settings that the parent has checked, whatever their types and whatever has become of
the file since, and no secret is in a list of processes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import IO, Any


@dataclass(frozen=True, slots=True)
class Orders:
    """``settings`` are those to start with (`gateway.config.dump`); the rest is how to read them again on SIGHUP."""

    config_file: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    """Dotted settings over the file's, the worker's own among them."""
    development: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    parent: int = 0
    """The parent's process id."""
    places: str = ""
    """The socket of the places that the parent holds (`gateway.registry.host`)."""

    def encode(self) -> bytes:
        """As `read` takes it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, stream: IO[bytes]) -> Orders:
        """The orders on ``stream``, read to its end."""
        return cls(**json.loads(stream.read()))
