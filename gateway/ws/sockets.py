"""Listening TCP sockets for every address that a name has."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from gateway.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable

_NOT_HERE: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}
"""An address of a name that this machine does not have: ::1 of localhost where IPv6 is off, say."""
_FREE_PORT_TRIES: Final = 20
"""A port that the system calls free for one address may be taken at another."""

Address = tuple[socket.AddressFamily, socket.SocketKind, int, tuple[str, int] | tuple[str, int, int, int]]


def in_url(host: str) -> str:
    """A host as URLs write it (RFC 3986 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def open_listening_sockets(
    setting: str,
    host: str,
    port: int,
    *,
    backlog: int,
    reuse_port: bool = False,
    listening: bool = True,
    prepare: Callable[[socket.socket], None] = lambda sock: None,
) -> list[socket.socket]:
    """Bound, non-blocking sockets on one port, one for each address of ``host``; port 0 picks a free one.

    Resolves ``host``, which blocks. ``prepare`` may set options. Without ``listening`` they only keep the port for
    others that share it. The caller closes them. Raises StartupError naming ``setting`` and the address.
    """
    where = f"{setting}: {host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"{where}: no such address: {error.strerror or error}") from error
    addresses: list[Address] = list(
        dict.fromkeys((family, kind, protocol, address) for family, kind, protocol, _, address in found)  # type: ignore[misc]  # TCP addresses only
    )
    tries = 1 if port else _FREE_PORT_TRIES

    def set_up(sock: socket.socket, address: Address) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address[0] == socket.AF_INET6 and len(addresses) > 1:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the others have sockets of their own
        prepare(sock)
        sock.setblocking(False)

    while True:
        tries -= 1
        try:
            sockets = _bind_all(addresses, set_up)
            if listening:
                for sock in sockets:
                    sock.listen(backlog)
        except OSError as error:
            if tries and error.errno == errno.EADDRINUSE:
                continue
            raise StartupError(f"{where}: {error.strerror or error}") from error
        return sockets


def _bind_all(addresses: list[Address], set_up: Callable[[socket.socket, Address], None]) -> list[socket.socket]:
    """A bound socket for each address that is here. Raises OSError, and then leaves none open."""
    sockets: list[socket.socket] = []
    not_here: OSError | None = None
    try:
        for one in addresses:
            family, kind, protocol, address = one
            port = sockets[0].getsockname()[1] if sockets else address[1]
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                not_here = _not_here(error)
                continue
            sockets.append(sock)
            set_up(sock, one)
            try:
                sock.bind((address[0], port, *address[2:]))
            except OSError as error:
                not_here = _not_here(error)
                sockets.pop().close()
        if not sockets and not_here is not None:
            raise not_here
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _not_here(error: OSError) -> OSError:
    """Return ``error`` when it means that this machine lacks the address; raise it otherwise."""
    if error.errno not in _NOT_HERE:
        raise error
    return error
