"""What is served where: endpoints, and the way from a request's path to one of them.

An `Endpoint` is everything the upgrade and the connection need to know of what stands behind a path; it knows nobody
else. A path template is literal segments and ``{name}``s; a name takes one segment that is not empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.core import catalogue
from gateway.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from gateway.core.origins import OriginRules
    from gateway.ws.handler import ConnectionLimits, Handler
    from gateway.ws.request import Request

_NAME: Final = re.compile(r"\{([a-z_]+)\}\Z")


def _normal(path: str) -> str:
    """A path as it is compared: a slash at the end makes no difference."""
    return path.rstrip("/") or "/"


class PathTemplate:
    """A path with parameters: ``/ws/mt5``, ``/ws/simulation/{id}``."""

    def __init__(self, template: str) -> None:
        """Raises ValueError for a template that names a parameter twice, or has braces that are none."""
        self.template = _normal(template)
        pattern, names = "", []
        for segment in self.template.split("/")[1:]:
            name = _NAME.match(segment)
            if name is None and ("{" in segment or "}" in segment):
                raise ValueError(f"{template}: {segment!r} is neither a literal segment nor {{name}}")
            if name is not None:
                if name[1] in names:
                    raise ValueError(f"{template}: {name[1]} is named twice")
                names.append(name[1])
            pattern += "/" + (re.escape(segment) if name is None else f"(?P<{name[1]}>[^/]+)")
        self._match = re.compile(pattern).fullmatch

    def match(self, path: str) -> dict[str, str] | None:
        """The parameters of a path of this form, as they stand; None for any other path."""
        found = self._match(_normal(path))
        return found.groupdict() if found else None


class Asked(NamedTuple):
    """An upgrade request on its way to an endpoint."""

    request: Request
    parameters: Mapping[str, str]
    """What the path template's names stand for."""
    query: Mapping[str, list[str]]
    offered: list[str]
    """The subprotocols that the client offers, as they stand: a token may be among them."""
    spoken: tuple[str, ...]
    """Those that the endpoint answers with, whichever the client offers first."""


@dataclass(frozen=True, slots=True)
class Granted:
    """An upgrade that is granted: to whom, in the endpoint's own terms, and with which subprotocol to answer."""

    identity: Any
    subprotocol: str | None = None
    text: bool = False
    """Whether text messages are taken beside binary ones; else one closes with 1003."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is served at a path.

    ``authorise`` decides whether a request may come in, and raises Refused if not; it touches no socket and does not
    wait. ``open`` makes the handler of a connection that was granted, within the handshake's deadline: it may wait, and
    raise Refused as well, and leaves nothing behind then, as when it is cancelled. Once it has returned,
    `Handler.ended` is called once, whatever happens.
    """

    name: str
    path: PathTemplate
    limits: ConnectionLimits
    origins: OriginRules
    authorise: Callable[[Asked], Granted]
    open: Callable[[Granted], Awaitable[Handler]]
    subprotocols: tuple[str, ...] = ()
    """Those that are answered, whichever the client offers first."""


class Endpoints:
    """All that is served, in the order in which paths are tried."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)

    def find(self, path: str) -> tuple[Endpoint, dict[str, str]]:
        """The endpoint of a path, and what its template's names stand for. Raises Refused."""
        for endpoint in self._endpoints:
            parameters = endpoint.path.match(path)
            if parameters is not None:
                return endpoint, parameters
        raise Refused(catalogue.NOT_FOUND)
