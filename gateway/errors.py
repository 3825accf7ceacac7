"""The exception tree.

::

    GatewayError                    everything the gateway raises on purpose
    ├── ConfigError                 settings that cannot be used; carries every fault, each with its path
    ├── StartupError                a resource that cannot be had: port, certificate, key, broker setting
    ├── NoThread                    no thread can be had at the moment
    ├── SpoolError                  the spool's directory cannot be used, or takes nothing more
    ├── Refused                     a handshake that ends with an HTTP answer; carries a catalogue.Refusal
    ├── InvalidToken                a token that does not authenticate
    ├── Disconnected                the peer went away before its request was whole
    ├── TlsFailed                   a TLS handshake that came to nothing
    ├── NotAnEnvelope               bytes that are not a MessageEnvelope
    ├── BadMessage                  a client's control message that is none; carries its id
    ├── BadTicks                    a tick file that cannot be read
    └── ClientError                 the client side (gateway.client)
        ├── BadControlMessage       the server sent something that the contract does not know
        ├── HandshakeRejected       the server answered the upgrade with something other than 101
        └── ConnectionLost          the connection ended while it was needed

What a module raises for itself alone (a name with an underscore), and what `gateway.testing` raises, belongs to the
tree too and stands where it is raised.

Third-party exceptions are translated into these once, at the boundary where they arise. Messages say
what was wrong, where, and what to do; the command line prints them as one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.core.catalogue import Refusal


def leaf(error: BaseException) -> Any:
    """The first exception in a group of groups, or ``error`` itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class GatewayError(Exception):
    """Base of everything the gateway raises on purpose."""


class ConfigError(GatewayError):
    """Settings that cannot be used.

    ``faults`` holds one line for each, beginning with the path of the setting (``kafka.flush_timeout_s``).
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class StartupError(GatewayError):
    """A resource the daemon needs cannot be had; the message names it."""


class NoThread(GatewayError):
    """The system gives the process no further thread; it may do so later."""


class SpoolError(GatewayError):
    """The spool cannot be used, or takes nothing more; the message names the directory."""


class Refused(GatewayError):
    """A handshake that is answered with an HTTP refusal instead of 101."""

    def __init__(self, refusal: Refusal, detail: str = "", *, retry_after_s: int | None = None) -> None:
        self.refusal = refusal
        self.detail = detail
        self.retry_after_s = retry_after_s if retry_after_s is not None else refusal.retry_after_s
        super().__init__(f"{refusal.status} {refusal.code}" + (f": {detail}" if detail else ""))


class InvalidToken(GatewayError):
    """A token that does not authenticate. ``reason`` is a fixed word for logs; it never quotes the token."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Disconnected(GatewayError):
    """The peer went away before its request was whole: an ordinary end."""


class TlsFailed(GatewayError):
    """A TLS handshake that came to nothing: ``reason`` is OpenSSL's, or the system's.

    ``said`` is false when the peer went away before it had said anything, as health checks of balancers do.
    """

    def __init__(self, reason: str, *, said: bool) -> None:
        self.reason = reason
        self.said = said
        super().__init__(reason)


class NotAnEnvelope(GatewayError):
    """A binary message whose bytes do not parse as a MessageEnvelope."""


class BadMessage(GatewayError):
    """A control message of a client that is none; ``id`` is its own, where that could be read."""

    def __init__(self, text: str, identifier: int | str | None = None) -> None:
        self.id = identifier
        super().__init__(text)


class BadTicks(GatewayError):
    """A tick file that cannot be read; the message names the file, the line and the column."""


class ClientError(GatewayError):
    """The client side failed."""


class BadControlMessage(ClientError):
    """The server's control message has not the form of the contract; another attempt would meet the same."""


class HandshakeRejected(ClientError):
    """The server answered the upgrade with ``status`` instead of 101; ``code`` is from its JSON body."""

    def __init__(self, status: int, code: str, retry_after_s: float | None = None) -> None:
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(f"handshake answered {status} {code}".rstrip())


class ConnectionLost(ClientError):
    """The connection ended while it was needed; ``code`` is the close code, 1006 without a close frame."""

    def __init__(self, code: int, reason: str = "") -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"connection lost: {code} {reason}".rstrip())
