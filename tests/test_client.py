"""The client that sends at least once: what it does when the other side is gone, refuses, or is silent."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import trio

from gateway.client import Backoff, Connection, open_client
from gateway.client.backoff import delay_or_raise
from gateway.errors import ConfigError, ConnectionLost, HandshakeRejected
from gateway.testing.daemon import Daemon


async def test_everything_is_acked_when_the_context_is_left(daemon: Daemon) -> None:
    async with open_client(daemon.url, daemon.token("leaver")) as client:
        for number in range(500):
            await client.send("tick_data", b"%d" % number)
    assert (client.acked, client.unacked, client.rejected, client.reconnects) == (500, 0, 0, 0)


async def test_sending_waits_while_too_much_is_unacked(daemon: Daemon) -> None:
    async with open_client(daemon.url, daemon.token("bounded"), max_unacked=10) as client:
        most = 0
        for number in range(200):
            await client.send("tick_data", b"%d" % number)
            most = max(most, client.unacked)
    assert most == 10
    assert client.acked == 200


async def test_rejections_are_counted_while_the_connection_lives(daemon: Daemon) -> None:
    async with open_client(daemon.url, daemon.token("rejected")) as client:
        for _ in range(20):
            await client.send("weather", b"")
        await client.flush()
        assert client.rejected == 20


async def test_what_no_envelope_can_hold_is_refused_at_once_and_nothing_else_suffers(daemon: Daemon) -> None:
    async with open_client(daemon.url, daemon.token("careless")) as client:
        await client.send("tick_data", b"good")
        with pytest.raises(TypeError):
            await client.send("tick_data", "text")  # type: ignore[arg-type]  # the mistake under test
        with pytest.raises(ValueError, match=r"(?i)out of range"):
            await client.send("tick_data", b"", timestamp_ms=1 << 70)
        with pytest.raises(ValueError, match="the gateway takes 65536"):
            await client.send("tick_data", bytes(70_000))
        await client.send("tick_data", b"good")
    assert client.acked == 2


async def test_a_refused_token_ends_the_body_and_the_bodys_own_error_is_not_lost(daemon: Daemon) -> None:
    with pytest.raises(HandshakeRejected, match="401 invalid_token"):
        async with open_client(daemon.url, "a.b.c"):
            await trio.sleep_forever()
    with pytest.RaisesGroup(HandshakeRejected, ValueError, flatten_subgroups=True):
        async with open_client(daemon.url, "a.b.c"):
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("the body's")
    with pytest.raises(ConfigError, match="not a ws://"):
        async with open_client("http://nowhere/", "t"):
            await trio.sleep_forever()


async def test_a_token_function_is_asked_for_every_attempt(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    asked: list[str] = []

    def fresh() -> str:
        asked.append(daemon.token("asked"))
        return asked[-1]

    daemon.reconfigure(listen__port=int(daemon.url.rpartition(":")[2].partition("/")[0]))
    async with open_client(daemon.url, fresh) as client:
        await client.send("tick_data", b"one")
        await client.flush()
        await trio.to_thread.run_sync(daemon.kill)
        await client.send("tick_data", b"two")
        await trio.to_thread.run_sync(daemon.start)
        await client.flush()
    assert len(asked) >= 2


async def test_a_gateway_that_falls_silent_is_found_out(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"session.ping_interval_s": 1})
    lost = trio.Event()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        lost.set()

    async with open_client(daemon.url, daemon.token("listener"), say=say) as client:
        await client.send("tick_data", b"one")
        await client.flush()
        daemon.signal(signal.SIGSTOP)
        try:
            await client.send("tick_data", b"two")
            with trio.fail_after(15):
                await lost.wait()
        finally:
            daemon.signal(signal.SIGCONT)
        with trio.fail_after(30):
            await client.flush()
    assert "no answer to a ping" in said[0]
    assert client.acked == 2


async def test_leaving_a_gateway_that_does_not_answer_ends_in_time(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with trio.fail_after(15):
        try:
            async with open_client(daemon.url, daemon.token("quitter")) as client:
                await client.send("tick_data", b"one")
                await client.flush()
                daemon.signal(signal.SIGSTOP)
        finally:
            daemon.signal(signal.SIGCONT)
    assert client.acked == 1


def test_delays_never_vanish_and_final_answers_are_final() -> None:
    closed = Connection.__new__(Connection)
    closed.closing = {"reconnect_after_ms": 0}
    backoff = Backoff()
    delays = [delay_or_raise(ConnectionLost(1008), closed, backoff) for _ in range(5)]
    assert delays[0] >= 0.25
    assert delays[4] >= 4
    closed.closing = {"reconnect_after_ms": 60_000}
    assert delay_or_raise(ConnectionLost(1012), closed, backoff) == 60.0
    assert delay_or_raise(HandshakeRejected(503, "draining", 90.0), None, backoff) == 90.0
    for error in (ConnectionLost(1009), ConnectionLost(1015), HandshakeRejected(403, "x"), HandshakeRejected(401, "x")):
        with pytest.raises(type(error)):
            delay_or_raise(error, None, backoff)
