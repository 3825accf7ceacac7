"""Threads that cannot be had, and what comes out of a program's nurseries."""

from __future__ import annotations

import pytest
import trio

from gateway.errors import ConfigError, NoThread, leaf
from gateway.running import run
from gateway.threads import in_thread


async def test_thread_that_cannot_be_had_is_told_apart_from_what_the_call_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("the call's own")

    assert await in_thread(max, 1, 2) == 2
    with pytest.raises(RuntimeError, match="the call's own"):
        await in_thread(fails)

    async def none_left(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
    with pytest.raises(NoThread, match="can't start new thread"):
        await in_thread(fails)


async def raising(*errors: BaseException) -> None:
    async def one(error: BaseException) -> None:
        raise error

    async with trio.open_nursery() as nursery:
        for error in errors:
            nursery.start_soon(one, error)


def test_what_was_raised_on_purpose_comes_out_alone() -> None:
    with pytest.raises(ConfigError, match="a fault"):
        run(raising, ConfigError(["a fault"]))
    with pytest.raises(KeyboardInterrupt):
        run(raising, ConfigError(["a fault"]), KeyboardInterrupt(), ValueError("what it caused"))
    with pytest.RaisesGroup(ConfigError, ValueError) as group:
        run(raising, ConfigError(["a fault"]), ValueError("a bug"))
    assert isinstance(leaf(group.value), ConfigError | ValueError)
