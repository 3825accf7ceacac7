"""Blocking calls in threads, where the process may be allowed no more of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from gateway.errors import NoThread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def in_thread(call: Callable[..., T], *arguments: object, abandon_on_cancel: bool = False) -> T:
    """Run ``call(*arguments)`` in a thread and return what it returns.

    Cancelled, it waits for the call, or with ``abandon_on_cancel`` leaves the thread to end on its own. Raises NoThread
    when none can be had (RLIMIT_NPROC, a container's pids limit): nothing has been called then.
    """
    called = False

    def run() -> T:
        nonlocal called
        called = True
        return call(*arguments)

    try:
        return await trio.to_thread.run_sync(run, abandon_on_cancel=abandon_on_cancel)
    except RuntimeError as error:  # what threading.Thread.start raises
        if called:
            raise
        raise NoThread(f"no thread can be had: {error}; allow the process more of them") from error
