"""The boundary of a Trio program: what was raised on purpose comes out as itself, not in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from gateway.errors import GatewayError, leaf

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


def run(main: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """`trio.run`; raises GatewayError, KeyboardInterrupt and BrokenPipeError alone, whatever nurseries they crossed.

    An interruption wins over what it caused; anything else stays in its group.
    """
    try:
        return trio.run(main, *arguments)
    except BaseExceptionGroup as group:
        interrupted = group.subgroup(KeyboardInterrupt)
        meant, rest = group.split((GatewayError, BrokenPipeError))
        if interrupted is None and (meant is None or rest is not None):
            raise
        raise leaf(interrupted or meant or group) from None
