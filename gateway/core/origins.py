"""Which web pages may connect: Origins (RFC 6454, RFC 6455 10.2) in one form, so that comparing them is enough.

An Origin is ``scheme://host`` or ``scheme://host:port``; scheme and host have no case, and the scheme's own port is as
good as none (RFC 6454 4 and 6.1). A trailing dot of the host is the root label of DNS and names the same host.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

_VISIBLE: Final = re.compile(r"[!-~]+\Z")
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?\Z")
ANY_ORIGIN: Final = "*"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def normal_host(host: str) -> str:
    """A host as it is compared: lower case, no trailing dot, IPv6 without brackets."""
    host = host.lower().strip("[]").removesuffix(".")
    return str(ipaddress.IPv6Address(host)) if ":" in host else host


def _bare(origin: str) -> SplitResult | None:
    """The parts of an Origin, with a scheme or without, None for what is none."""
    if origin.startswith("//") or not _VISIBLE.match(origin):
        return None
    try:
        url = urlsplit(origin if "//" in origin else f"//{origin}")
        url.port  # noqa: B018  # raises for a port that is no number
    except ValueError:
        return None
    more = url.path or "@" in url.netloc or "?" in origin or "#" in origin
    if more or not url.hostname:
        return None
    try:
        return url if ":" in normal_host(url.hostname) or _HOST.match(url.hostname) else None
    except ValueError:  # colons, and no IPv6 address
        return None


def normal(origin: str) -> str | None:
    """The one form of an Origin, None for what is none (``null``, a path, an odd port)."""
    url = _bare(origin)
    if url is None or url.hostname is None or not url.scheme:
        return None
    host = normal_host(url.hostname)
    port = "" if url.port is None or url.port == _DEFAULT_PORTS.get(url.scheme) else f":{url.port}"
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def check_allowed(origin: str) -> str:
    """An entry of ``listen.allowed_origins`` in its one form; `ANY_ORIGIN` stays. Raises ValueError for what no
    browser ever sends."""
    return origin if origin == ANY_ORIGIN else check_public(origin)


def check_public(origin: str) -> str:
    """An http or https Origin in its one form; one slash behind it is forgiven. Raises ValueError for what no browser
    ever sends."""
    found = normal(origin.removesuffix("/"))
    if found is None or not found.startswith(("http://", "https://")):
        raise ValueError(f"{origin!r} is not an Origin a browser sends: wanted https://host or https://host:port")
    return found


@dataclass(frozen=True, slots=True)
class OriginRules:
    """``allowed`` in their one form, `ANY_ORIGIN` among them for all; ``public`` is what clients call the gateway."""

    allowed: frozenset[str] = frozenset()
    public: str | None = None

    def admit(self, origin: str, host: str, port: int | None) -> bool:
        """Whether a page of ``origin`` may connect to ``host``, ``port`` (as Host says them, None for no port).

        The gateway's own pages may. MT5 clients write the bare host, with or without a port, as Origin.
        """
        if ANY_ORIGIN in self.allowed:
            return True
        # Browsers write scheme and host in lower case (RFC 6454 6.1); what does not is none.
        if origin == origin.lower() and normal(origin) in (*self.allowed, self.public or ANY_ORIGIN):
            return True
        url = _bare(origin)
        if url is None or url.hostname is None or url.scheme not in ("", *_DEFAULT_PORTS):
            return False
        theirs = None if url.port == _DEFAULT_PORTS.get(url.scheme) else url.port
        return (theirs is None or port is None or theirs == port) and normal_host(url.hostname) == normal_host(host)
